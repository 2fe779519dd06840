"""Import and export of weights without torch: round trips, and mistakes are refused."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flm_jax import growth, interop
from flm_jax.errors import UserError
from flm_jax.growth.receipt import unmeasured
from flm_jax.interop import names, tensor_files
from flm_jax.interop.converter import write_hf
from flm_jax.interop.tokenizer_files import Vocabulary
from flm_jax.interop.weights import Tree
from flm_jax.params import axes, trees
from flm_jax.store.chunk_writer import CheckpointWriter
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder, identity
from tests.commands import json_of, mistake
from tests.interop_models import (
    CONTEXT,
    SMALL,
    TARGETS,
    VOCAB,
    check_round_trip_of_a_run,
    distance,
    equal,
    ours,
)
from tests.models import TABLE, changed, random_params


def write(folder, config, format):
    """Writes a folder of random weights in small shards."""
    write_hf(
        folder,
        Tree(random_params(config, 0), config),
        format,
        "float32",
        Vocabulary(""),
        context=CONTEXT,
        shard_bytes=9000,
    )
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("weights") / "small", SMALL, "llama")


@pytest.mark.parametrize("format", ["llama", "granite"])
def test_weights_survive_a_round_trip_bit_identically(format, tmp_path):
    params, config = interop.load_hf(write(tmp_path / "out", SMALL, format))
    assert config == SMALL and equal(params, random_params(SMALL, 0))
    assert not equal(params, random_params(SMALL, 1))


def test_a_run_survives_a_round_trip_bit_identically(tmp_path):
    config = changed(SMALL, input_mult=3.0, output_mult=0.25)
    check_round_trip_of_a_run(write(tmp_path / "weights", config, "granite"), tmp_path)


def test_bin_files_need_torch(folder, tmp_path, monkeypatch):
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pytorch_model.bin: .*pip install 'flm_jax\[hf\]'"):
        interop.load_hf(tmp_path)


def test_dtypes_are_widened_and_rounded_once(folder, tmp_path):
    params, config = interop.load_hf(folder)
    for dtype in ("bfloat16", "float16"):
        interop.convert(str(folder), str(tmp_path / dtype), "llama", dtype=dtype)
        half, _ = interop.load_hf(tmp_path / dtype)
        np_dtype = getattr(ml_dtypes, dtype, None) or dtype
        for path, x in trees.flatten(params):
            got = dict(trees.flatten(half))[path]
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, x.astype(np_dtype).astype(np.float32))
        # Without `dtype` the source's dtype is kept, so nothing is rounded again.
        done = interop.convert(str(tmp_path / dtype), str(tmp_path / f"{dtype}2"), "llama")
        assert done["dtype"] == dtype and not any("rounded" in note for note in done["notes"])
        assert equal(half, interop.load_hf(tmp_path / f"{dtype}2")[0])
    with pytest.raises(UserError, match=r"lm_head.weight.* float16"):
        large = trees.unflatten(dict(trees.flatten(params)) | {"head": params["head"] * 1e8})
        interop.save_hf(tmp_path / "large", large, config, "llama", dtype="float16")
    assert not (tmp_path / "large").exists()


def test_files_are_compatible_with_the_safetensors_library(folder, tmp_path):
    """The library reads the written files, and its own files are read whole and in parts."""
    rng = np.random.default_rng(0)
    shapes = {"a": (7, 3), "b": (5,), "c": (4, 2, 3)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = tensor_files.TensorsWriter(tmp_path, shapes, np.dtype(np.float32), 120)
    for name, array in arrays.items():
        for row in reversed(range(len(array))):
            writer.write(name, row, array[row : row + 1])
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    read = {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}
    assert all(np.array_equal(read[name], arrays[name]) for name in shapes)
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    file = tensor_files.SafetensorsFile(tmp_path / "half.safetensors")
    assert file.shapes == shapes
    for name, array in half.items():
        np.testing.assert_array_equal(file.read(name, 1, 3), array[1:3])


def test_blocks_tile_every_parameter():
    config = dataclasses.replace(SMALL, num_layers=3)
    for most in (1, 700, 1 << 30):
        seen = {path: np.zeros(p.shape(axes.axis_sizes(config)), int) for path, p in TABLE.items()}
        for path, index in names.blocks(TABLE, axes.axis_sizes(config), most):
            seen[path][index] += 1
        assert all((x == 1).all() for x in seen.values())


def word_tokenizer(folder, tokens):
    """Writes a tokenizer.json with this number of tokens."""
    import tokenizers

    words = {f"w{i}": i for i in range(tokens)}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))


def test_a_vocabulary_is_padded_and_cut(folder, tmp_path):
    params, config = interop.load_hf(folder)
    interop.convert(str(folder), str(tmp_path / "more"), "llama", vocab_size=64)
    padded, larger = interop.load_hf(tmp_path / "more")
    assert larger.vocab_size == 64
    logits = ours(padded, larger)
    assert distance(ours(params, config), logits[..., :VOCAB]) < 1e-6
    assert not logits[..., VOCAB:].any()
    # Zero rows are padding. With a tokenizer, rows beyond its tokens are padding.
    interop.convert(str(tmp_path / "more"), str(tmp_path / "less"), "llama", vocab_size=VOCAB)
    assert equal(params, interop.load_hf(tmp_path / "less")[0])
    with pytest.raises(UserError, match=r"vocab_size is 40, but .* not zero"):
        interop.convert(str(folder), str(tmp_path / "cut"), "llama", vocab_size=40)
    shutil.copytree(folder, tmp_path / "known")
    word_tokenizer(tmp_path / "known", 45)
    with pytest.raises(UserError, match=r"vocab_size is 40, but .* has 45 tokens"):
        interop.convert(str(tmp_path / "known"), str(tmp_path / "cut"), "llama", vocab_size=40)
    assert not (tmp_path / "cut").exists()
    interop.convert(str(tmp_path / "known"), str(tmp_path / "cut"), "llama", vocab_size=45)
    np.testing.assert_array_equal(
        interop.load_hf(tmp_path / "cut")[0]["head"], params["head"][:, :45]
    )
    assert (tmp_path / "cut" / "tokenizer.json").exists()
    word_tokenizer(tmp_path / "known", 51)
    with pytest.raises(UserError, match="has 51 tokens, but the model's vocab_size is 50"):
        interop.convert(str(tmp_path / "known"), str(tmp_path / "out"), "flm")


def index_of(folder):
    return folder / "model.safetensors.index.json"


def _edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _first_shard(folder):
    return min(folder.glob("*.safetensors"))


def _rewrite(folder, change):
    """Merges all tensors into one file and applies `change` to them."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
        file.unlink()
    index_of(folder).unlink()
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def _wrong_index(folder):
    file_of = json.loads(index_of(folder).read_text())["weight_map"]
    first, last = min(file_of.values()), max(file_of.values())
    name = next(n for n, file in file_of.items() if file == last)
    _edit(index_of(folder), weight_map={**file_of, name: first})


