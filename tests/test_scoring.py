"""Scores: checks by program, confidence intervals."""

import dataclasses
import math
import re

import numpy as np
import pytest
from scipy import stats

from flm_jax.errors import UserError
from flm_jax.sft import scoring, synthetic
from flm_jax.sft.chats import Check, Message, Sample
from flm_jax.sft.scoring import ResponseLoss

DOUBLE = Check(
    "doctest", 'def f(x):\n    """Twice x.\n\n    >>> f(3)\n    6\n    >>> f(-1)\n    -2\n    """\n'
)


def test_checks():
    def right(kind, expected, answer):
        return scoring.check_answer(Check(kind, expected), answer)[0]

    assert right("exact", "[1, 2]", " [1, 2]\n") and not right("exact", "[1, 2]", "[1,2]")
    assert right("number", "7", "3 + 4 = 7. Answer: 7") and not right("number", "7", "7 or 8")
    assert right("number", "-2", "it is -2") and right("number", "2", "5-2")
    assert right("number", "1200", "1,200") and right("number", "0.5", "x = 0.50")
    assert not right("number", "7", "seven")
    for body in ("    return 2 * x", "return x + x", "    y = x\n    return y + x"):
        assert scoring.check_answer(DOUBLE, body) == (True, "")
    for body in ("    return 2 * x + 1", "    return 6", "    return x +", "", "pass"):
        assert not scoring.check_answer(DOUBLE, body)[0]


def test_examples_that_raise_and_their_options():
    source = (
        'def f(x):\n    """Raise.\n\n    >>> f(0)\n    Traceback (most recent call last):\n'
        "        ...\n    ValueError: none\n    >>> f(1)  # doctest: +ELLIPSIS\n    [0, ..., 8]\n"
        '    """\n'
    )
    body = "if not x: raise {}\nreturn list(range(9))"
    assert scoring.check_answer(Check("doctest", source), body.format("ValueError('none')"))[0]
    assert not scoring.check_answer(Check("doctest", source), body.format("ValueError('no')"))[0]


def test_wilson_and_bootstrap_against_their_formulas():
    """Wilson's closed form, and a bootstrap written as a loop with other draws."""
    z = stats.norm.ppf(0.975)
    for right, count in ((0, 5), (3, 10), (50, 50)):
        p = right / count
        centre = (p + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
        ours = scoring.wilson(right, count)
        assert (ours.value, ours.n) == (p, count) and ours.low <= p <= ours.high
        np.testing.assert_allclose([ours.low, ours.high], [centre - half, centre + half], atol=1e-6)
    rng = np.random.default_rng(1)
    below = rng.uniform(1, 9, 200)
    above = below * rng.uniform(1, 2, 200)
    ours = scoring.ratio(above, below)
    assert ours.value == above.sum() / below.sum() and ours == scoring.ratio(above, below)
    drawn = [rng.integers(0, 200, 200) for _ in range(scoring.BOOTSTRAPS)]
    want = np.percentile([above[d].sum() / below[d].sum() for d in drawn], (2.5, 97.5))
    width = ours.high - ours.low
    np.testing.assert_allclose([ours.low, ours.high], want, atol=width / 8)
    # Negative control: numerators and denominators are drawn independently.
    other = [rng.integers(0, 200, 200) for _ in range(scoring.BOOTSTRAPS)]
    pairs = zip(drawn, other, strict=True)
    apart = np.percentile([above[d].sum() / below[e].sum() for d, e in pairs], (2.5, 97.5))
    assert apart[1] - apart[0] > 2 * width
    one = scoring.ratio(above[:1], below[:1])
    assert one.low == one.high == one.value and one.n == 1


def test_scores_of_a_model_that_is_always_right():
    samples = synthetic.make(0, 4, "evaluation")

    def answer(asked):
        assert all(s.check for s in asked)
        return [s.messages[-1].content for s in asked]

    def losses(asked):
        return [ResponseLoss(math.log(2) * 8, 4, 16) for _ in asked]

    scores = scoring.summarise(scoring.score(samples, losses, answer))
    assert set(scores) == {*synthetic.CATEGORIES, "all"}
    for category, metrics in scores.items():
        assert metrics["bpb"].value == pytest.approx(0.5)
        assert metrics["loss"].value == pytest.approx(2 * math.log(2))
        if "accuracy" in metrics:
            assert metrics["accuracy"].value == 1 and metrics["accuracy"].low < 1
        assert ("accuracy" in metrics) == (category not in ("describe", "source"))
    # Negative control: one wrong answer lowers the score.
    wrong = dataclasses.replace(samples[0], check=Check("number", "1000"))
    again = scoring.summarise(scoring.score([wrong, *samples[1:]], losses, answer))
    assert again["arithmetic"]["accuracy"].value == 0.75
    flat = scoring.flat(again)["arithmetic"]
    assert flat["accuracy"] == 0.75 and flat["accuracy_low"] < 0.75 < flat["accuracy_high"]
    assert flat["accuracy_n"] == flat["bpb_n"] == 4


def test_malformed_checks_are_one_line():
    def error(kind, expected):
        sample = Sample(
            (Message("user", "q"), Message("assistant", "1")), "c", "c/1", Check(kind, expected)
        )
        with pytest.raises(UserError) as caught:
            scoring.check_all([sample], ["1"])
        return str(caught.value)

    assert "sample 'c/1': its check is of kind 'regex'" in error("regex", "x")
    assert "'none', which holds no number" in error("number", "none")
    for source in ("def f(", "x = 1", "def f(x):\n    '''No example.'''", ""):
        assert re.search("docstring with examples", error("doctest", source))
    with pytest.raises(UserError, match="no samples to score"):
        scoring.score([], lambda s: [], lambda s: [])
