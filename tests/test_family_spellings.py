"""config.json in all its spellings: random models of each family against transformers.

transformers 4 and 5 have different keys for RoPE, windows and dtype, and files on the Hub mix them.
transformers itself opens each folder; what it computes is right.
"""

import json
import random

import pytest

from flm_jax.errors import UserError
from flm_jax.interop import converter, hf_config, opening, weights
from flm_jax.interop.families import FAMILIES
from flm_jax.interop.tokenizer_files import Vocabulary, write_config
from flm_jax.interop.verify import our_logits, relative_distance, torch_logits

torch = pytest.importorskip("torch", reason="the oracles are transformers' models: extra [hf]")
transformers = pytest.importorskip("transformers", reason="extra [hf]")
from safetensors.torch import save_file  # noqa: E402

from flm_jax.studies import check_families  # noqa: E402

ROWS = check_families.sequences(3)
NAMES = [name for name, family in FAMILIES.items() if family.model_type != "TeleFLM"]
FULL, SLIDING = "full_attention", "sliding_attention"


def rope(draw):
    """Settings of RoPE, with optional keys left out."""
    kind = draw.choice(["default", "linear", "dynamic", "yarn", "yarn", "llama3"])
    values = {"rope_theta": draw.choice([50.0, 900.0, 10000]), "rope_type": kind}
    if kind != "default":
        values["factor"] = draw.choice([2, 2.5, 8.0])
    if kind in ("yarn", "llama3") and draw.random() < 0.6:
        values["original_max_position_embeddings"] = 8
    if kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn":
        optional = {"beta_fast": 4, "beta_slow": 0.5, "attention_factor": 0.7, "mscale": 0.7,
                    "mscale_all_dim": 0.3, "truncate": False}  # fmt: skip
        values |= {key: value for key, value in optional.items() if draw.random() < 0.4}
    return values


def spelled(values, name, draw):
    """The keys of RoPE in the spelling of transformers 4, of 5, or in both at once."""
    style, theta = draw.choice([4, 5, "both"]), values["rope_theta"]
    scaling = {key: value for key, value in values.items() if key != "rope_theta"}
    if name == "gemma3_text":
        local = {"rope_local_base_freq": draw.choice([50.0, 10_000.0])}
        if style == 5:
            sliding = {"rope_type": "default", "rope_theta": local["rope_local_base_freq"]}
            return {"rope_parameters": {FULL: values, SLIDING: sliding}}
        if style == "both":
            return local | {"rope_parameters": {FULL: values}}
        return local | {"rope_theta": theta, "rope_scaling": scaling}
    if style == 5:
        return {"rope_parameters": values}
    if draw.random() < 0.5:
        scaling["type"] = scaling.pop("rope_type")
    other = {"rope_type": "linear", "factor": 7.0, "rope_theta": 123.0}
    parameters = {"rope_parameters": other} if style == "both" else {}
    length = {"original_max_position_embeddings": 10} if draw.random() < 0.2 else {}
    return parameters | length | {"rope_theta": theta, "rope_scaling": scaling}


def windows(name, layers, draw):
    """The keys of windows and of layers without RoPE, if the family has them."""
    if name == "mistral":
        return {"sliding_window": draw.choice([None, 4, 30])}
    values = {}
    if name in ("qwen2", "qwen3", "smollm3"):
        values["use_sliding_window"] = draw.random() < 0.6
        values["sliding_window"] = draw.choice([3, 9])
        values["max_window_layers"] = draw.choice([0, 1, 3])
    if name == "smollm3":
        bits = [draw.choice([0, 1]) for _ in range(layers + draw.choice([0, 1]))]
        values |= draw.choice([{"no_rope_layers": bits}, {"no_rope_layer_interval": 3}])
    if name.startswith("gemma"):
        values |= {"sliding_window": draw.choice([3, 9]), "sliding_window_pattern": 3}
    if name.startswith("gemma") or values.get("use_sliding_window"):
        types = [draw.choice([FULL, SLIDING]) for _ in range(layers)]
        values |= draw.choice([{"layer_types": types}, {}])
    return values


def random_config(name, draw):
    heads, layers = draw.choice([2, 4]), draw.choice([1, 2, 5])
    values = {
        "model_type": name, "vocab_size": 96, "hidden_size": draw.choice([24, 32, 48]),
        "intermediate_size": 40, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, 2, heads]), "head_dim": draw.choice([8, 12]),
        "rms_norm_eps": draw.choice([1e-6, 1e-3]), "tie_word_embeddings": draw.random() < 0.5,
        "max_position_embeddings": draw.choice([12, 64]), "pad_token_id": draw.choice([None, 0]),
        "bos_token_id": 1, "eos_token_id": draw.choice([2, [2, 5]]),
    }  # fmt: skip
    family = FAMILIES[name]
    values[family.activation] = draw.choice(["silu", "gelu", "gelu_pytorch_tanh", "gelu_new"])
    for key, field in (("attention_bias", "out_bias"), ("mlp_bias", "mlp_bias")):
        if True in family.has.get(field, ()):
            values[key] = draw.random() < 0.5
    if name.startswith("gemma"):
        values["query_pre_attn_scalar"] = draw.choice([7, 16])
        values["attn_logit_softcapping"] = draw.choice([None, 2.0, 5.0])
        values["final_logit_softcapping"] = draw.choice([None, 2.0, 5.0])
    if name == "granite":
        values |= {"embedding_multiplier": 12, "logits_scaling": draw.choice([8, 3.7, 49]),
                   "residual_multiplier": 0.22, "attention_multiplier": 0.0156}  # fmt: skip
    return values | windows(name, layers, draw) | spelled(rope(draw), name, draw)


