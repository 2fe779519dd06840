"""The judge: verdicts, order of answers, failures, resuming, AlignBench's overall score."""

import json
import shlex
import sys

import pytest

from flm_jax.errors import UserError
from flm_jax.sft import judge, synthetic
from flm_jax.sft.chats import Message, Sample
from flm_jax.sft.judge import Judge
from flm_jax.studies import reported


def command(body):
    """Returns the command of a judge in Python; `q` is the question."""
    code = f"import json, sys, time, os\nq = json.load(sys.stdin)\n{body}"
    return shlex.join([sys.executable, "-I", "-S", "-c", code])


LONGER = command(
    "a, b = len(q['answer_a']), len(q['answer_b'])\n"
    "print(json.dumps({'winner': 'a' if a > b else 'b' if b > a else 'tie'}))"
)
SAMPLES = [
    Sample((Message("user", f"q{n}"), Message("assistant", "known")), f"c{n % 2}", f"s{n}")
    for n in range(4)
]


def reported_scores(model):
    """Returns a model's AlignBench scores by category, with "Overall"."""
    return {b.name: b.scores[model] for b in reported.benchmarks() if b.group == "AlignBench"}


def test_reported_scores_follow_the_rule():
    scores = reported_scores("FLM-2-52B-Instruct")
    assert round(judge.overall_score(scores), 2) == 6.23
    models = next(b.scores for b in reported.benchmarks() if b.group == "AlignBench")
    assert len(models) == 5
    for model in models:
        by_category = reported_scores(model)
        overall = judge.overall_score(by_category)
        assert overall == pytest.approx(by_category["Overall"], abs=0.005), model
    # Negative control: the mean over all categories is another number.
    assert round(sum(scores[c] for c in judge.CATEGORIES) / 8, 2) == 7.11
    assert judge.overall_score({"Math": 1.0}) is None


def test_win_rates(tmp_path):
    answers_a, answers_b = ["long"] * 3 + ["x"], ["x", "x", "long", "long"]
    verdicts = Judge(LONGER).verdicts(SAMPLES, answers_a, answers_b, tmp_path / "verdicts.jsonl")
    assert [v.points for v in verdicts] == [1, 1, 0.5, 0]
    rates = judge.report(verdicts)["categories"]
    assert rates["all"]["win_rate"] == 0.625 and rates["all"]["agreement"] == 1
    assert rates["c0"]["win_rate"] == 0.75 and rates["c1"]["win_rate"] == 0.5
    assert rates["all"]["win_rate_low"] < 0.625 < rates["all"]["win_rate_high"]
    question = judge.question_of(synthetic.make(0, 1, categories=["dialogue"])[0], "1", "2", True)
    assert question["answer_a"] == "2" and question["messages"][-1]["role"] == "user"
    assert "check" not in question  # the judge does not see the right answer


def test_a_bias_for_the_first_answer_cancels_out(tmp_path):
    first = Judge(command("print(json.dumps({'winner': 'a', 'score_a': 9, 'score_b': 2}))"))
    verdicts = first.verdicts(SAMPLES, ["x"] * 4, ["y"] * 4, tmp_path / "verdicts.jsonl")
    total = judge.report(verdicts)["categories"]["all"]
    assert total["win_rate"] == 0.5 and total["agreement"] == 0
    assert total["score_a"] == total["score_b"] == 5.5


def test_scores_are_combined_into_an_overall_score(tmp_path):
    samples = [Sample((Message("user", c), Message("assistant", "")), c) for c in judge.CATEGORIES]
    scores = reported_scores("FLM-2-52B-Instruct")
    body = f"s = {scores!r}[q['category']]\na = s if q['answer_a'] == 'ours' else 1\n"
    body += (
        "b = s if q['answer_b'] == 'ours' else 1\nprint(json.dumps({'score_a': a, 'score_b': b}))"
    )
    verdicts = Judge(command(body)).verdicts(samples, ["ours"] * 8, ["?"] * 8, tmp_path / "x.jsonl")
    report = judge.report(verdicts)
    assert round(report["overall_a"], 2) == 6.23 and report["overall_b"] == 1


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("sys.exit('out of credit')", "exit status 1: out of credit"),
        ("time.sleep(60)", "no verdict within 0.5 s"),
        ("print('A wins')", "not a JSON object"),
        ("print(json.dumps({'winner': 'c'}))", "winner must be one of a, b, tie"),
        ("print(json.dumps({'score_a': 3}))", "must be two numbers"),
        ("print(json.dumps({'score_a': float('nan'), 'score_b': 1}))", "must be two numbers"),
        ("print(json.dumps(['a']))", "winner must be one of"),
    ],
)
def test_failures_are_counted(body, why, tmp_path):
    verdicts = Judge(command(body), timeout=0.5 if "sleep" in body else 20).verdicts(
        SAMPLES[:1], ["x"], ["y"], tmp_path / "verdicts.jsonl"
    )
    total = judge.report(verdicts)["categories"]["all"]
    assert total["failed"] == total["asked"] == 1 and total["win_rate"] is None
    assert why in total["failures"][0]


def test_no_verdict_is_lost_and_failures_are_retried(tmp_path):
    path, broken = tmp_path / "verdicts.jsonl", tmp_path / "broken"
    calls = tmp_path / "calls"
    body = (
        f"open({str(calls)!r}, 'a').write('x')\n"
        f"if os.path.exists({str(broken)!r}) and q['id'] == 's1': sys.exit('later')\n"
        "print(json.dumps({'winner': 'tie'}))"
    )
    broken.touch()
    given = (SAMPLES, ["x"] * 4, ["y"] * 4, path)
    first = Judge(command(body)).verdicts(*given)
    assert [v.points for v in first] == [0.5, None, 0.5, 0.5]
    assert judge.report(first)["categories"]["all"]["failed"] == 1
    broken.unlink()
    again = Judge(command(body)).verdicts(*given)
    assert [v.points for v in again] == [0.5] * 4
    assert len(calls.read_text()) == 8 + 2  # two more questions for the sample that failed
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 8 + 2 and sum("failure" in row for row in rows) == 2
    with pytest.raises(UserError, match="judge 'no-such-judge --x': no such command"):
        Judge("no-such-judge --x")
