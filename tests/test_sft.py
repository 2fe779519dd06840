"""Fine-tuning: templates, conversations, packing, the stage, claims, the commands."""

import dataclasses
import json
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.commands import config_files
from flm_jax.config import DataConfig, EvalConfig
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError
from flm_jax.interop import opening
from flm_jax.mapping import from_mapping
from flm_jax.params.digest import params_digest
from flm_jax.sft import chats, fine_tune, packing, synthetic, template
from flm_jax.sft.chats import Message, Sample
from flm_jax.sft.config import SftConfig, TemplateConfig
from flm_jax.sft.selection import Quota, SelectionConfig
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.lineage import RunFolder
from flm_jax.studies import claims, less_is_more
from flm_jax.studies.config import ArmConfig, MupStudyConfig, ProbeConfig
from flm_jax.train import train_step
from tests.commands import json_of, mistake, run, start, wait_for
from tests.models import SMALL, changed, gradients, random_params
from tests.runs import lineage

BYTES = open_tokenizer("bytes")


def talk(*turns, **fields):
    """Returns a sample of user and assistant turns."""
    roles = ("user", "assistant")
    return Sample(tuple(Message(roles[n % 2], t) for n, t in enumerate(turns)), **fields)


def random_samples(count, seed=0, longest=12):
    rng = random.Random(seed)

    def text():
        return "".join(rng.choice("abcd e") for _ in range(rng.randrange(1, longest)))

    return [talk(*(text() for _ in range(2 * rng.randrange(1, 4)))) for _ in range(count)]


def encoded(samples):
    return [template.encode(s.messages, BYTES, template.TELE_FLM) for s in samples]


# Templates.


def test_tele_flm_format():
    messages = (Message("system", "be short"), *talk(" 1+1? \n", " 2", "and 2+2?").messages)
    assert template.prompt(messages) == "<_user>1+1?<_bot> 2<_user>and 2+2?<_bot>"
    assert template.prompt(messages, template.GENERIC) == (
        "### System:\nbe short\n\n### User:\n1+1?\n\n### Assistant:\n 2"
        "### User:\nand 2+2?\n\n### Assistant:\n"
    )


@pytest.mark.parametrize(
    "config",
    [
        template.TELE_FLM,
        template.GENERIC,
        TemplateConfig("<s>{text}", "<u>{text}</u>", "<a>{text}</a>", strip=False),
    ],
)
def test_answers_and_end_tokens_are_learned_and_nothing_else(config):
    _, _, after = config.assistant.partition("{text}")
    for sample in random_samples(30):
        got = template.encode(sample.messages, BYTES, config)
        learned = [t for t, yes in zip(got.tokens, got.learned, strict=True) if yes]
        answers = [m.content + after for m in sample.messages if m.role == "assistant"]
        assert learned == [t for a in answers for t in (*BYTES.encode(a), 1)]
        # The prompt of generation is the text before the answer in training.
        prompt = template.encode_prompt(sample.messages[:-1], BYTES, config)
        assert got.tokens == (*prompt, *BYTES.encode(answers[-1]), 1)


def test_a_template_without_a_place_for_the_text_is_refused():
    with pytest.raises(UserError, match=r"TemplateConfig.user is '<_user>'.*\{text\}"):
        TemplateConfig(user="<_user>")


# Conversations.


