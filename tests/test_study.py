"""The study of growth: histories, corpus, results, locks, and a tiny study from end to end."""

import dataclasses
import json
import signal
import time

import numpy as np
import pytest

from flm_jax import mapping
from flm_jax.commands import config_files
from flm_jax.errors import UserError
from flm_jax.studies.growth_study import corpus, environment, phases, results
from flm_jax.studies.growth_study.config import CorpusConfig, GrowthStudyConfig
from flm_jax.studies.growth_study.corpus import Corpus, Document
from flm_jax.studies.growth_study.histories import History, Lab, Leg, closure, parent
from flm_jax.studies.growth_study.store import Pieces, StudyFolder
from flm_jax.studies.growth_study.training import rate_at
from tests.commands import json_of, mistake, run, start, wait_for


def config_of(variant):
    found = config_files.load_config(
        f"configs/study.py:{variant}" if variant else "configs/study.py"
    )
    return config_files.dataclass_of(GrowthStudyConfig, found)


@pytest.fixture(scope="module")
def tiny():
    return Lab(config_of("tiny"), "corpus")


def test_a_history_extends_its_trunk_only():
    trunk = History((Leg("T", 100, 1.0),), 0, 0.95)
    half = History((Leg("T", 50, 1.0),), 0, 0.95)
    decay = History((Leg("T", 100, 1.0), Leg("T", 20, 1.0, decay=True)), 0, 0.95)
    assert trunk.extends(half) and decay.extends(trunk)
    assert not half.extends(trunk) and not decay.extends(half) and not trunk.extends(trunk)
    assert not trunk.extends(dataclasses.replace(half, seed=1))
    assert not trunk.extends(History((Leg("T", 50, 2.0),), 0, 0.95))
    other = History((Leg("T", 100, 1.0), Leg("T", 10, 1.0, decay=True)), 0, 0.95)
    assert not decay.extends(other)  # a decay's rate depends on its length
    nodes = closure([decay, half])
    assert nodes == [half, trunk, decay] and parent(decay, nodes) == trunk
    assert parent(trunk, nodes) == half and parent(half, nodes) is None


@pytest.mark.parametrize("variant", ["", "small", "tiny"])
def test_every_trial_costs_its_budget_and_nothing_is_trained_twice(variant):
    lab = Lab(config_of(variant), "corpus")
    config = lab.config
    budget = config.budget or 36e12
    rates = {m.name: 1.0 for m in config.models}
    arm_rates = {a.name: (1.0,) * len(a.chain) for a in config.arms}
    frozen = phases.Frozen(budget, rates, arm_rates, config.arms[0].name, 0.0, (), "")
    trials = [*phases.arm_trials(lab, frozen), *phases.ablation_trials(lab, frozen)]
    for trial in trials:
        # Every leg is whole calls, and a growth adds its forward pass on a few sequences.
        steps = [leg.steps * lab.flops_per_step(leg.model) for leg in trial.history.legs]
        half = [
            config.steps_per_call * lab.flops_per_step(leg.model) / 2 for leg in trial.history.legs
        ]
        assert abs(sum(steps) - trial.flops) <= sum(half)
        assert 0 <= lab.flops(trial.history) - sum(steps) < 0.01 * trial.flops
    cost = phases.cost(lab, [t.history for t in trials])
    assert cost < 0.85 * sum(lab.flops(t.history) for t in trials)
    # Every node costs what it adds to the node that it starts from.
    nodes = closure(t.history for t in trials)
    assert len({lab.identity(n) for n in nodes}) == len(nodes)
    for node in nodes:
        assert node.before is None or node.before in nodes


def test_the_learning_rate_rises_stays_and_falls_to_zero(tiny):
    config = tiny.config
    history = tiny.grown(config.arms[0], 0, (1.0, 2.0), config.budget)
    source, grown = (dataclasses.replace(history, legs=history.legs[:n]) for n in (1, 2))
    rates = [rate_at(config, source, n) for n in range(source.last.steps)]
    assert rates[0] == 1 / config.warmup_steps and set(rates[config.warmup_steps :]) == {1.0}
    assert rate_at(config, grown, 0) == 2.0 * grown.last.growth.rewarmup_ratio
    decay = [rate_at(config, history, n) for n in range(history.last.steps)]
    assert np.allclose(np.diff(decay), -2.0 / history.last.steps) and 0 < decay[-1] < 2.0 / 10


def test_budgets_that_the_corpus_cannot_feed_are_refused(tiny):
    with pytest.raises(UserError, match=r"S at gate budget .* the corpus has 1000 for training"):
        phases.check_corpus(tiny, 1000, None)
    phases.check_corpus(tiny, 10**9, tiny.config.budget)
    with pytest.raises(UserError, match="lower the budget to"):
        phases.check_corpus(tiny, 10**6, 100 * tiny.config.budget)


