"""The model families: import, export and growth against transformers, and every refusal by name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth, interop
from flm_jax.errors import UserError
from flm_jax.interop import families, hf_config, opening
from flm_jax.interop.verify import our_logits, relative_distance, torch_logits
from tests.commands import call, mistake

torch = pytest.importorskip("torch", reason="the oracles are transformers' models: extra [hf]")
pytest.importorskip("transformers", reason="extra [hf]")
from safetensors.torch import load_file, save_file  # noqa: E402

from flm_jax.studies import check_families  # noqa: E402

ROWS = check_families.sequences()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: name of a family's model -> a folder with it. Each is made once."""
    folders = {}

    def get(name, **values):
        key = (name, *values.items())
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("family") / "model"
            check_families.make(name, folders[key], 7, **values)
        return folders[key]

    return get


def changed(folder, to, tensors=None, **keys):
    """A copy of a folder with other tensors, or other keys in its config.json."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    if tensors is not None:
        save_file(tensors, to / "model.safetensors", {"format": "pt"})
    values = json.loads((to / "config.json").read_text()) | keys
    (to / "config.json").write_text(json.dumps(values))
    return to


def imported_distance(folder) -> float:
    return relative_distance(torch_logits(folder, ROWS), our_logits(*interop.load_hf(folder), ROWS))


# Together these two have nearly every feature.
EACH = [name if name in ("gemma2", "olmo2") else pytest.param(name, marks=pytest.mark.slow)
        for name in check_families.MODELS]  # fmt: skip


@pytest.mark.parametrize("name", EACH)
def test_a_family_is_imported_exported_and_grown_with_the_same_logits(name):
    row = check_families.check(name, seed=3)
    assert row["ok"], row


@pytest.mark.parametrize(("name", "field", "value"), [
    ("gemma2", "window", 9), ("gemma2", "attention_softcap", 0.0), ("gemma2", "logit_softcap", 0.0),
    ("gemma2", "activation", "silu"), ("qwen3", "window", 3), ("olmo2", "rms_norm_eps", 0.1),
    ("granite", "residual_mult", 1.0), ("smollm3", "layer_kinds", ("full",)),
])  # fmt: skip
def test_a_wrong_field_changes_the_logits(name, field, value, made):
    """Negative control: the comparison sees every feature."""
    params, config = interop.load_hf(made(name))
    wrong = dataclasses.replace(config, **{field: value})
    assert (
        relative_distance(our_logits(params, config, ROWS), our_logits(params, wrong, ROWS)) > 1e-3
    )


def test_a_tied_model_stays_tied_and_is_written_once(made, tmp_path):
    params, config = interop.load_hf(made("gemma2"))
    assert config.tied and "head" not in params
    interop.save_hf(tmp_path / "out", params, config, "gemma2")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_a_head_beside_the_tied_flag_is_kept_if_it_differs(made, tmp_path):
    """The rule of transformers: the file's head counts."""
    folder = made("llama, linear")
    tensors = load_file(folder / "model.safetensors")
    same = changed(
        folder, tmp_path / "same",
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    )  # fmt: skip
    assert opening.open_stored_model(str(same)).weights.config.tied
    torch.manual_seed(0)
    own = changed(
        folder, tmp_path / "own", tensors | {"lm_head.weight": torch.randn(96, 32) * 0.15}
    )
    stored = opening.open_stored_model(str(own))
    assert not stored.weights.config.tied and "lm_head.weight differs" in stored.notes[0]
    assert imported_distance(own) < 1e-4


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq",
                                  "model.layers.1.self_attn.rotary_emb.inv_freq"])  # fmt: skip