def test_jsonl_is_read_as_written(tmp_path):
    samples = [
        talk("a", "b", category="x", id="1", check=chats.Check("exact", "b")),
        talk("ü\n", "\u2028c"),
    ]
    chats.write_jsonl(tmp_path / "a.jsonl", samples)
    row = {"instruction": "Add", "input": "1 2", "response": "3", "system": "s"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n\n")
    loaded = chats.read([str(tmp_path)])
    assert loaded[:2] == samples
    roles = [(m.role, m.content) for m in loaded[2].messages]
    assert roles == [("system", "s"), ("user", "Add\n1 2"), ("assistant", "3")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "an object over several lines"),
        ("[1]", "not a JSON object"),
        ("{}", "neither messages, nor instruction and response"),
        ('{"messages": {}}', "list of objects"),
        ('{"messages": [{"role": "bot", "content": ""}]}', "role is 'bot'"),
        ('{"messages": [{"role": "user"}]}', "content is None"),
        ('{"instruction": "x", "response": 3}', "response is 3"),
        ('{"messages": [], "check": "x"}', "check must be"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, words):
    path = tmp_path / "pool.jsonl"
    path.write_text('{"instruction": "x", "response": "y"}\n' + line + "\n")
    with pytest.raises(UserError, match=words) as caught:
        chats.read([str(path)])
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_bytes_that_are_not_text_are_named(tmp_path):
    (tmp_path / "pool.jsonl").write_bytes(b'{"instruction": "\xe9"}\n')
    with pytest.raises(UserError, match=r"pool.jsonl, line 1: .*utf-8"):
        chats.read([str(tmp_path)])
    with pytest.raises(UserError, match="nowhere"):
        chats.read([str(tmp_path / "nowhere")])


def test_the_split_follows_content_alone():
    samples = random_samples(300)
    kept, held = chats.split(samples, 0.2)
    assert len(kept) + len(held) == 300 and 30 < len(held) < 90
    renamed = [dataclasses.replace(s, id="new", category="new") for s in samples]
    again, _ = chats.split([*random_samples(100, seed=1), *renamed], 0.2)
    assert {chats.content_hash(s) for s in kept} <= {chats.content_hash(s) for s in again}
    kept, held = chats.split(samples[:3], 1e-9)  # at least one is held out
    assert len(kept) == 2 and len(held) == 1


def test_conversations_that_are_too_long_are_counted():
    samples = [
        Sample((Message("user", "only"),)),
        talk("q", "a"),
        talk("q", "a" * 100),
        talk("q" * 100, "a"),
    ]
    settings = (BYTES, template.TELE_FLM, 40)
    kept, counts = packing.encode_all(samples, *settings, "drop")
    assert len(kept) == counts.used == 1 and counts.no_assistant == 1 and counts.dropped == 2
    kept, counts = packing.encode_all(samples, *settings, "truncate")
    assert [len(c.tokens) for c in kept] == [len("<_user>q<_bot>a") + 1, 40]
    assert (counts.truncated, counts.cut_to_nothing, counts.used) == (1, 1, 2)
    assert "1 truncated" in str(counts) and "1 without an assistant turn" in str(counts)
    with pytest.raises(UserError, match=r"no conversation is left.*2 dropped as too long"):
        packing.encode_all(samples[2:], *settings, "drop")


# Packing.


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_loses_nothing_and_overfills_nothing(seed):
    lengths = np.random.default_rng(seed).integers(1, 30, 700)
    rows = packing.first_fit(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(700))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 32 and np.mean(filled) > 0.85 * 32


CONFIG = changed(SMALL, vocab_size=260)
LENGTH = 64


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@jax.jit
def nats_of(params, batch):
    return train_step.summed_loss(params, batch, CONFIG)[0]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def packed_and_alone():
    """Returns eight conversations twice, in batches of one shape: packed, and one in each row."""
    conversations = encoded(random_samples(8, longest=6))
    (packed,) = packing.in_order(conversations, LENGTH, 8, 0)
    alone = packing.features([[c] for c in conversations], LENGTH, (0,))
    assert (packed["segment_ids"].max(1) > 1).any()
    assert packed["weights"].sum() == alone["weights"].sum() > 0
    return packed, alone


def test_packing_changes_no_loss(params):
    packed, alone = packed_and_alone()
    assert abs(nats_of(params, packed) / nats_of(params, alone) - 1) < 1e-10
    merged = packed | {"segment_ids": np.minimum(packed["segment_ids"], 1)}
    assert abs(nats_of(params, merged) / nats_of(params, alone) - 1) > 1e-4  # negative control
    shifted = packed | {
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (8, LENGTH))
    }
    # Only relative positions matter, so this is not a negative control.
    assert abs(nats_of(params, shifted) / nats_of(params, alone) - 1) < 1e-10


