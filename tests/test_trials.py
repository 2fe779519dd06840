"""`Trials`: results are computed once and found again, also after a kill."""

import json

import pytest

from flm_jax.store.trials import Trials


def refuse():
    raise AssertionError("computed again")


def test_a_result_is_computed_once_and_found_by_its_identity(tmp_path):
    path = tmp_path / "new folder" / "trials.jsonl"
    trials = Trials(path)
    first = trials.result({"key": "a", "name": "x"}, lambda: {"loss": 1.5, "shape": (2, 3)})
    assert first == {"key": "a", "name": "x", "loss": 1.5, "shape": [2, 3]}  # as JSON stores it
    for again in (trials, Trials(path)):
        assert again.result({"key": "a", "name": "x"}, refuse) == first
        assert again.find({"key": "a", "name": "y"}) is again.find({"key": "b"}) is None
        for other in ({"key": "a", "name": "y"}, {"key": "b", "name": "x"}):
            with pytest.raises(AssertionError, match="computed again"):
                again.result(other, refuse)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("left", range(1, 30, 4))
def test_an_incomplete_last_line_is_computed_again_and_spoils_no_other_line(left, tmp_path):
    path = tmp_path / "trials.jsonl"
    trials = Trials(path)
    one = trials.result({"key": "one"}, lambda: {"value": 1})
    trials.result({"key": "two"}, lambda: {"value": "µ"})
    text = path.read_text()
    second = text.index("\n") + 1
    path.write_text(text[: second + min(left, len(text) - second - 2)])  # a kill during the write
    again = Trials(path)
    assert again.result({"key": "one"}, refuse) == one
    two = again.result({"key": "two"}, lambda: {"value": 2})
    three = again.result({"key": "three"}, lambda: {"value": 3})
    last = Trials(path)
    assert [last.result({"key": k}, refuse) for k in ("one", "two", "three")] == [one, two, three]


def test_a_failed_computation_stores_nothing_and_a_recorded_failure_is_retried(tmp_path):
    path = tmp_path / "trials.jsonl"
    with pytest.raises(AssertionError):
        Trials(path).result({"key": "a"}, refuse)
    assert not path.exists()
    trials = Trials(path)
    assert trials.result({"key": "a"}, lambda: {"failure": "no answer"})["failure"] == "no answer"
    for again in (trials, Trials(path)):
        assert again.find({"key": "a"}) is None
    done = trials.result({"key": "a"}, lambda: {"value": 1})
    assert Trials(path).result({"key": "a"}, refuse) == done
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sorted(row) for row in rows] == [["failure", "key"], ["key", "value"]]
