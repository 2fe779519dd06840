"""Import and export of weights, against transformers' own models, with negative controls."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth, interop
from flm_jax.commands import config_files
from flm_jax.errors import UserError
from flm_jax.interop import names
from flm_jax.interop.converter import write_hf
from flm_jax.interop.weights import Tree
from flm_jax.params.digest import params_digest
from flm_jax.store.lineage import RunFolder
from tests.commands import json_of, mistake, run
from tests.interop_models import (
    CONTEXT,
    POSITIONS,
    SEGMENTS,
    SMALL,
    TARGETS,
    TOKENS,
    VOCAB,
    check_round_trip_of_a_run,
    distance,
    equal,
    ours,
)
from tests.models import grow, random_params

torch = pytest.importorskip("torch", reason="the oracles are transformers' models: extra [hf]")
transformers = pytest.importorskip("transformers", reason="extra [hf]")
transformers.utils.logging.disable_progress_bar()

_SIZES = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
}
_WIDE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
_NARROW = {"hidden_size": 16, "intermediate_size": 36, "num_attention_heads": 4}
MULTIPLIERS = {"use_mup": True, "input_mult": 1.7, "output_mult": 0.6, "mup_scale_factor": 2}
MODELS = {
    "llama": (transformers.LlamaConfig, _NARROW),
    "grouped": (transformers.LlamaConfig, _WIDE),
    "tied": (transformers.LlamaConfig, {**_NARROW, "tie_word_embeddings": True}),
    "granite": (
        transformers.GraniteConfig,
        {
            **_NARROW,
            "num_key_value_heads": 1,
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
        },
    ),
    "teleflm": (transformers.LlamaConfig, _NARROW),
}


def make(kind, folder, **save_options):
    """Makes a random transformers model and saves it to a folder."""
    cls, sizes = MODELS[kind]
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_config(cls(**_SIZES, **sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # gains of one would hide bugs
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **save_options)
    if kind == "teleflm":
        file = folder / "config.json"
        values = {**json.loads(file.read_text()), **MULTIPLIERS, "model_type": "TeleFLM"}
        file.write_text(json.dumps(values))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: kind -> model and folder. Each kind is made once, in small shards."""
    models = {}

    def get(kind):
        if kind not in models:
            folder = tmp_path_factory.mktemp(kind)
            models[kind] = make(kind, folder, max_shard_size="8KB"), folder
        return models[kind]

    return get


def theirs(model, multipliers=None):
    """Returns the logits of the transformers model; `multipliers` are TeleFLM's."""
    m = {"input_mult": 1, "output_mult": 1, "mup_scale_factor": 1} | (multipliers or {})
    with torch.no_grad():
        x = model.get_input_embeddings()(torch.tensor(TOKENS)) * m["input_mult"]
        out = model(
            inputs_embeds=x,
            attention_mask=torch.tensor(SEGMENTS),
            position_ids=torch.tensor(POSITIONS),
        )
    return (out.logits * (m["output_mult"] / m["mup_scale_factor"])).numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_an_imported_model_has_the_same_logits(kind, saved):
    model, folder = saved(kind)
    params, config = interop.load_hf(folder)
    oracle = theirs(model, MULTIPLIERS if kind == "teleflm" else None)
    assert distance(oracle, ours(params, config)) < 1e-4


def test_mistakes_in_an_import_change_the_logits(saved, monkeypatch):
    """Negative control: wrong orders of heads, a matrix without transposition, no multipliers."""
    model, folder = saved("grouped")
    oracle = theirs(model)
    for path, layout in {
        "layers/attention/query": "q_per_kv.kv_heads.head_dim embed",
        "layers/attention/out": "embed q_per_kv.kv_heads.head_dim",
        "layers/attention/key": "head_dim.kv_heads embed",
    }.items():
        with monkeypatch.context() as patch:
            patch.setitem(names._MATRICES, path, layout)
            assert distance(oracle, ours(*interop.load_hf(folder))) > 1e-2, path
    model, folder = saved("granite")
    params, config = interop.load_hf(folder)
    for name in ("input_mult", "residual_mult", "attention_mult"):
        plain = dataclasses.replace(config, **{name: 1.0})
        assert distance(theirs(model), ours(params, plain)) > 1e-2, name


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("llama", "granite"),
        ("grouped", "llama"),
        ("tied", "llama"),
        ("granite", "granite"),
        ("teleflm", "teleflm"),
        ("teleflm", "granite"),
        ("teleflm", "llama"),
    ],
)
def test_exports_have_the_same_logits_and_import_bit_identically(kind, format, saved, tmp_path):
    _, folder = saved(kind)
    params, config = interop.load_hf(folder)
    _, notes = write_hf(
        tmp_path / "out",
        Tree(params, config),
        format,
        "float32",
        interop.Vocabulary(str(folder)),
        shard_bytes=9000,
    )
    again, config_again = interop.load_hf(tmp_path / "out")
    folds = (kind, format) == ("teleflm", "llama")
    assert len(notes) == (2 if folds else 0)
    assert equal(params, again) != folds
    before = ours(params, config)
    if folds:
        assert distance(before, ours(again, config_again)) < 1e-5
    if format != "teleflm":  # transformers itself can open it
        opened, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert distance(before, theirs(opened)) < 1e-4
    else:
        values = json.loads((tmp_path / "out" / "config.json").read_text())
        assert values.items() >= MULTIPLIERS.items()
        assert config_again == config
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 64
    )