def test_masked_tokens_receive_no_gradient(params):
    packed, _ = packed_and_alone()
    other = np.random.default_rng(0).integers(0, 260, packed["targets"].shape).astype(np.int32)
    unlearned = packed | {"targets": np.where(packed["weights"] > 0, packed["targets"], other)}
    everything = {"weights": np.ones_like(packed["weights"])}

    def of(batch):
        return gradients(params, {k: jnp.asarray(v) for k, v in batch.items()}, CONFIG, None, 1)

    for a, b in zip(jax.tree.leaves(of(packed)), jax.tree.leaves(of(unlearned)), strict=True):
        assert (a == b).all()
    controls = of(packed | everything), of(unlearned | everything)
    assert float(controls[0][0]) != float(controls[1][0])


def batches(seed=0, batch_size=4, fingerprint="f"):
    return packing.ChatBatches(encoded(random_samples(40)), 160, batch_size, seed, fingerprint, 0)


def test_an_epoch_has_every_conversation_once():
    stream = batches(batch_size=1)
    rows = len(stream.rows)
    epochs = [[next(stream)["targets"][0].tobytes() for _ in range(rows)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(epochs[0])) == rows
    packed = sorted(c.tokens for row in stream.rows for c in row)
    assert packed == sorted(c.tokens for c in encoded(random_samples(40)))
    other = batches(seed=1, batch_size=1)
    assert [next(other)["targets"][0].tobytes() for _ in range(rows)] != epochs[0]


def test_batches_resume_exactly():
    stream = batches()
    for _ in range(17):  # more than an epoch
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    again = batches()
    again.set_state(state)
    halves = batches(batch_size=2)
    halves.set_state(state)
    for _ in range(9):
        batch = next(stream)
        one, two = next(halves), next(halves)
        for name, x in next(again).items():
            assert (x == batch[name]).all()
            assert (np.concatenate([one[name], two[name]]) == x).all()
    for field, other in (("seed", batches(seed=1)), ("fingerprint", batches(fingerprint="g"))):
        with pytest.raises(UserError, match=rf"^{field} of the saved data state is "):
            other.set_state(state)


def test_processes_share_a_batch():
    conversations = encoded(random_samples(40))
    whole = batches()
    parts = [packing.ChatBatches(conversations, 160, 4, 0, "f", 0, i, 2) for i in range(2)]
    for _ in range(5):
        got = np.concatenate([next(part)["tokens"] for part in parts])
        assert (got == next(whole)["tokens"]).all()


# The stage.


def test_the_best_checkpoint_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    state = {"w": jnp.zeros(3)}
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.0, None, 4.0], start=1):
        checkpoints.save(step, state, {}, loss)
        checkpoints.wait()
    assert checkpoints.best == 4 and checkpoints.latest == 6
    checkpoints.close()
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {"4", "6"}
    again = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert again.best == 4
    again.close()


