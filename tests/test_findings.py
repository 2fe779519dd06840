"""The report's sentences follow the receipts and the curves."""

import pytest

from flm_jax.config import ScheduleConfig
from flm_jax.runs.findings import sentences

RECEIPT = {
    "operator": "msg", "exactness": "EXACT", "max_abs_logit_diff": 1e-6, "logit_scale": 1.0,
    "loss_before": 2.0, "loss_after": 2.0, "dead_slots": 0, "locked_copies": 0,
}  # fmt: skip


def run(curve, receipt=None, *, dtype="float32", schedule=None, steps=90):
    """Two stages; the second has this curve of (step, bits per byte)."""
    first = {"name": "small", "parent": None, "steps": 10, "receipt": None}
    first["eval"] = {"bpb_start": 8.0, "bpb_end": curve[0][1]}
    second = {"name": "large", "parent": "small", "steps": steps, "receipt": receipt or RECEIPT}
    second["eval"] = {"bpb_start": curve[0][1], "bpb_end": curve[-1][1]}
    rows = [
        {"step": step, "bpb": bpb, "mask": 0.5 if 10 <= step < 14 else None} for step, bpb in curve
    ]
    schedule = ScheduleConfig(**(schedule or {"kind": "constant"}))
    return sentences([first, second], [[], rows], [dtype, dtype], schedule)


FALLING = [(10, 3.0), (50, 2.5), (100, 2.0)]


def test_a_run_that_went_well():
    assert run(FALLING) == [
        "The validation loss fell in small: from 8.0000 to 3.0000 bits per byte in 10 steps.",
        "The growth to large (msg) kept the function: logits moved by at most 1e-06 of their "
        "scale, and the loss by +0 nats per token.",
        "The validation loss fell in large: from 3.0000 to 2.0000 bits per byte in 90 steps.",
    ]


@pytest.mark.parametrize(
    ("receipt", "dtype", "words", "never"),
    [
        (
            {"max_abs_logit_diff": 0.4},
            "float32",
            ("changed the function", "0.4 of", "EXACT"),
            "kept",
        ),
        (
            {"max_abs_logit_diff": 0.4, "exactness": "APPROX", "loss_after": 2.5},
            "float32",
            ("changed the function", "+0.5 nats"),
            "EXACT",
        ),
        ({"max_abs_logit_diff": 0.02}, "bfloat16", ("kept the function",), "changed"),
        ({"max_abs_logit_diff": 0.02}, "float32", ("changed the function",), "kept"),
        ({"logit_scale": 0.0}, "float32", ("was not measured",), "kept"),
        ({"dead_slots": 3, "locked_copies": 4}, "float32", ("3 slots", "4 copies"), "changed"),
        ({"operator": "none"}, "float32", ("continues the parameters of small",), "kept"),
    ],
)
def test_a_growth_is_what_its_receipt_says(receipt, dtype, words, never):
    text = run(FALLING, {**RECEIPT, **receipt}, dtype=dtype)[1]
    assert all(word in text for word in words) and never not in text, text


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        ([(10, 3.0), (12, 3.4), (14, 3.2), (50, 2.9)],
         ("from 3.0000 to 3.4000", "2 steps after", "ends after 4)", "back after 40 steps")),
        ([(10, 3.0), (14, 3.4), (50, 3.2)], ("4 steps after", "did not come back")),
    ],
)  # fmt: skip
def test_a_bump_after_the_growth_is_reported(curve, words):
    text = run(curve)[2]
    assert all(word in text for word in words), text


def test_a_loss_that_rises_is_not_said_to_fall():
    texts = run([(10, 8.4), (100, 13.5)])
    assert "**rose** in large: from 8.4000 to 13.5000" in texts[-1]
    assert not any("fell in large" in text for text in texts)
    flat = run([(10, 3.0), (100, 3.0002)])
    assert "did not change in large" in flat[-1]


def test_a_decay_is_named_where_there_is_one():
    wsd = {"kind": "wsd", "decay_steps": 20}
    assert "decays at the end (wsd)" in run(FALLING, schedule=wsd)[-1]
    assert "decays" not in run(FALLING, schedule={"kind": "wsd", "decay_steps": 0})[-1]
