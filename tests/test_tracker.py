"""The user's tracker: it is found, checked, and gets what TensorBoard gets."""

import dataclasses
import json

import pytest

from flm_jax.errors import UserError
from flm_jax.store import tracker
from flm_jax.store.lineage import identity
from flm_jax.store.metrics import TensorBoard
from tests.experiment_runs import experiment


def test_a_tracker_gets_the_curves(tmp_path):
    config = dataclasses.replace(experiment(), seed=4)

    def opened():
        return tracker.open_writer("tests.my_tracker:to_file", tmp_path, config)

    with TensorBoard(tmp_path / "tensorboard", [opened]) as board:
        board.settings(0, {"seed": 4})  # its writer leaves out texts and hyper-parameters
        board.write(10, "train", loss=2.5, mask=1.0)
        board.write(20, "eval", bits_per_byte=1.5)
    rows = json.loads((tmp_path / "tracked-4.json").read_text())
    assert rows == [
        {"step": 10, "train/loss": 2.5, "train/mask": 1.0},
        {"step": 20, "eval/bits_per_byte": 1.5},
    ]
    assert list((tmp_path / "tensorboard").iterdir())  # TensorBoard still gets them too


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_tracker", "give package.module:function"),
        ("tests.no_module:f", "cannot be imported (ModuleNotFoundError"),
        ("tests.my_tracker:missing", "cannot be imported (AttributeError"),
        ("tests.my_tracker:not_a_function", "no function"),
        ("tests.my_tracker:no_writer", "returned PosixPath; return a clu"),
        ("tests.my_tracker:fails", "failed (ConnectionError: no route to host)"),
    ],
)
def test_a_wrong_tracker_is_one_line(name, words, tmp_path):
    with pytest.raises(UserError) as refused:
        tracker.open_writer(name, tmp_path, experiment())
    assert words in str(refused.value) and "config.tracker" in str(refused.value)


def test_a_module_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "only_here_tracker.py").write_text("def f(folder, config): pass\n")
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    with pytest.raises(UserError, match="cannot be imported"):
        tracker.find("only_here_tracker:f")
    monkeypatch.chdir(tmp_path)
    assert callable(tracker.find("only_here_tracker:f"))


def test_the_tracker_may_change_on_resume():
    config = experiment()
    other = dataclasses.replace(config, tracker="tests.my_tracker:to_file")
    assert identity(config, 0, "f") == identity(other, 0, "f")
