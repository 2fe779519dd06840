"""Synthetic samples: right answers, determined by the seed, and disjoint splits."""

import ast
import collections
import doctest
import re

import pytest

from flm_jax.errors import UserError
from flm_jax.sft import chats, synthetic


@pytest.fixture(scope="module")
def samples():
    return synthetic.make(0, 60)


def problem_of(sample):
    """Reads a sample's problem from its text, independently of the keys of `synthetic`."""
    first, answer = sample.messages[0].content, sample.messages[-1].content
    if sample.category.startswith("arithmetic"):
        terms = re.findall(r"([+-]?) ?(\d+)", first)
        return "sum", tuple(sorted(int(sign + number) for sign, number in terms))
    if sample.category in ("describe", "source"):
        return "library", re.search(r"def (\w+)", first)[1]
    if sample.category == "code":
        return "function", answer
    listed = re.search(r"\[[\d, ]*\]", first)
    if listed:
        return "list", listed[0]
    # The longest word of syllables; the templates have only short ones.
    return "word", max(re.findall(r"\b(?:[bdfgklmnprstv][aeiou]){2,3}\b", first), key=len)


def shared(one, two):
    """Returns the problems that two sets have in common."""
    return {problem_of(s) for s in one} & {problem_of(s) for s in two}


def test_no_problem_is_in_both_splits(samples, monkeypatch):
    held_out = synthetic.make(7, 60, "evaluation")
    assert not shared(samples, held_out)
    # Negative control: the split does not depend on the problem.
    monkeypatch.setattr(synthetic, "side", lambda key: "evaluation")
    assert shared(samples, synthetic.make(7, 60, "evaluation"))


def test_a_seed_determines_the_samples_and_they_differ_within_a_set(samples):
    assert synthetic.make(0, 60) == samples
    assert synthetic.make(1, 60) != samples
    assert len({s.messages for s in samples}) == len({s.id for s in samples}) == len(samples)
    assert collections.Counter(s.category for s in samples) == dict.fromkeys(
        synthetic.CATEGORIES, 60
    )


def test_arithmetic_is_right(samples):
    for s in samples:
        if not s.category.startswith("arithmetic"):
            continue
        question, answer = (m.content for m in s.messages)
        value = eval(re.match(r"What is (.*)\?", question)[1])
        assert int(answer.split()[-1]) == int(s.check.expected) == value
        for step in re.findall(r"[\d+\- ]+=[\d\- ]+", answer):
            left, right = step.split("=")
            assert eval(left.strip()) == int(right)


def test_lists_are_right(samples):
    rules = {
        "Sort|in order": sorted,
        "sum|Add .* up": sum,
        "largest": max,
        "even": lambda v: [x for x in v if not x % 2],
        "Reverse|around": lambda v: list(reversed(v)),
    }
    seen = set()
    for s in synthetic.make(0, 200, categories=["lists"]):
        question, answer = (m.content for m in s.messages)
        values = ast.literal_eval(re.search(r"\[.*\]", question)[0])
        for words, rule in rules.items():
            if re.search(words, question):
                assert ast.literal_eval(answer) == rule(values)
                seen.add(words)
    assert seen == set(rules)


def test_functions_pass_their_doctests(samples):
    for s in (s for s in samples if s.category == "code"):
        namespace: dict = {}
        exec(s.check.expected + s.messages[-1].content, namespace)
        examples = doctest.DocTestFinder().find(namespace["f"], "f", globs=namespace)
        outcome = doctest.DocTestRunner(verbose=False).run(examples[0], out=lambda text: None)
        assert outcome.attempted == 4 and outcome.failed == 0
        # The prompt shows one of the four examples.
        assert s.messages[0].content.count(">>>") == 1


def test_turns_alternate_and_texts_are_short(samples):
    for s in samples:
        roles = [m.role for m in s.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert sum(len(m.content) for m in s.messages) < 400
        assert all(m.content.strip() for m in s.messages)
    dialogues = [s for s in samples if s.category == "dialogue"]
    assert max(len(s.messages) for s in dialogues) >= 6


def test_spoiled_samples_name_their_defects(samples):
    pile = synthetic.spoil(samples, 0, 0.1)
    assert pile == synthetic.spoil(samples, 0, 0.1)
    defects = collections.Counter(s.id.partition("#")[2] for s in pile)
    assert defects == {"": len(samples)} | dict.fromkeys(
        synthetic.DEFECTS, round(len(samples) / 10)
    )
    originals = {s.id: s for s in samples}
    for s in pile:
        name, _, defect = s.id.partition("#")
        same = s.messages == originals[name].messages
        assert same == (defect in ("", "duplicate"))


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="split is 'test'; choose one of train, evaluation"):
        synthetic.make(0, 1, "test")
    with pytest.raises(UserError, match="category is 'poems'; choose one of arithmetic"):
        synthetic.make(0, 1, categories=["poems"])
    with pytest.raises(UserError, match=r"describe has about .* 100000 are wanted"):
        synthetic.make(0, 100_000, categories=["describe"])


def test_rows_hold_only_the_fields_that_are_set(samples, tmp_path):
    path = tmp_path / "samples.jsonl"
    chats.write_jsonl(path, samples[:1])
    assert path.read_text(encoding="utf-8").count("\n") == 1
    row = chats.to_row(chats.Sample((chats.Message("user", "ä"),)))
    assert row == {"messages": [{"role": "user", "content": "ä"}]}