@pytest.mark.parametrize("recipe", TARGETS)
def test_a_grown_import_is_exported_with_the_same_logits(recipe, saved, tmp_path):
    model, folder = saved("grouped")
    params, config = interop.load_hf(folder)
    assert config == SMALL
    plan = growth.plan(config, TARGETS[recipe], recipe)
    grown, target = grow(jax.tree.map(jnp.asarray, params), plan, jax.random.key(0)), plan.target
    masked = recipe == "msg"
    if masked:
        masks = plan.masks(jnp.float32(0.4))
        plain, folded = growth.fold(grown, plan, 0.4)
        interop.save_hf(tmp_path / "middle", plain, folded, "llama")
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "middle")
        assert distance(ours(grown, target, masks), theirs(opened)) < 1e-4
        assert distance(ours(grown, target), theirs(opened)) > 1e-2  # negative control: no masks
        grown, target = growth.fold(grown, plan, 0.0)
    interop.save_hf(tmp_path / "grown", grown, target, "llama", vocabulary=str(folder))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert distance(theirs(model), theirs(opened)) < 1e-4
    assert opened.config.hidden_size == TARGETS[recipe].d_model


def test_bin_files_hold_the_same_weights(saved, tmp_path):
    model, folder = saved("grouped")
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert equal(interop.load_hf(folder)[0], interop.load_hf(tmp_path)[0])
    half = {name: x.to(torch.bfloat16) for name, x in model.state_dict().items()}
    torch.save(half, tmp_path / "pytorch_model.bin")
    got = interop.load_hf(tmp_path)[0]["final_norm"]
    np.testing.assert_array_equal(got, half["model.norm.weight"].float().numpy())
    # Two files and an index.
    state = list(model.state_dict().items())
    file_of = {}
    for file, part in (("one.bin", state[:5]), ("two.bin", state[5:])):
        torch.save(dict(part), tmp_path / file)
        file_of |= dict.fromkeys(dict(part), file)
    (tmp_path / "pytorch_model.bin").unlink()  # one file would be read instead, as in transformers
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": file_of}))
    assert equal(interop.load_hf(folder)[0], interop.load_hf(tmp_path)[0])
    (tmp_path / "two.bin").write_bytes((tmp_path / "two.bin").read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"two.bin: torch's loader for weights alone refuses it"):
        interop.load_hf(tmp_path)


class Code:
    def __reduce__(self):
        return (print, ("this code was run",))


def test_bin_files_run_no_code(saved, tmp_path, capsys):
    _, folder = saved("grouped")
    shutil.copy(folder / "config.json", tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"lm_head.weight": Code()}, file)
    with pytest.raises(UserError, match=rf"{file}: torch's loader for weights alone refuses it"):
        interop.load_hf(tmp_path)
    assert "was run" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_chain_starts_from_imported_weights(tmp_path):
    """The first stage reads its parameters from a folder, does not train, and is grown."""
    config = config_files.experiment(config_files.shipped("demo").get_config("smoke"))
    model = config.stages[0].model
    params = random_params(model, 0)
    interop.save_hf(tmp_path / "hf", params, model, "teleflm", vocabulary="bytes")
    workdir = tmp_path / "run"
    command = (
        "train",
        "--config=configs/demo.py:smoke",
        f"--workdir={workdir}",
        f"--config.stages[0].source={tmp_path / 'hf'}",
        "--config.stages[0].steps=0",
        "--config.stages[1].steps=12",
        "--config.stages[2].steps=12",
    )
    wrong = mistake(*command, "--config.stages[0].model.d_ff=88", by=run)
    assert f"model.d_ff is 88, but source {tmp_path / 'hf'} has 84" in wrong
    assert "does not exist" not in wrong and not workdir.exists()
    status, _, err = run(*command)
    assert status == 0, err
    first, second, _ = RunFolder(workdir).stages()
    assert first["params_digest"] == params_digest(params)
    assert first["steps"] == first["tokens"] == 0
    assert second["receipt"]["max_abs_logit_diff"] <= 1e-4 * second["receipt"]["logit_scale"]
    assert abs(first["eval"]["bpb_end"] - second["eval"]["bpb_start"]) < 1e-4
    # A grown stage is exported, with the tokenizer of vocabulary "bytes".
    json_of(
        "convert",
        f"--source={workdir}",
        f"--target={tmp_path / 'out'}",
        "--format=granite",
        "--stage=medium",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n\treturn 'é\x00\x7f\xad漢'"
    ids = tokenizer(text).input_ids  # token 0 starts it, as in training
    assert ids == [0, *(byte + 3 for byte in text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_run_survives_a_round_trip_bit_identically(saved, tmp_path):
    _, folder = saved("granite")
    check_round_trip_of_a_run(folder, tmp_path)
