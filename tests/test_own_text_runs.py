"""A run on one file of text, from the shipped config: its first lines, and its own vocabulary."""

import json
import random
import shutil

import pytest

from flm_jax.interop.opening import open_stored_model
from tests.commands import run

SMALL = [
    *(f"--config.stages[{i}].model.{name}={value}" for i in (0, 1) for name, value in {
        "num_layers": 1 + i, "d_model": 32, "num_heads": 1, "d_ff": 64, "mup_base_width": 32,
    }.items()),
    "--config.stages[0].steps=4", "--config.stages[1].steps=4",
    "--config.stages[1].growth.ramp_steps=2", "--config.schedule.warmup_steps=1",
    "--config.schedule.decay_steps=1", "--config.data.sequence_length=64",
    "--config.eval.sequences=8", "--config.quick_compile=True",
]  # fmt: skip


@pytest.mark.slow
def test_one_file_trains_a_vocabulary_and_two_stages(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
    book = tmp_path / "book.txt"
    book.write_text("".join(" ".join(rng.choices(words, k=9)) + "\n" for _ in range(900)))
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")

    def train(workdir, *more):
        return run(
            "train", "--config=configs/own_text.py", f"--config.data.path={tmp_path}",
            "--config.data.train_vocabulary=300", f"--workdir={workdir}", *SMALL, *more,
        )  # fmt: skip

    first = tmp_path / ".first"
    status, _, err = train(first)
    assert status == 0, err
    lines = [line for line in err.splitlines() if not line.startswith("opening data")]
    assert lines[0] == f"training a vocabulary of 300 tokens: {first}/vocabulary.model"
    assert lines[1].startswith("devices: 1 x cpu, ")
    assert [line.split()[0] for line in lines[2:5]] == ["text:", "passes:", "not"]
    assert lines[2].startswith("text: 1 documents, ")
    assert lines[4] == "not read: 1 other files: notes.pdf"
    assert not any(word in err for word in ("libtpu", "INVALID_ARGUMENT", "Failed to find"))
    saved = json.loads((first / "stages/0-small/config.json").read_text())
    assert saved["data"]["train_vocabulary"] == 300 and saved["data"]["vocabulary"] == "bytes"
    assert saved["stage"]["model"]["vocab_size"] == 300

    # The folder can be moved, and a resumed run keeps its vocabulary.
    moved = tmp_path / ".moved"
    shutil.move(first, moved)
    assert open_stored_model(str(moved)).vocabulary.path == f"{moved}/vocabulary.model"
    trained = (moved / "vocabulary.model").stat()
    shutil.rmtree(moved / "stages/1-medium")
    lineage = json.loads((moved / "lineage.json").read_text())
    (moved / "lineage.json").write_text(json.dumps({**lineage, "stages": lineage["stages"][:1]}))
    status, _, err = train(moved)
    assert status == 0 and "training a vocabulary" not in err, err
    assert (moved / "vocabulary.model").stat().st_mtime_ns == trained.st_mtime_ns
    again = json.loads((moved / "lineage.json").read_text())
    assert [s["params_digest"] for s in again["stages"]] == [
        s["params_digest"] for s in lineage["stages"]
    ]