GRID = less_is_more.LessIsMoreConfig(
    sft=SftConfig(base="x", made=1, steps=1),
    sizes=(1, 2),
    mixes=(less_is_more.MixConfig("even"),),
    selection=SelectionConfig(size=1),
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TemplateConfig(user=3), "TemplateConfig.user is 3 of type int; it must be str"),
        (
            lambda: SftConfig(base="x", made="4"),
            "SftConfig.made is '4' of type str; it must be int",
        ),
        (
            lambda: SftConfig(base="x", paths="a.jsonl"),
            "SftConfig.paths is 'a.jsonl' of type str; it must be",
        ),
        (lambda: Quota("lists", "half"), "Quota.share is 'half' of type str; it must be float"),
        (lambda: SelectionConfig(size=1.5), "SelectionConfig.size is 1.5 of type float; it must"),
        (lambda: ArmConfig(7), "ArmConfig.name is 7 of type int; it must be str"),
        (
            lambda: ProbeConfig({"stages": 1}, (ArmConfig("a"),)),
            "ProbeConfig.experiment.stages is 1 of type int; it must be a list or tuple",
        ),
        (
            lambda: MupStudyConfig("mup_study"),
            "MupStudyConfig.experiment is of type str; it must be a ExperimentConfig, or a group",
        ),
        (
            lambda: less_is_more.MixConfig("even", more="lists"),
            "MixConfig.more is 'lists' of type str; it must be a list or tuple of str",
        ),
        (
            lambda: dataclasses.replace(GRID, sizes=(8, "16")),
            "LessIsMoreConfig.sizes[1] is '16' of type str; it must be int",
        ),
    ],
)
def test_a_config_value_of_a_wrong_type_is_named(make, message):
    with pytest.raises(UserError, match="^" + re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_configs_accept_what_config_files_give():
    """Lists become tuples, mappings become configs, and numpy's numbers become Python's."""
    config = SftConfig(base="x", paths=["a"], batch_size=np.int64(4), data={"seed": 2})
    assert config == SftConfig(base="x", paths=("a",), batch_size=4, data=DataConfig(seed=2))
    assert type(config.batch_size) is int


def test_configs_that_cannot_work_are_refused():
    for values, words in [
        ({}, "give conversations"),
        ({"made": 1, "overlong": "keep"}, "drop, truncate"),
        ({"made": 1, "held_out": 1.0}, "held_out is 1.0"),
        ({"made": 1, "final_learning_rate": 1.0}, "final_learning_rate is 1.0"),
        ({"made": 1, "epochs": 0}, "epochs is 0"),
    ]:
        with pytest.raises(UserError, match=words):
            SftConfig(base="x", **values)
    for values, words in [({"mixes": ()}, "mixes is empty"), ({"seeds": 0}, "seeds is 0")]:
        with pytest.raises(UserError, match=words):
            dataclasses.replace(GRID, **values)
    with pytest.raises(UserError, match="make demo"):
        fine_tune.open_base(SftConfig(base="runs/nowhere", made=1))


# Claims.


def verdict(gains, metric="loss"):
    """Decides a claim whose better side is better by `gains`, one for each seed."""
    sign = -1 if metric == "loss" else 1
    config = config_files.dataclass_of(
        less_is_more.LessIsMoreConfig, config_files.shipped("less_is_more").get_config()
    )
    rows = claims.Rows(
        config,
        [
            {
                "name": f"{size}-{seed}",
                "size": size,
                "selection": "random",
                "mix": "even",
                "budget": "steps",
                "seed": seed,
                "scores": {"a": {metric: 3 + seed + ahead * sign * gain}},
            }
            for size, ahead in ((8, 0), (16, 1))
            for seed, gain in enumerate(gains)
        ],
    )
    worse, better = (claims.Side((size, "random", "even", "steps"), ("a",)) for size in (8, 16))
    return claims.decide(claims.Claim("it helps", better, worse, metric), rows)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_claims_are_decided_by_the_interval_over_seeds(metric):
    assert verdict([0.1, 0.11, 0.12], metric).word == "supported"
    assert verdict([-0.1, -0.11, -0.12], metric).word == "not supported"
    assert verdict([-0.1, 0.2, 0.1], metric).word == "undecided"
    assert verdict([0.1], metric).word == "undecided"  # one seed decides nothing
    assert verdict([], metric) is None
    decided = verdict([0.1, 0.2, 0.3], metric)
    # Student's t with 2 degrees of freedom: 4.303 standard errors.
    assert decided.high - decided.gain == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)


def test_claims_are_corrected_for_their_number():
    """0.1, 0.15, 0.2 is p = 0.037 alone; among three claims the smallest p counts three times."""

    def named(text, gains):
        found = verdict(gains)
        return dataclasses.replace(found, claim=dataclasses.replace(found.claim, text=text))

    alone = named("a", [0.1, 0.15, 0.2])
    assert alone.word == "supported" and alone.p == pytest.approx(0.0351, abs=1e-3)
    others = [named("b", [0.1, 0.2, -0.1]), named("c", [-0.3, 0.2, 0.1])]
    (first, *_) = claims.corrected([alone, *others])
    assert first.word == "undecided" and first.p == pytest.approx(3 * alone.p)
    assert claims.corrected([alone]) == [alone]


