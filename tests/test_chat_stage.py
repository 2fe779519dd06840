"""The chat template of a fine-tuned stage: who uses it afterwards, and what is exported."""

import dataclasses
import json

import jax
import pytest

from flm_jax import interop
from flm_jax.commands import generate as generate_command
from flm_jax.config import DataConfig, EvalConfig
from flm_jax.errors import UserError
from flm_jax.interop.opening import open_model
from flm_jax.params.digest import params_digest
from flm_jax.sft import before_after, fine_tune, template
from flm_jax.sft.chat_model import open_chat_model
from flm_jax.sft.chats import Message
from flm_jax.sft.config import SftConfig
from flm_jax.sft.template import TELE_FLM, TemplateConfig, model_prompt
from tests import runs
from tests.commands import ROOT, json_of, mistake
from tests.models import changed

JINJA = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEMPLATES = {
    "patterns": TemplateConfig(user="[u]{text}\n", assistant="[a]{text}", system="[s]{text}"),
    "jinja": TemplateConfig(jinja=JINJA),
}
TURNS = [
    Message("system", "s"),
    Message("user", " q "),
    Message("assistant", "a"),
    Message("user", "r"),
]
PROMPTS = {
    "patterns": "<pad>[s]s[u]q\n[a]a</s>[u]r\n[a]",
    "jinja": "<pad><system>s<user> q <assistant>a</s><user>r<assistant>",
}


def ids_of(tokenizer, text):
    return tokenizer.encode(text, special=True)


