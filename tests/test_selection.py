"""Selection: the reasons of each step, quotas, clusters, the digest, quality by given losses."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from flm_jax.errors import UserError
from flm_jax.sft import chats, scoring, selection, synthetic
from flm_jax.sft.chats import Message, Sample
from flm_jax.sft.scoring import ResponseLoss
from flm_jax.sft.selection import Quota, SelectionConfig
from tests.commands import json_of, mistake

LOOSE = SelectionConfig(size=1000, near=2.0, worst_loss=0.0, max_ifd=9.0)


def sample(question, answer, category="c", name=""):
    return Sample((Message("user", question), Message("assistant", answer)), category, name)


def reasons_of(samples, config=LOOSE, **more):
    """Returns step -> the rows that it drops."""
    rows = collections.defaultdict(list)
    for dropped in selection.select(samples, config, **more).dropped:
        rows[dropped.step].append(dropped.row)
    return dict(rows)


KEPT = sample("How do plants eat?", "They make sugar out of light, water and air.")


def test_length_and_language():
    only_asked = Sample((Message("user", "hello"),))
    samples = [KEPT, sample("why?", "  "), sample("why?", "x" * 300), only_asked]
    assert reasons_of(samples, dataclasses.replace(LOOSE, max_bytes=200)) == {"length": [1, 2, 3]}
    samples = [KEPT, sample("почему", "потому что"), sample("2 + 2", "4"), sample("为什么", "因为")]
    assert reasons_of(samples) == {}
    latin = dataclasses.replace(LOOSE, scripts=("LATIN",))
    assert reasons_of(samples, latin) == {"language": [1, 3]}
    both = dataclasses.replace(LOOSE, scripts=("LATIN", "CJK"))
    assert reasons_of(samples, both) == {"language": [1]}


def test_duplicates_keep_the_first():
    other = sample("how  do plants EAT?", "They make sugar out of light, water and air.")
    near = sample("How do plants eat?", "They make sugar out of light, water and the air.")
    same_words = sample("How do plants eat?", "Air and water, light of out sugar make they.")
    samples = [KEPT, other, near, same_words]
    assert reasons_of(samples) == {"duplicate": [1]}
    strict = dataclasses.replace(LOOSE, near=0.7)
    assert reasons_of(samples, strict) == {"duplicate": [1], "near_duplicate": [2]}
    # Negative control: in another order, another sample is the first.
    assert reasons_of(samples[::-1], strict) == {"duplicate": [3], "near_duplicate": [2]}


def test_near_duplicates_against_all_pairs():
    """MinHash finds candidates and exact similarity decides: no wrong drop, few missed ones."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(200)]
    samples = []
    for _ in range(40):
        text = list(rng.choice(words, 60))
        samples.append(sample(" ".join(text), "yes"))
        for n in range(1, 4):  # copies with n words changed
            changed = [*text]
            for place in rng.choice(60, n, replace=False):
                changed[place] = "changed"
            samples.append(sample(" ".join(changed), "yes"))
    config = dataclasses.replace(LOOSE, near=0.75)
    dropped = set(reasons_of(samples, config)["near_duplicate"])
    pieces = [
        selection.word_ngrams(selection.words_of(m.content for m in s.messages), config.shingle)
        for s in samples
    ]
    kept, expected = [], set()
    for row, mine in enumerate(pieces):
        if any(len(mine & pieces[k]) / len(mine | pieces[k]) >= 0.75 for k in kept):
            expected.add(row)
        else:
            kept.append(row)
    assert 40 < len(expected) < 120
    assert len(dropped ^ expected) <= 0.05 * len(expected)