def test_the_grid_shares_the_largest_arms_and_runs_seed_by_seed():
    config = from_mapping(
        less_is_more.LessIsMoreConfig,
        config_files.plain(config_files.shipped("less_is_more").get_config()),
    )
    arms = less_is_more.arms_of(config)
    assert len({a.name for a in arms}) == len(arms) == 3 * (4 + 2 + 2)
    assert [a.seed for a in arms] == sorted(a.seed for a in arms)
    assert arms[0].selection == "random" and arms[0].size == 384
    for mix in config.mixes:
        shares = mix.shares(synthetic.CATEGORIES)
        assert sum(shares.values()) == pytest.approx(1)
        assert all(shares[c] == 0.5 for c in mix.more) and not set(mix.without) & set(shares)


# The commands, on a run of a few steps.

SFT = ("sft", "--config=configs/sft_demo.py:smoke")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run to fine-tune: the smoke chain's first stage."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    process = start("train", "--config=configs/demo.py:smoke", f"--workdir={workdir}")
    wait_for("lineage.json", workdir, process, timeout=400)
    process.kill()
    process.communicate()
    return workdir


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A fine-tuning without interruption: its folder, and the command's output."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    return workdir, json_of(*SFT, f"--config.base={base}", f"--workdir={workdir}", by=run)


@pytest.mark.slow
def test_the_stage_keeps_the_run_folders_contract(base, tuned):
    workdir, printed = tuned
    first, stage = lineage(workdir)
    assert first == lineage(base)[0]
    assert stage == printed["stage"]
    assert (stage["index"], stage["name"], stage["parent"]) == (1, "sft", "small")
    receipt = stage["receipt"]
    assert receipt["operator"] == "none" and receipt["exactness"] == "EXACT"
    assert receipt["max_abs_logit_diff"] == receipt["dead_slots"] == receipt["locked_copies"] == 0
    assert receipt["loss_before"] == receipt["loss_after"]
    assert stage["plan_digest"] and (workdir / "stages/1-sft/plan.json").is_file()
    assert stage["eval"]["response_loss_end"] < stage["eval"]["response_loss_start"]
    assert printed["retention"] == {
        "bpb_before": stage["eval"]["bpb_start"],
        "bpb_after": stage["eval"]["bpb_end"],
    }
    assert printed["before"].keys() == printed["after"].keys() > {"all", "arithmetic", "dialogue"}
    for scores in (printed["before"]["arithmetic"], printed["after"]["arithmetic"]):
        assert {"loss", "bpb", "accuracy", "accuracy_low", "accuracy_high"} <= scores.keys()
    assert printed["after"]["all"]["loss"] < printed["before"]["all"]["loss"]


@pytest.mark.slow
def test_the_best_checkpoint_is_the_stages_result(tuned):
    workdir, printed = tuned
    stage = printed["stage"]
    rows = RunFolder(workdir).stage(1, "sft").metrics.rows("eval")
    evals = {r["step"]: r["response_loss"] for r in rows}
    step = int(stage["checkpoint"].rsplit("/", 1)[1])
    start = min(evals)
    assert evals[step] == min(loss for s, loss in evals.items() if s > start)
    assert evals[step] == stage["eval"]["response_loss_end"]
    model = opening.open_model(str(workdir), "sft")
    assert params_digest(model.params) == stage["params_digest"]