def _no_tensor(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _more_tensors(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(3, np.float32)


def _other_shape(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].copy()


MISTAKES = {
    "a missing shard": (lambda f: _first_shard(f).unlink(), r"00001-of-.*: missing; .* holds mod"),
    "a truncated shard": (
        lambda f: _first_shard(f).write_bytes(_first_shard(f).read_bytes()[:-9]),
        r"00001-of-.*safetensors: truncated or damaged: model\.\S+ ends at byte",
    ),
    "a shard that ends in its header": (
        lambda f: _first_shard(f).write_bytes(_first_shard(f).read_bytes()[:50]),
        r"00001-of-.*safetensors: truncated or damaged",
    ),
    "an empty shard": (lambda f: _first_shard(f).write_bytes(b""), "truncated or damaged: 0 bytes"),
    "a wrong index": (_wrong_index, r"00001-of-.*: no tensor \S+, which model.safetensors.index"),
    "an index that is none": (lambda f: index_of(f).write_text("{}"), "no JSON object with a w"),
    "no weights": (lambda f: [x.unlink() for x in f.glob("model*")], "no weights"),
    "a missing tensor": (
        lambda f: _rewrite(f, _no_tensor),
        r"tensor model.layers.1.mlp.up_proj.weight \[.*missing",
    ),
    "an extra tensor": (
        lambda f: _rewrite(f, _more_tensors),
        r"model.safetensors: tensor model.layers.0.self_attn.q_proj.bias has no place",
    ),
    "another number of tokens": (
        lambda f: _rewrite(f, _other_shape),
        r"model.safetensors: model.embed_tokens.weight is \[49, 24\], config.json says \[50, 24\]",
    ),
    "an unknown architecture": (
        lambda f: _edit(f / "config.json", model_type="gpt2"),
        "config.json: model_type is 'gpt2'",
    ),
    "rope scaling": (
        lambda f: _edit(f / "config.json", rope_parameters={"rope_type": "longrope", "factor": 2}),
        "config.json: rope_parameters: RoPE is of type 'longrope'",
    ),
    "biases": (
        lambda f: _edit(f / "config.json", attention_bias=True),
        "q_proj.bias .* is missing",
    ),
    "another activation": (lambda f: _edit(f / "config.json", hidden_act="relu"), "hidden_act"),
    "no size": (lambda f: _edit(f / "config.json", hidden_size=None), "hidden_size is missing"),
    "heads that do not divide": (
        lambda f: _edit(f / "config.json", num_key_value_heads=4),
        "not a multiple of num_kv_heads",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no model"),
    "an incomplete config": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json: not JSON",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    change, message = MISTAKES[mistake]
    change(broken)
    with pytest.raises(UserError, match=message) as error:
        interop.convert(str(broken), str(tmp_path / "out"), "flm")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_mistakes_about_the_target(folder, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match=r"full exists and is not empty"):
        interop.convert(str(folder), str(tmp_path / "full"), "llama")
    with pytest.raises(UserError, match=r"teleflm.*head_dim 8 times num_heads 6 is not d_model 24"):
        interop.convert(str(folder), str(tmp_path / "out"), "teleflm")
    with pytest.raises(UserError, match="no run's folder"):
        interop.convert(str(folder), str(tmp_path / "out"), "llama", stage="1")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files.TensorsWriter, "write", full)
    with pytest.raises(UserError, match=r"out: No space left on device; .*out is not written"):
        interop.convert(str(folder), str(tmp_path / "out"), "llama")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_ramp_is_folded_by_its_step(folder, tmp_path):
    """The masks' value follows from the stage's config, its plan and the checkpoint's step."""
    interop.convert(str(folder), str(tmp_path / "run"), "flm")
    run = RunFolder(tmp_path / "run")
    experiment = run.stage(0, "imported").experiment()
    plan = growth.plan(SMALL, TARGETS["msg"], "msg")
    grown = dataclasses.replace(
        experiment.stages[0],
        name="grown",
        model=plan.target,
        steps=100,
        source="",
        growth=dataclasses.replace(experiment.stages[0].growth, ramp_steps=10),
    )
    chain = dataclasses.replace(experiment, stages=(*experiment.stages, grown))
    stage = run.stage(1, "grown")
    write_json(stage.config, identity(chain, 1, ""))
    stage.keep_growth(plan.to_json(), unmeasured(plan, None))
    params = random_params(plan.target, 0)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for step in (4, 10):
        writer = CheckpointWriter(stage.checkpoints / str(step), {"params": like}, {})
        for path, x in trees.flatten(params):
            writer.write(f"params/{path}", None, np.asarray(x))
        writer.finish()
    inside = str(stage.checkpoints / "4")
    done = interop.convert(inside, str(tmp_path / "inside"), "llama")
    assert done["notes"][:1] == ["masks of the growth at 0.4 are folded into the parameters"]
    masked = ours(params, plan.target, plan.masks(jnp.float32(0.4)))
    assert distance(masked, ours(*interop.load_hf(tmp_path / "inside"))) < 1e-4
    done = interop.convert(str(stage.checkpoints / "10"), str(tmp_path / "after"), "llama")
    assert not any("masks" in note for note in done["notes"])
    assert equal(params, interop.load_hf(tmp_path / "after")[0])


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    run = tmp_path / "run"
    to_run = ("convert", f"--source={folder}", f"--target={run}", "--format=flm")
    done = json_of(*to_run)
    assert done["format"] == "flm" and done["gb_per_s"] > 0
    assert json_of("inspect", str(run))["stages"][0]["name"] == "imported"
    assert "exists and is not empty" in mistake(*to_run)
    assert "--format is missing" in mistake(*to_run[:3])
    assert "float8" in mistake(*to_run[:2], "--target=x", "--format=llama", "--dtype=float8")