def document(name, lines, rng):
    words = ["".join(rng.choice(list("abcdefgh"), 30)) for _ in range(lines)]
    return Document("package", name, "\n".join(words).encode())


def test_near_duplicates_of_held_out_documents_are_left_out():
    rng = np.random.default_rng(0)
    documents = [document(f"{n}.py", 40, rng) for n in range(60)]
    _, validation, counts = corpus.split(documents, 8000)
    assert counts == {"duplicates": 0, "near_duplicates": 0}
    held = validation[0]
    more = document("x", 10, rng).text
    copy = Document("other", "copy.py", held.text)
    near = Document("other", "near.py", held.text + b"\n" + more)
    cut = Document("other", "cut.py", held.text[: len(held.text) // 2])
    train, validation, counts = corpus.split([*documents, copy, near, cut], 8000)
    texts = {d.text for d in train}
    for suspicious in (held, copy, near, cut):
        assert suspicious.text not in texts or suspicious.text in {d.text for d in validation}
    assert counts["duplicates"] == 1 and counts["near_duplicates"] >= 1
    assert not texts & {d.text for d in validation}
    with pytest.raises(UserError, match="validation_bytes"):
        corpus.split(documents[:2], 8000)


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(1)
    text = folder / "text"
    text.mkdir()
    for n in range(30):
        (text / f"{n}.txt").write_bytes(document("", int(rng.integers(3, 60)), rng).text)
    settings = CorpusConfig(stdlib=False, path=str(text), validation_bytes=3000)
    corpus.build(settings, folder / "corpus")
    return Corpus(folder / "corpus", 64)


def test_one_pass_reads_every_window_once_and_any_position_is_reached_at_once(small_corpus):
    total = small_corpus.windows // 4
    whole = small_corpus.batches(3, 0, total, 4)
    rows = whole["targets"].reshape(-1, 64)
    assert len({row.tobytes() for row in rows}) == len(rows) == 4 * total
    later = small_corpus.batches(3, total - 2, 2, 4)
    for name, x in later.items():
        assert np.array_equal(x, whole[name][-2:])
    assert not np.array_equal(small_corpus.batches(4, 0, 1, 4)["targets"], whole["targets"][:1])
    with pytest.raises(UserError, match="lower the budget"):
        small_corpus.batches(3, total, 2, 4)
    validation = small_corpus.validation(4)
    assert (
        sum(int(b["weights"].sum()) for bs in validation.values() for b in bs)
        == (small_corpus.manifest["validation"]["tokens"])
    )


def test_a_changed_study_and_a_changed_machine_are_refused(tmp_path, tiny, monkeypatch):
    folder = StudyFolder(tmp_path)
    folder.begin(tiny.config, "one")
    folder.begin(dataclasses.replace(tiny.config, seeds=4), "one")  # more seeds may follow
    with pytest.raises(UserError, match="corpus: 'one' -> 'two'"):
        folder.begin(tiny.config, "two")
    with pytest.raises(UserError, match=r"config\.batch_size: 4 -> 8"):
        folder.begin(dataclasses.replace(tiny.config, batch_size=8), "one")
    here = environment.environment()
    monkeypatch.setattr(environment, "environment", lambda: {**here, "machine": "another"})
    with pytest.raises(UserError, match=r"environment\.machine.*--other_machine"):
        folder.begin(tiny.config, "one")
    folder.begin(tiny.config, "one", other_machine=True)
    assert len(folder.read()["environments"]) == 2
    monkeypatch.setattr(environment, "environment", lambda: {**here, "jax": "0.1"})
    with pytest.raises(UserError, match=r"environment\.jax"):
        folder.begin(tiny.config, "one", other_machine=True)


def test_torn_and_foreign_results_and_held_locks(tmp_path, tiny):
    pieces = Pieces(StudyFolder(tmp_path), tiny, (environment.environment(),))
    history = tiny.fixed("S", 0, 1.0, 1e9)
    assert pieces.result(history) is None
    pieces.write(history, {"bpb": 1.5})
    path = pieces.path(history) / "result.json"
    assert pieces.result(history)["bpb"] == 1.5
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    assert pieces.result(history) is None  # torn: it is trained again
    for name in ("corpus", "id", "environment"):
        path.write_text(json.dumps({**json.loads(text), name: "another"}))
        with pytest.raises(UserError, match="another"):
            pieces.result(history)
    with pieces.lock(history) as mine, pieces.lock(history) as other:
        assert mine and not other
    with pieces.lock(history) as again:
        assert again  # the file that a process left behind locks nothing


def test_the_config_is_checked_and_read_back():
    config = config_of("tiny")
    assert mapping.from_mapping(GrowthStudyConfig, mapping.to_dict(config)) == config
    arm = config.arms[0]
    for change, message in (
        ({"arms": (dataclasses.replace(arm, shares=(0.9,)),)}, "inside the decay"),
        ({"arms": (dataclasses.replace(arm, candidate=False),)}, "no candidate"),
        ({"multiples": (1.0, 2.0)}, "interpolated"),
        ({"gate_budgets": (), "budget": 0.0}, "give a budget"),
        ({"target": "X"}, "target"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, **change)
    with pytest.raises(UserError, match="one share for each growth"):
        dataclasses.replace(arm, shares=(0.1, 0.5))


def test_mistakes_on_the_command_line(tmp_path):
    tiny_config = "--config=configs/study.py:tiny"
    assert "--workdir is missing" in mistake("study", tiny_config)
    assert "has no study.json" in mistake("study", f"--workdir={tmp_path}", "--list")
    for workdir, words in (("gs://bucket/study", "read from a disk"), ("nfs://x", "no client")):
        assert words in mistake("study", tiny_config, f"--workdir={workdir}", "--processes=0")
    assert "--docs" in mistake("study", "--report", f"--docs={tmp_path}")
    assert "no-such" in mistake(
        "study", tiny_config, f"--workdir={tmp_path}/new", "--processes=0",
        "--config.corpus.packages=('no-such',)",
    )  # fmt: skip
    assert not (tmp_path / "new").exists()
    missing = f"--plans={tmp_path}/none.json"
    assert json_of("plan", "--target=5e5", "--budget=1e13", missing)["answer"] == "not tested"
    assert "--budget" in mistake("plan", "--target=5e5", "--budget=much", missing)


@pytest.mark.slow
def test_windows_have_the_features_of_the_data_pipeline(small_corpus):
    """The oracle is flm_jax.data's own packing, on the same windows."""
    import tensorflow as tf

    from flm_jax.config import DataConfig
    from flm_jax.data.pipeline import open_corpus

    ours = {k: v.reshape(-1, 64) for k, v in small_corpus.batches(0, 0, 5, 4).items()}
    windows = {
        "targets": tf.constant(ours["targets"]),
        "positions": tf.constant(ours["positions"]),
    }
    theirs = open_corpus(DataConfig()).features(windows)
    for name, x in ours.items():
        assert np.array_equal(x, theirs[name].numpy()), name


@pytest.mark.slow
def test_a_tiny_study_from_gate_to_report(tmp_path):
    """Killed and stopped on its way, then finished, listed, repeated and reported."""
    args = ("study", "--config=configs/study.py:tiny", f"--workdir={tmp_path}/study")
    process = start(*args, "--processes=0")
    wait_for("study/pieces/*/result.json", tmp_path, process)
    process.kill()
    process.communicate()
    process = start(*args, "--processes=0", "--config.save_seconds=0.01")
    time.sleep(8)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    found = json_of(*args, "--processes=0", by=run)
    assert found["finished"] == found["known"] and found["left"] == 0
    digests = {p: p.read_text() for p in tmp_path.glob("study/pieces/*/result.json")}
    assert json_of(*args, "--list", by=run)["left"] == 0
    # One trial again, from scratch: the same parameters.
    victim = max(digests, key=lambda p: json.loads(digests[p])["end"])
    old = json.loads(digests[victim])
    for path in sorted(victim.parent.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert json_of(*args, "--processes=0", by=run)["left"] == 0  # one core has other bits than two
    new = json.loads(victim.read_text())
    assert new["params_digest"] == old["params_digest"] and new["bpb"] == old["bpb"]
    # The report, and the same report from the raw results alone.
    docs = f"--docs={tmp_path}/docs"
    (study,) = json_of("study", f"--workdir={tmp_path}/study", "--report", docs, by=run)["studies"]
    assert {a["arm"] for a in study["arms"]} == {"msg-50"} and study["verdict"] != "not reached"
    files = {p.name: p.read_bytes() for p in (tmp_path / "docs").iterdir() if p.is_file()}
    assert {"tiny.md", "tiny.csv", "tiny_decayed.svg", "tiny_decayed.png", "plans.json"} <= set(
        files
    )
    for path in (tmp_path / "docs").iterdir():
        if path.is_file():
            path.unlink()
    json_of("study", "--report", docs, by=run)
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "docs").iterdir() if p.is_file()}
    raw = results.read(tmp_path / "docs/results/tiny.jsonl")
    assert not raw.missing and not raw.diverged
    grown = [p for p in raw.pieces.values() if p["growth"]]
    for piece in grown:
        assert piece["growth"]["bpb_after"] == pytest.approx(
            piece["growth"]["bpb_before"], abs=1e-4
        )
    found = json_of("plan", "--target=1e6", "--budget=1e9", f"--plans={tmp_path}/docs/plans.json")
    assert found["answer"] == "not tested" and found["study"] == "tiny"