@pytest.mark.slow
def test_a_killed_stage_resumes_bit_identically(base, tuned, tmp_path):
    workdir, printed = tuned
    again = tmp_path / "again"
    (again / "stages").mkdir(parents=True)
    shutil.copytree(workdir / "compiled", again / "compiled")
    args = (*SFT, f"--config.base={base}", f"--workdir={again}")
    process = start(*args)
    wait_for("stages/1-sft/checkpoints/48", again, process, timeout=400)
    process.kill()
    process.communicate()
    resumed = json_of(*args, by=run)
    for key in ("params_digest", "eval", "plan_digest", "checkpoint", "config_digest"):
        assert resumed["stage"][key] == printed["stage"][key], key
    assert resumed["before"] == printed["before"] and resumed["after"] == printed["after"]
    other = json_of(*args[:-1], f"--workdir={tmp_path / 'other'}", "--config.seed=1", by=run)
    assert other["stage"]["params_digest"] != printed["stage"]["params_digest"]  # negative control
    line = mistake(*args, "--config.matrix_learning_rate=1e-3", by=run)
    assert "matrix_learning_rate: 0.0005 -> 0.001" in line and "another workdir" in line
    assert "--workdir: " in line


@pytest.mark.slow
def test_mistakes_are_one_line_and_leave_nothing(base, tmp_path):
    new = tmp_path / "new"
    # The batch size is the number of devices.
    args = (*SFT, f"--config.base={base}", f"--workdir={new}", "--config.batch_size=8")
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "response": "b"}\n{"messages"\n')
    mute = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(30)]
    (tmp_path / "mute.jsonl").write_text("\n".join(map(json.dumps, mute)))
    for more, words in [
        ((f"--config.paths=('{tmp_path}/bad.jsonl',)",), ("bad.jsonl, line 2",)),
        (
            (f"--config.paths=('{tmp_path}/mute.jsonl',)", "--config.made=0"),
            ("no conversation is left", "without an assistant turn"),
        ),
        (("--config.sequence_length=8",), ("no conversation is left", "dropped as too long")),
        (("--config.base=runs/nowhere",), ("runs/nowhere", "make demo")),
        (("--config.base_stage=large",), ("no finished stage 'large'", "0 (small)")),
    ]:
        line = mistake(*args, *more)
        assert all(word in line for word in words), line
        assert not new.exists()


@pytest.mark.slow
def test_fine_tuning_inside_the_bases_run_and_from_a_checkpoint(base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    config = SftConfig(
        base=str(copy),
        made=2,
        steps=2,
        batch_size=8,
        sequence_length=256,
        quick_compile=True,
        eval=EvalConfig(sequences=8, batch_size=8, every_steps=2),
    )
    with jax.enable_x64(False):
        stage = fine_tune.run(config, str(copy)).stage
        assert lineage(copy) == [*lineage(base), stage]
        assert (
            fine_tune.run(config, str(copy)).stage == stage
        )  # it is complete, and not trained again
        other = dataclasses.replace(config, name="other", base_stage="small")
        with pytest.raises(UserError, match=r"stages small, sft.*give another workdir"):
            fine_tune.run(other, str(copy))  # the run has another second stage

        path = next((base / "stages/0-small/checkpoints").glob("[0-9]*"))
        alone = dataclasses.replace(config, base=str(path))
        stage = fine_tune.run(alone, str(tmp_path / "alone")).stage
    assert (stage["index"], stage["parent"], stage["receipt"]) == (0, None, None)
    assert lineage(tmp_path / "alone") == [stage]


@pytest.mark.slow
def test_less_is_more_resumes_and_decides_by_its_rule(base, tmp_path):
    args = (
        "less_is_more",
        "--config=configs/less_is_more.py:smoke",
        f"--config.sft.base={base}",
        f"--workdir={tmp_path}",
    )
    printed = json_of(*args, by=run)
    names = [row["name"] for row in printed["arms"]]
    assert names[0] == "base" and len(names) == len(set(names)) == 1 + 4 + 2
    assert {v["verdict"] for v in printed["verdicts"]} == {"undecided"}  # one seed decides nothing
    assert (tmp_path / "report/less_is_more_sizes.png").is_file()
    lines = (tmp_path / "arms.jsonl").read_text().splitlines()
    (tmp_path / "arms.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    again = json_of(*args, by=run)
    assert again["arms"] == printed["arms"]  # the same chosen sets, the same digests