def test_contamination():
    evaluation = [
        sample("Which rivers flow through the old city of Basel?", "the Rhine", "", "e/1")
    ]
    leaked = sample(
        "Tell me: which rivers flow through the old city of Basel, please?", "the Rhine"
    )
    in_answer = sample("A question.", "which rivers flow through the old city of Basel?")
    harmless = sample("Which rivers flow through the old town of Bern?", "the Aare")
    samples = [KEPT, leaked, in_answer, harmless]
    assert reasons_of(samples, evaluation=evaluation) == {"contamination": [1, 2]}
    assert reasons_of(samples) == {}
    report = selection.select(samples, LOOSE, evaluation).report
    assert "evaluation sample e/1" in report["dropped"][0]["reason"]
    # A question with fewer words than n is compared as a whole.
    short = [sample("Add 2 and 3.", "5", "", "e/2"), Sample((Message("assistant", "x"),))]
    samples = [KEPT, sample("Add 2 and 3.", "5"), sample("Add 2 and 4.", "6")]
    assert reasons_of(samples, evaluation=short) == {"contamination": [1]}


def test_synthetic_sets_do_not_contaminate_each_other():
    samples = synthetic.make(0, 40, categories=["arithmetic_steps", "lists", "code", "strings"])
    held_out = synthetic.make(0, 40, "evaluation", ["arithmetic_steps", "lists", "code", "strings"])
    contaminated = reasons_of(samples, evaluation=held_out).get("contamination", [])
    assert len(contaminated) <= 0.03 * len(samples)
    # Negative control: a set contaminates itself.
    with pytest.raises(UserError, match="nothing is left of 160 samples: 160 by contamination"):
        selection.select(held_out, LOOSE, held_out)


def test_answers_that_fail_their_own_check_are_dropped():
    samples = synthetic.make(0, 4)
    pile = synthetic.spoil(samples, 0, 0.5)
    dropped = selection.select(pile, LOOSE).dropped
    failed = {d.id for d in dropped if d.step == "check"}
    assert failed and all(name.partition("#")[2] in ("wrong", "cut", "noise") for name in failed)
    wrong = {
        s.id
        for s in pile
        if s.check
        and s.id.partition("#")[2] in ("wrong", "noise")
        and not scoring.check_answer(s.check, s.messages[-1].content)[0]
    }
    assert len(wrong) >= 20 and wrong <= {d.id for d in dropped}
    # Negative control: without the step they are kept.
    lenient = selection.select(pile, dataclasses.replace(LOOSE, verify=False)).chosen
    assert wrong & {s.id for s in lenient}


def losses_of(values):
    """Returns a loss function that looks up the answer's text."""
    return lambda samples: [ResponseLoss(values[s.messages[-1].content], 1, 1) for s in samples]


def test_quality_drops_and_ranks():
    samples = [sample(f"question {i}", f"answer {i}") for i in range(10)]
    given = {f"answer {i}": 1.0 + i for i in range(10)}
    alone = {f"answer {i}": 12.0 if i != 4 else 4.0 for i in range(10)}
    quality = {"losses": losses_of(given), "unprompted": losses_of(alone)}
    config = dataclasses.replace(LOOSE, worst_loss=0.2, max_ifd=1.0, clusters=1)
    # Drops the two highest losses, and the sample whose question makes its answer less likely.
    assert reasons_of(samples, config, **quality) == {"quality": [4, 8, 9]}
    three = dataclasses.replace(config, size=3)
    hardest = selection.select(samples, three, **quality).chosen
    assert [s.messages[-1].content for s in hardest] == ["answer 5", "answer 6", "answer 7"]
    easiest = selection.select(samples, dataclasses.replace(three, rank="loss"), **quality).chosen
    assert [s.messages[-1].content for s in easiest] == ["answer 0", "answer 1", "answer 2"]