def write_talk(folder, rows):
    path = folder / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run with a model of random weights, and text to retain."""
    folder = tmp_path_factory.mktemp("base")
    text = folder / "text"
    text.mkdir()
    for n in range(20):
        (text / f"{n}.txt").write_text(f"some text to retain {n} " * 9)
    data = DataConfig(task="text_files", path=str(text), vocabulary="bytes", sequence_length=64)
    path, _ = runs.save(folder / "run", [changed(runs.BYTES, num_layers=1)], data)
    lineage = folder / "run" / "lineage.json"
    values = json.loads(lineage.read_text())
    more = {"steps": 7, "tokens": 7, "flops": 7, "wall_s": 0.0, "params": 1, "parent": None}
    with jax.enable_x64(False):
        digest = params_digest(open_model(path).params)
    values["stages"][0] |= {**more, "params_digest": digest}
    lineage.write_text(json.dumps(values))
    return path


def config_of(base, talk, **fields):
    return SftConfig(
        base=base, paths=(talk,), steps=2, batch_size=8, sequence_length=64, held_out=0.2,
        learning_rate=1e-2, matrix_learning_rate=1e-2, quick_compile=True, score_samples=2,
        max_new_tokens=2, eval=EvalConfig(sequences=8, batch_size=8, every_steps=2), **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A function: template -> the folder of a fine-tuning with it, and its scores."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            rows = [{"prompt": f"q{n}", "completion": f"a{n}", "id": n} for n in range(30)]
            rows += [{"category": "quiet", "prompt": f"q{n}", "completion": ""} for n in range(20)]
            rows += [{"instruction": "no answer"}]
            config = config_of(base, write_talk(folder, rows), template=TEMPLATES[name], bad_rows=1)
            run = str(folder / "run")
            with jax.enable_x64(False):
                scores = before_after.scores(config, run, fine_tune.run(config, run))
            made[name] = run, scores, config
        return made[name]

    return get


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_user_of_a_stage_writes_its_template(name, tuned, monkeypatch, tmp_path):
    run, _, _ = tuned(name)
    model = open_model(run)
    assert model.template == TEMPLATES[name]
    wanted = ids_of(model.tokenizer, PROMPTS[name])
    assert model_prompt(model, TURNS) == wanted
    seen = []

    def record(params, config, rows, sampling, *more, **settings):
        seen.append((list(rows[0]), sampling.stop_tokens))
        return [[] for _ in rows]

    monkeypatch.setattr(generate_command, "generate", record)
    json_of("generate", f"--checkpoint={run}", "--chat", "--prompt=r", "--max_new_tokens=4")
    prompt = {"patterns": "<pad>[u]r\n[a]", "jinja": "<pad><user>r<assistant>"}[name]
    assert seen == [(ids_of(model.tokenizer, prompt), (1,))]
    chat, _ = open_chat_model(run)  # of compare and select
    assert chat.model.template == TEMPLATES[name]
    # Negative control: a model that was not fine-tuned.
    earlier = open_model(run, "s0")
    assert earlier.template == TELE_FLM and model_prompt(earlier, TURNS) != wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_exports_write_the_template_of_the_stage(name, tuned, tmp_path):
    transformers = pytest.importorskip("transformers")
    run, _, _ = tuned(name)
    with jax.enable_x64(False):
        interop.convert(run, str(tmp_path / "hf"), "granite")
        interop.convert(run, str(tmp_path / "flm"), "flm")
        interop.convert(str(tmp_path / "hf"), str(tmp_path / "again"), "flm")
        models = {n: open_model(str(tmp_path / n)) for n in ("hf", "flm", "again")}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    rows = [{"role": m.role, "content": m.content} for m in TURNS]
    ids = theirs.apply_chat_template(rows, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    wanted = ids_of(open_model(run).tokenizer, PROMPTS[name])
    assert ids == wanted
    assert models["flm"].template == TEMPLATES[name]
    for model in models.values():
        assert model_prompt(model, TURNS) == wanted
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["chat_template"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_harness_requests_have_the_tokens_of_the_template(name, tuned):
    pytest.importorskip("lm_eval", reason="needs the extra [hf]")
    from flm_jax.commands.harness import _chat
    from flm_jax.inference.harness import Adapter

    run, _, _ = tuned(name)
    model = open_model(run)
    adapter = Adapter(model, 64, chat=_chat(model))
    rows = [{"role": m.role, "content": m.content} for m in TURNS]
    text = adapter.apply_chat_template(rows)
    wanted = ids_of(model.tokenizer, PROMPTS[name])
    assert adapter.tok_encode(text) == wanted
    assert adapter._encode_pair(text, " x") == (wanted, ids_of(model.tokenizer, " x"))
    begun = adapter.apply_chat_template(
        [*rows, {"role": "assistant", "content": "so"}], add_generation_prompt=False
    )
    assert adapter.tok_encode(begun) == [*wanted, *ids_of(model.tokenizer, "so")]
    assert begun.endswith("so") and text in begun


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_later_stage_inherits_the_template(name, tuned, tmp_path):
    run, _, _ = tuned(name)
    grown, _ = runs.save(tmp_path / "grown", [runs.BYTES, runs.BYTES])
    assert open_model(grown).template == TELE_FLM
    file = tmp_path / "grown/stages/0-s0/config.json"
    values = json.loads(file.read_text())
    stored = json.loads(open_model(run).path.parent.parent.joinpath("config.json").read_text())
    file.write_text(json.dumps(values | {"sft": stored["sft"]}))
    assert open_model(grown).template == TEMPLATES[name]
    # A chain that starts from the run's weights.
    chain, _ = runs.save(tmp_path / "chain", [runs.BYTES])
    file = tmp_path / "chain/stages/0-s0/config.json"
    values = json.loads(file.read_text())
    for source in (run, str(open_model(run).path)):
        values["stage"]["source"] = source
        file.write_text(json.dumps(values))
        assert open_model(chain).template == TEMPLATES[name]


def test_a_category_of_empty_answers_has_null_scores(tuned):
    _, scores, _ = tuned("patterns")
    text = json.dumps(scores, allow_nan=False)
    quiet = json.loads(text)["after"]["quiet"]
    assert quiet["loss"] is quiet["bpb"] is quiet["bpb_low"] is None and quiet["bpb_n"] == 0
    assert scores["after"][""]["loss"] == scores["after"]["all"]["loss"] > 0
    assert sum(c["no_answer"] for c in scores["conversations"].values()) == 20
    assert len(scores["bad_rows"]) == 1 and "talk.jsonl, line 51" in scores["bad_rows"][0]
    drawn = before_after.table(scores)
    assert drawn.row_count == 3
    assert any("1 bad rows left out" in line for line in before_after.sentences(scores))


def test_reading_settings_do_not_belong_to_the_stages_identity(tuned):
    run, _, config = tuned("patterns")
    again = dataclasses.replace(config, bad_rows=5, fields={"id": "id"})
    with jax.enable_x64(False):
        stage = fine_tune.run(again, run).stage  # finished: nothing is trained
        assert stage["name"] == "sft"
        other = dataclasses.replace(config, template=template.GENERIC)
        with pytest.raises(UserError, match=r"template.*another workdir"):
            fine_tune.run(other, run)


def test_a_base_without_its_own_template_is_refused_before_anything_is_written(base, tmp_path):
    talk = write_talk(tmp_path, [{"prompt": "q", "completion": "a"}])
    for jinja, words in [("tokenizer", "has no chat template"), ("{{ 1", "not valid Jinja")]:
        config = config_of(base, talk, template=TemplateConfig(jinja=jinja))
        with pytest.raises(UserError, match=words):
            fine_tune.run(config, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_compare_reads_all_forms_and_prints_null_scores(tuned, tmp_path):
    run, _, _ = tuned("patterns")
    rows = [{"category": "quiet", "prompt": "q", "completion": ""}] * 2
    rows += [{"system": "s", "prompt": "q", "completion": "a"}]
    args = ("compare", run, f"{run}:s0", f"--samples={write_talk(tmp_path, rows)}")
    args += ("--retention_sequences=8", "--max_new_tokens=2")
    with jax.enable_x64(False):
        result = json_of(*args)
        assert result["difference"]["quiet"]["bpb"] == dict.fromkeys(
            ("a", "b", "difference", "low", "high")
        ) | {"n": 0}
        assert result["difference"]["all"]["loss"]["n"] == 1
        assert result["a"]["left_out"] == {} and result["b"]["left_out"] == {"system messages": 1}
        status = json_of(*args, "--fail_if=all/loss:100")
        assert status["failed"] == []
    write_talk(tmp_path, [*rows, {"prompt": "q"}])
    assert "talk.jsonl, line 4" in mistake(*args)


CALLS = [
    {"role": "user", "content": "q"},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_that_the_template_cannot_write_are_left_out_everywhere(name, base, tmp_path):
    refusing = "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    jinja = JINJA.replace("{{ '<'", refusing + "{{ '<'")
    writing = TEMPLATES[name] if name == "patterns" else TemplateConfig(jinja=jinja)
    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(30)]
    rows += [{"messages": [*CALLS[:2], {**CALLS[2], "content": f"{n}"}], "category": "tools"}
             for n in range(20)]  # fmt: skip
    talk = write_talk(tmp_path, rows)
    config = config_of(base, talk, template=writing, bad_rows=20)
    run = str(tmp_path / "run")
    with jax.enable_x64(False):
        scores = before_after.scores(config, run, fine_tune.run(config, run))
        assert scores["after"].keys() == {"", "all"} and len(scores["bad_rows"]) == 20
        assert sum(c["bad"] for c in scores["conversations"].values()) == 20
        args = ("compare", run, run, f"--samples={talk}", "--retention_sequences=8")
        result = json_of(*args, "--bad_rows=20", "--max_new_tokens=2")
        assert result["samples"]["scored"] == 30 and len(result["bad_rows"]) == 20
        line = mistake(*args, "--bad_rows=20", "--fail_if=tools/loss:1")
        assert "fail_if=tools/loss:1: not measured here" in line
        assert "talk.jsonl, line 50: " in mistake(*args, "--bad_rows=19")
        args = ("samples", "select", f"--pool={talk}", f"--output={tmp_path}/chosen.jsonl")
        args += ("--size=30", "--near=2", "--worst_loss=0", "--max_ifd=1e9", f"--checkpoint={run}")
        result = json_of(*args, "--bad_rows=20")
        assert result["pool"] == 30 and len(result["bad_rows"]) == 20
        assert "talk.jsonl, line 31: " in mistake(*args)


def test_the_harness_asks_in_the_template(tuned, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra [hf]")
    from flm_jax.commands.harness import _chat
    from flm_jax.inference import harness

    run, _, _ = tuned("patterns")
    model = open_model(run)
    asked = []

    def score(self, pairs):
        asked.extend(pairs)
        return [(0.0, False)] * len(pairs)

    monkeypatch.setattr(harness.Adapter, "_score", score)
    monkeypatch.chdir(ROOT)
    adapter = harness.Adapter(model, 64, chat=_chat(model))
    harness.run(adapter, ["flm_choice"], include_path=str(ROOT / "tests/harness_tasks"))
    samples = ROOT / "tests/harness_tasks/samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    wanted = {
        (tuple(model_prompt(model, [Message("user", row["question"])])), choice.strip())
        for row in rows
        for choice in row["choices"]
    }
    decode = model.tokenizer.decode
    assert {(tuple(context), decode(new).strip()) for context, new in asked} == wanted