def write(values, folder, seed):
    """Writes a folder with this config.json, letter by letter, and random parameters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(folder)
    tensors = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    for name, x in tensors.items():
        gain = torch.rand_like(x) + 0.5 - FAMILIES[values["model_type"]].gain_offset
        tensors[name] = gain if "norm" in name else torch.randn_like(x) * 0.15
    if values["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [
    0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))
])  # fmt: skip
def test_a_config_in_any_spelling_is_the_model_of_transformers(name, seed, tmp_path):
    values = random_config(name, random.Random(f"{name} {seed}"))
    write(values, tmp_path / "source", seed)
    want = torch_logits(tmp_path / "source", ROWS)
    read = opening.open_stored_model(str(tmp_path / "source")).weights
    got = our_logits(weights.load(read), read.config, ROWS)
    assert relative_distance(want, got) < 1e-4, values
    vocabulary = Vocabulary(str(tmp_path / "source"))
    converter.write_hf(tmp_path / "out", read, name, "float32", vocabulary)
    assert relative_distance(want, torch_logits(tmp_path / "out", ROWS)) < 1e-4, values


ODD = [None, True, 0, 1, -1, "x", "", [], [1], ["a"], [[1]], [None] * 4, [{}] * 4, {}, {"a": 1},
       {FULL: 3}, {FULL: {}, SLIDING: None}, 1.5, float("nan"), float("inf"), -0.5, 1e30,
       {"rope_type": []}, {"rope_type": "yarn", "factor": "2"}, {"type": {"a": 1}}]  # fmt: skip
KEYS = sorted({key for model in check_families.MODELS.values() for key in model} | {
    "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "max_position_embeddings", "rope_scaling", "rope_theta", "hidden_activation",
    "rope_local_base_freq", "no_rope_layer_interval", "sliding_window_pattern", "model_type",
    "partial_rotary_factor", "original_max_position_embeddings", "quantization_config",
    "use_bidirectional_attention", "use_mup", "mup_scale_factor", "input_mult", "eos_token_id",
})  # fmt: skip


def test_any_value_under_any_key_is_read_or_refused_in_one_line(tmp_path):
    draw = random.Random(0)
    for _ in range(1500):
        name, model = draw.choice(list(check_families.MODELS.items()))
        base = {
            "model_type": name.split(",")[0], "vocab_size": 96, "hidden_size": 32,
            "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4,
        }  # fmt: skip
        key, value = draw.choice(KEYS), draw.choice(ODD)
        (tmp_path / "config.json").write_text(json.dumps(base | model | {key: value}))
        try:
            read = hf_config.read(tmp_path)
            format = read.family.model_type.lower()
            plain, _ = hf_config.folded(read.config, format)
            write_config(tmp_path, hf_config.write(plain, format, "float32", read.values, 64))
            assert "NaN" not in (tmp_path / "config.json").read_text()
        except UserError as error:
            assert "\n" not in str(error), (key, value)


@pytest.mark.parametrize(("name", "values", "line"), [
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5, and"),
    ("llama", {"rope_parameters": {FULL: {"rope_theta": 5.0}}}, f"has {FULL}, but this family"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, f"has neither {FULL} nor"),
    ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers is .*each 0 or 1"),
    ("olmo2", {"rms_norm_eps": None}, "rms_norm_eps is missing; it must be a number"),
    ("gemma2", {"hidden_activation": None}, "hidden_activation is missing"),
])  # fmt: skip
def test_a_key_that_transformers_would_not_follow_is_refused(name, values, line, tmp_path):
    check_families.make(name, tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(old | values))
    with pytest.raises(UserError, match=line):
        hf_config.read(tmp_path)


def test_a_key_without_an_effect_in_transformers_is_noted(tmp_path):
    check_families.make("gemma3_text", tmp_path, attn_logit_softcapping=3.0)
    stored = opening.open_stored_model(str(tmp_path))
    assert stored.notes == (
        "config.json: attn_logit_softcapping has no effect, as in transformers",
    )
    read = stored.weights
    distance = relative_distance(
        torch_logits(tmp_path, ROWS), our_logits(weights.load(read), read.config, ROWS)
    )
    assert distance < 1e-4