def test_quotas_and_clusters():
    samples = [sample(f"{c} {i}", f"{i}", c) for c in ("a", "b") for i in range(30)]
    spread = {row: np.eye(3)[row % 3] for row in range(60)}

    def embed(group):
        return np.stack([spread[samples.index(s)] for s in group])

    quotas = (Quota("a", 0.25), Quota("b", 0.75))
    config = dataclasses.replace(LOOSE, size=12, clusters=3, quotas=quotas)
    chosen = selection.select(samples, config, embed=embed).chosen
    assert collections.Counter(s.category for s in chosen) == {"a": 3, "b": 9}
    # Each cluster gives the same number of samples.
    places = collections.Counter((s.category, samples.index(s) % 3) for s in chosen)
    assert places == {("a", k): 1 for k in range(3)} | {("b", k): 3 for k in range(3)}
    # Without quotas the pool's shares hold; a category that is too small gives all it has.
    chosen = selection.select(samples, dataclasses.replace(config, quotas=()), embed=embed).chosen
    assert collections.Counter(s.category for s in chosen) == {"a": 6, "b": 6}
    greedy = dataclasses.replace(config, size=50, quotas=(Quota("a", 1.0), Quota("b", 0.0)))
    assert len(selection.select(samples, greedy, embed=embed).chosen) == 30
    with pytest.raises(UserError, match="category 'z', but the pool has 'a', 'b'"):
        selection.select(samples, dataclasses.replace(config, quotas=(Quota("z", 1.0),)))


def test_the_same_seed_gives_the_same_set():
    pile = synthetic.spoil(synthetic.make(0, 30), 0, 0.2)
    config = SelectionConfig(size=60, scripts=("LATIN",))
    one, two = (selection.select(pile, config) for _ in range(2))
    assert one.report == two.report and one.digest == chats.fingerprint(one.chosen)
    assert selection.select(pile, dataclasses.replace(config, seed=1)).digest != one.digest
    # Every sample is either chosen or dropped for a reason.
    assert len(one.chosen) == 60 and len(one.chosen) + len(one.dropped) == len(pile)
    assert sorted(one.report["dropped_by_step"].items()) == sorted(
        {
            **dict.fromkeys(one.report["dropped_by_step"], 0),
            **collections.Counter(d.step for d in one.dropped),
        }.items()
    )
    assert all(d.reason for d in one.dropped)
    defects = {d.id.partition("#")[2] for d in one.dropped if d.step == "duplicate"}
    assert "duplicate" in defects
    assert not [s for s in one.chosen if s.id.endswith("#noise")]


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"SelectionConfig\.size is 0; it must be 1 or more"):
        SelectionConfig(size=0)
    with pytest.raises(
        UserError, match=r"SelectionConfig\.rank is 'best'; choose one of ifd, loss, none"
    ):
        SelectionConfig(size=1, rank="best")
    with pytest.raises(UserError, match=r"quotas has shares \[1\.0, 0\.5\], together 1\.5"):
        SelectionConfig(size=1, quotas=(Quota("a", 1.0), Quota("b", 0.5)))
    with pytest.raises(UserError, match="nothing is left of 1 samples: 1 by length"):
        selection.select([KEPT], dataclasses.replace(LOOSE, max_bytes=3))
    with pytest.raises(UserError, match="nothing is left of 0 samples: the pool is empty"):
        selection.select([], LOOSE)


@pytest.mark.slow
def test_command(tmp_path):
    path, output = tmp_path / "pile.jsonl", tmp_path / "chosen.jsonl"
    chats.write_jsonl(path, synthetic.spoil(synthetic.make(0, 10), 0, 0.2))
    flags = ("samples", "select", f"--pool={path}", f"--output={output}")
    result = json_of(*flags, "--size=20", "--quota=lists:0.5", "--quota=strings:0.5")
    chosen = chats.read([str(output)])
    assert chats.fingerprint(chosen) == result["digest"]
    assert {s.category for s in chosen} == {"lists", "strings"}
    report = json.loads((tmp_path / "chosen.jsonl.report.json").read_text())
    assert report["digest"] == result["digest"]
    assert "| duplicate |" in (tmp_path / "chosen.jsonl.report.md").read_text()
    assert "nothing is left" in mistake(*flags, "--size=20", "--max_bytes=1")
    assert "--quota=lists: write CATEGORY:SHARE" in mistake(*flags, "--size=2", "--quota=lists")
    path.write_text('{"messages": []}\nnonsense\n')
    assert "pile.jsonl, line 2: " in mistake(*flags, "--size=2")