def test_frequencies_in_the_files_are_ignored(name, made, tmp_path):
    folder = made("llama, linear")
    tensors = load_file(folder / "model.safetensors") | {name: torch.ones(6)}
    assert imported_distance(changed(folder, tmp_path / "own", tensors)) < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(value, made, tmp_path):
    tensors = load_file(made("mistral") / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    folder = changed(made("mistral"), tmp_path / "own", tensors)
    line = mistake("convert", f"--source={folder}", f"--target={tmp_path}/out", "--format=mistral")
    assert "model.layers.1.mlp.up_proj.weight has values that are NaN or infinite" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_unusual_files_are_noted(made, tmp_path):
    """Mixed dtypes, and shards beside a whole file, which transformers does not read either."""
    tensors = load_file(made("mistral") / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    folder = changed(made("mistral"), tmp_path / "own", tensors)
    save_file({"stale": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    notes = " ".join(opening.open_stored_model(str(folder)).notes)
    assert "model-00001-of-00002.safetensors: not read" in notes and "1 in bfloat16" in notes


def test_granites_multipliers_are_written_as_they_are(made, tmp_path):
    """No parameter is folded, so that bfloat16 files keep their bits."""
    folder = made("granite", dtype="bfloat16")
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    half = changed(folder, tmp_path / "half", tensors, dtype="bfloat16")
    report = interop.convert(str(half), str(tmp_path / "out"), "granite")
    assert not [note for note in report["notes"] if "tokenizer" not in note]
    again = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in tensors.items())


def test_ids_outside_a_smaller_vocabulary_are_left_out(made, tmp_path):
    import tokenizers

    folder = changed(made("llama, linear"), tmp_path / "own", pad_token_id=95, eos_token_id=[2, 90])
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(80)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    report = interop.convert(str(folder), str(tmp_path / "out"), "llama", vocab_size=80)
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["pad_token_id"] is None and values["eos_token_id"] == [2]
    assert any("pad_token_id 95" in note for note in report["notes"])
    assert len(torch_logits(tmp_path / "out", [row % 80 for row in ROWS])) == len(ROWS)


def test_a_null_in_generation_settings_is_carried(made, tmp_path):
    folder = changed(made("llama, linear"), tmp_path / "own")
    (folder / "generation_config.json").write_text('{"max_length": null, "eos_token_id": [2, 5]}')
    interop.convert(str(folder), str(tmp_path / "out"), "llama")
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 5] and written.get("max_length") is None


def test_layer_types_follow_the_grown_model(made, tmp_path):
    folder = changed(made("llama, linear"), tmp_path / "own", layer_types=["full_attention"] * 4)
    params, config = interop.load_hf(folder)
    plan = growth.plan(config, dataclasses.replace(config, num_layers=6), "identity")
    grown = growth.grow(jax.tree.map(jnp.asarray, params), plan, jax.random.key(0))
    interop.save_hf(tmp_path / "out", grown, plan.target, "llama", vocabulary=str(folder))
    distance = relative_distance(torch_logits(folder, ROWS), torch_logits(tmp_path / "out", ROWS))
    assert distance < 1e-4


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.7, 0.5])
def test_any_positive_factor_of_teleflm_keeps_the_logit_multiplier(factor):
    keys = families.Keys({"use_mup": True, "output_mult": 0.6, "hidden_size": 32,
                          "mup_scale_factor": factor}, "config.json")  # fmt: skip
    fields = families.FAMILIES["teleflm"].read(keys)
    width = 32 / fields.get("mup_base_width", 32)
    assert fields["output_mult"] / width == pytest.approx(0.6 / factor, rel=1e-12)


def test_multipliers_without_a_key_are_folded(made, tmp_path):
    """A tied Granite as Llama: embedding, last norm, branch ends and queries take the factors."""
    params, config = interop.load_hf(made("granite"))
    interop.save_hf(tmp_path / "out", params, config, "llama")
    want = our_logits(params, config, ROWS)
    assert relative_distance(want, torch_logits(tmp_path / "out", ROWS)) < 1e-4
    plain, scales = hf_config.folded(config, "llama")
    assert {"embedding", "final_norm", "layers/mlp/down", "layers/attention/query_bias"} < set(
        scales
    )
    assert plain.tied and plain.input_mult == plain.logit_mult == plain.branch_mult == 1


def test_an_own_eps_of_queries_and_keys_is_folded(made, tmp_path):
    """A growth by zeros leaves Qwen3 with two eps; the files have one."""
    params, config = interop.load_hf(made("qwen3"))
    two = dataclasses.replace(config, qk_norm_eps=50 * config.rms_norm_eps)
    interop.save_hf(tmp_path / "out", params, two, "qwen3")
    want = our_logits(params, two, ROWS)
    assert relative_distance(want, torch_logits(tmp_path / "out", ROWS)) < 1e-4
    assert relative_distance(want, our_logits(params, config, ROWS)) > 1e-3  # negative control


@pytest.mark.parametrize(("values", "line"), [
    ({"model_type": "mixtral"}, "'mixtral', which has experts; the nearest .* is 'mistral'"),
    ({"model_type": "gpt2"}, "'gpt2', which has LayerNorm and learned positions"),
    ({"model_type": None}, "model_type is None"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "type 'longrope'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor is missing"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, r"factor is 0\.5; give 1"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'; it must be one of silu"),
    ({"hidden_size": "32"}, "hidden_size is '32'; it must be an integer above 0"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; it must be a number above 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be a JSON object"),
])  # fmt: skip
def test_a_config_that_is_not_supported_is_refused_by_key(values, line, made, tmp_path):
    folder = changed(made("llama, linear"), tmp_path / "own", **values)
    with pytest.raises(UserError, match=line) as error:
        opening.open_stored_model(str(folder))
    assert str(folder / "config.json") in str(error.value) and "\n" not in str(error.value)


def test_a_format_without_a_feature_names_it_and_those_that_have_it(made, tmp_path):
    params, config = interop.load_hf(made("qwen3"))
    with pytest.raises(UserError, match=r"'llama' has no qk_norm 'head'.*; choose qwen3"):
        interop.save_hf(tmp_path / "out", params, config, "llama")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_prints_one_row_for_each_model():
    status, out, _ = call("families", "--family=llama", "--json")
    rows = json.loads(out)["families"]
    assert status == 0 and len(rows) == 4 and all(row["ok"] for row in rows)
    assert "choose all or one of llama, mistral" in mistake("families", "--family=bert")
    assert np.isfinite([row["msg"] for row in rows]).all()
