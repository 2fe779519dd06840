"""Weights in and out, against transformers' own models; equalities have twins that must fail."""

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
from flm_jax.commands import config_files
from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.interop import names, tensor_files
from flm_jax.interop.converter import write_hf
from flm_jax.interop.names import TENSORS, Tensor
from flm_jax.interop.opening import open_model
from flm_jax.interop.weights import Tree
from flm_jax.params import axes, trees
from flm_jax.store.checkpoint import params_digest
from flm_jax.store.files import write_atomically, write_json
from flm_jax.store.leaves import CheckpointWriter
from flm_jax.store.lineage import RunFolder, identity
from tests.commands import json_of, mistake, run
from tests.models import grow, logits_of, random_params

torch = pytest.importorskip("torch", reason="the oracles are transformers' models: extra [hf]")
transformers = pytest.importorskip("transformers", reason="extra [hf]")
transformers.utils.logging.disable_progress_bar()

VOCAB = 50
_SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 2, "rms_norm_eps": 1e-3,
          "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
_WIDE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
_NARROW = {"hidden_size": 16, "intermediate_size": 36, "num_attention_heads": 4}
_MULTIPLIERS = {"use_mup": True, "input_mult": 1.7, "output_mult": 0.6, "mup_scale_factor": 2}
MODELS = {
    "llama": (transformers.LlamaConfig, _NARROW),
    "grouped": (transformers.LlamaConfig, _WIDE),
    "tied": (transformers.LlamaConfig, {**_NARROW, "tie_word_embeddings": True}),
    "granite": (
        transformers.GraniteConfig,
        {**_NARROW, "num_key_value_heads": 1, "embedding_multiplier": 3.0, "logits_scaling": 4.0,
         "residual_multiplier": 0.7, "attention_multiplier": 0.4},
    ),
    "teleflm": (transformers.LlamaConfig, _NARROW),
}  # fmt: skip


def make(kind, folder, **how):
    """A random model of transformers, saved; its logits by a function of tokens and so on."""
    cls, sizes = MODELS[kind]
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_config(cls(**_SIZES, **sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones hide bugs
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **how)
    if kind == "teleflm":
        file = folder / "config.json"
        values = {**json.loads(file.read_text()), **_MULTIPLIERS, "model_type": "TeleFLM"}
        file.write_text(json.dumps(values))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each kind's model and folder, made once; files are small shards."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = make(kind, folder, max_shard_size="8KB"), folder
        return made[kind]

    return get


# A full row, one padded on the right, one on the left.
SEGMENTS = np.ones((3, 11), int)
SEGMENTS[1, 7:] = SEGMENTS[2, :4] = 0
POSITIONS = np.maximum(np.cumsum(SEGMENTS, 1) - 1, 0)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, SEGMENTS.shape)


def ours(params, config, masks=None):
    batch = {"tokens": TOKENS, "segment_ids": SEGMENTS, "positions": POSITIONS}
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    return np.asarray(logits_of(config, params, batch, masks))


def theirs(model, multipliers=None):
    """TeleFLM's oracle is Llama and its two multipliers."""
    m = {"input_mult": 1, "output_mult": 1, "mup_scale_factor": 1} | (multipliers or {})
    with torch.no_grad():
        x = model.get_input_embeddings()(torch.tensor(TOKENS)) * m["input_mult"]
        out = model(
            inputs_embeds=x, attention_mask=torch.tensor(SEGMENTS),
            position_ids=torch.tensor(POSITIONS),
        )  # fmt: skip
    return (out.logits * (m["output_mult"] / m["mup_scale_factor"])).numpy()


def distance(a, b):
    """On real tokens: the largest difference over the root mean square."""
    a, b = a[SEGMENTS > 0], b[SEGMENTS > 0]
    return np.abs(a - b).max() / np.sqrt(np.mean(a**2))


def equal(one, two):
    leaves = [dict(trees.flatten(tree)) for tree in (one, two)]
    return all(np.array_equal(leaves[0][p], leaves[1][p]) for p in axes.TABLE)


@pytest.mark.parametrize("kind", MODELS)
def test_an_imported_model_has_the_same_logits(kind, saved):
    model, folder = saved(kind)
    params, config = interop.load_hf(folder)
    oracle = theirs(model, _MULTIPLIERS if kind == "teleflm" else None)
    assert distance(oracle, ours(params, config)) < 1e-4


def test_twins_of_the_import_fail(saved, monkeypatch):
    """Heads merged in the other order, a matrix not transposed, no multipliers: other logits."""
    model, folder = saved("grouped")
    oracle = theirs(model)
    for path, layout in {
        "layers/attention/query": (("q_per_kv", "kv_heads", "head_dim"), ("embed",)),
        "layers/attention/out": (("embed",), ("q_per_kv", "kv_heads", "head_dim")),
        "layers/attention/key": (("head_dim", "kv_heads"), ("embed",)),
    }.items():
        with monkeypatch.context() as patch:
            patch.setitem(TENSORS, path, Tensor(TENSORS[path].name, layout))
            assert distance(oracle, ours(*interop.load_hf(folder))) > 1e-2, path
    model, folder = saved("granite")
    params, config = interop.load_hf(folder)
    plain = dataclasses.replace(config, input_mult=1.0)
    assert distance(theirs(model), ours(params, plain)) > 1e-2
    with monkeypatch.context() as patch:  # what the config cannot say is multiplied in
        patch.setattr("flm_jax.interop.sources.scaled", lambda weights, *_: weights)
        assert distance(theirs(model), ours(*interop.load_hf(folder))) > 1e-2


@pytest.mark.parametrize(
    ("kind", "format"),
    [("llama", "granite"), ("grouped", "llama"), ("tied", "llama"), ("granite", "granite"),
     ("teleflm", "teleflm"), ("teleflm", "granite"), ("teleflm", "llama")],
)  # fmt: skip
def test_exports_have_the_same_logits_and_come_back_bit_equal(kind, format, saved, tmp_path):
    _, folder = saved(kind)
    params, config = interop.load_hf(folder)
    _, notes = write_hf(
        tmp_path / "out", Tree(params, config), format, "float32",
        interop.Vocabulary(str(folder)), shard_bytes=9000,
    )  # fmt: skip
    again, config_again = interop.load_hf(tmp_path / "out")
    folds = (kind, format) == ("teleflm", "llama")
    assert len(notes) == (2 if folds else 0)
    assert equal(params, again) != folds
    before = ours(params, config)
    if folds:
        assert distance(before, ours(again, config_again)) < 1e-5
    if format != "teleflm":  # stock transformers opens it
        opened, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert distance(before, theirs(opened)) < 1e-4
    else:
        values = json.loads((tmp_path / "out" / "config.json").read_text())
        assert values.items() >= _MULTIPLIERS.items()
        assert config_again == config
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 64
    )


SMALL = TransformerConfig(VOCAB, 2, 24, 6, 8, 40, 2, rope_theta=500.0, rms_norm_eps=1e-3)
TARGETS = {
    "msg": dataclasses.replace(
        SMALL, num_layers=3, d_model=40, num_heads=10, num_kv_heads=2, d_ff=52
    ),
    "tile": dataclasses.replace(SMALL, d_model=48, num_heads=12, num_kv_heads=4, d_ff=80),
    "identity": dataclasses.replace(SMALL, num_layers=4),
}


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
        assert distance(ours(grown, target), theirs(opened)) > 1e-2  # masks matter
        grown, target = growth.fold(grown, plan, 0.0)
    interop.save_hf(tmp_path / "grown", grown, target, "llama", vocabulary=str(folder))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert distance(theirs(model), theirs(opened)) < 1e-4
    assert opened.config.hidden_size == TARGETS[recipe].d_model


def test_a_run_comes_and_goes_bit_equal(saved, tmp_path):
    _, folder = saved("granite")
    params, config = interop.load_hf(folder)
    done = interop.convert(str(folder), str(tmp_path / "run"), "flm", memory=1 << 16)
    assert done["params"] == sum(x.size for _, x in trees.flatten(params))
    run = RunFolder(tmp_path / "run")
    (entry,) = run.stages()
    assert entry["params_digest"] == params_digest(params)
    assert entry["name"] == "imported" and entry["parent"] is None and entry["receipt"] is None
    assert run.stage(0, "imported").experiment().stages[0].model == config
    interop.convert(str(tmp_path / "run"), str(tmp_path / "out"), "granite", memory=1 << 16)
    assert equal(params, interop.load_hf(tmp_path / "out")[0])
    checkpoint = tmp_path / "run" / entry["checkpoint"]
    opened = interop.open_source(str(checkpoint))
    assert equal(params, interop.load(opened.weights)) and opened.name == "imported"
    for path in (folder, tmp_path / "run"):
        model = open_model(str(path))
        assert equal(params, model.params) and model.config == config
        assert model.context == 64 and not model.trained


def test_dtypes_are_widened_and_rounded_once(saved, tmp_path):
    _, folder = saved("grouped")
    params, config = interop.load_hf(folder)
    for dtype in ("bfloat16", "float16"):
        interop.convert(str(folder), str(tmp_path / dtype), "llama", dtype=dtype)
        half, _ = interop.load_hf(tmp_path / dtype)
        np_dtype = getattr(ml_dtypes, dtype, None) or dtype
        for path, x in trees.flatten(params):
            got = dict(trees.flatten(half))[path]
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, x.astype(np_dtype).astype(np.float32))
        # Without another wish the source's dtype stays, and nothing is lost a second time.
        done = interop.convert(str(tmp_path / dtype), str(tmp_path / f"{dtype}2"), "llama")
        assert done["dtype"] == dtype and not any("rounded" in note for note in done["notes"])
        assert equal(half, interop.load_hf(tmp_path / f"{dtype}2")[0])
    with pytest.raises(UserError, match=r"lm_head.weight.* float16"):
        large = trees.unflatten(dict(trees.flatten(params)) | {"head": params["head"] * 1e6})
        interop.save_hf(tmp_path / "large", large, config, "llama", dtype="float16")
    assert not (tmp_path / "large").exists()


def test_files_are_those_of_the_library(saved, tmp_path):
    """safetensors reads what is written here, and the reverse, whole and in parts."""
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
        seen = {path: np.zeros(p.shape(config), int) for path, p in axes.TABLE.items()}
        for path, index in names.blocks(config, most):
            seen[path][index] += 1
        assert all((x == 1).all() for x in seen.values())


def test_bin_files_hold_the_same(saved, tmp_path):
    model, folder = saved("grouped")
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert equal(interop.load_hf(folder)[0], interop.load_hf(tmp_path)[0])
    half = {name: x.to(torch.bfloat16) for name, x in model.state_dict().items()}
    torch.save(half, tmp_path / "pytorch_model.bin")
    got = interop.load_hf(tmp_path)[0]["final_norm"]
    np.testing.assert_array_equal(got, half["model.norm.weight"].float().numpy())
    # Two files with an index.
    state = list(model.state_dict().items())
    where = {}
    for file, part in (("one.bin", state[:5]), ("two.bin", state[5:])):
        torch.save(dict(part), tmp_path / file)
        where |= dict.fromkeys(dict(part), file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert equal(interop.load_hf(folder)[0], interop.load_hf(tmp_path)[0])
    (tmp_path / "two.bin").write_bytes((tmp_path / "two.bin").read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"two.bin: torch's loader for weights alone refuses it"):
        interop.load_hf(tmp_path)


class Code:
    def __reduce__(self):
        return (print, ("this code was run",))


def test_bin_files_run_no_code_and_need_torch(saved, tmp_path, monkeypatch, capsys):
    _, folder = saved("grouped")
    shutil.copy(folder / "config.json", tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"lm_head.weight": Code()}, file)
    with pytest.raises(UserError, match=rf"{file}: torch's loader for weights alone refuses it"):
        interop.load_hf(tmp_path)
    assert "was run" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pytorch_model.bin: .*install flm_jax\[hf\]"):
        interop.load_hf(tmp_path)


def word_tokenizer(folder, tokens):
    """A tokenizer.json of so many tokens."""
    import tokenizers

    words = {f"w{i}": i for i in range(tokens)}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))


def test_a_vocabulary_is_padded_and_cut(saved, tmp_path):
    _, folder = saved("grouped")
    params, config = interop.load_hf(folder)
    interop.convert(str(folder), str(tmp_path / "more"), "llama", vocab_size=64)
    padded, larger = interop.load_hf(tmp_path / "more")
    assert larger.vocab_size == 64
    logits = ours(padded, larger)
    assert distance(ours(params, config), logits[..., :VOCAB]) < 1e-6
    assert not logits[..., VOCAB:].any()
    # Zero rows are padding; with a tokenizer what it does not know is.
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
    """One file of all tensors, changed."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
        file.unlink()
    index_of(folder).unlink()
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def _wrong_index(folder):
    where = json.loads(index_of(folder).read_text())["weight_map"]
    first, last = min(where.values()), max(where.values())
    name = next(n for n, file in where.items() if file == last)
    _edit(index_of(folder), weight_map={**where, name: first})


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
        lambda f: _rewrite(f, _no_tensor), r"tensor model.layers.1.mlp.up_proj.weight \[.*missing"
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
        lambda f: _edit(f / "config.json", model_type="gpt2"), "config.json: model_type is 'gpt2'"
    ),
    "rope scaling": (
        lambda f: _edit(f / "config.json", rope_parameters={"rope_type": "yarn", "factor": 2}),
        "config.json: rope_parameters is of type 'yarn'",
    ),
    "biases": (lambda f: _edit(f / "config.json", attention_bias=True), "attention_bias is True"),
    "another activation": (lambda f: _edit(f / "config.json", hidden_act="gelu"), "hidden_act"),
    "no size": (lambda f: _edit(f / "config.json", hidden_size=None), "hidden_size is None"),
    "heads that do not divide": (
        lambda f: _edit(f / "config.json", num_key_value_heads=4), "not a multiple of num_kv_heads"
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no model"),
    "a torn config": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, saved, tmp_path):
    _, folder = saved("grouped")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    change, message = MISTAKES[mistake]
    change(broken)
    with pytest.raises(UserError, match=message) as error:
        interop.convert(str(broken), str(tmp_path / "out"), "flm")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_mistakes_about_the_target(saved, tmp_path, monkeypatch):
    _, folder = saved("grouped")
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


def test_a_ramp_is_folded_by_its_step(saved, tmp_path):
    """A checkpoint inside a ramp: the stage's config, plan and step say how far the masks are."""
    _, folder = saved("grouped")
    interop.convert(str(folder), str(tmp_path / "run"), "flm")
    run = RunFolder(tmp_path / "run")
    experiment = run.stage(0, "imported").experiment()
    plan = growth.plan(SMALL, TARGETS["msg"], "msg")
    grown = dataclasses.replace(
        experiment.stages[0], name="grown", model=plan.target, steps=100, source="",
        growth=dataclasses.replace(experiment.stages[0].growth, ramp_steps=10),
    )  # fmt: skip
    chain = dataclasses.replace(experiment, stages=(*experiment.stages, grown))
    stage = run.stage(1, "grown")
    write_json(stage.config, identity(chain, 1, ""))
    write_atomically(stage.plan, plan.to_json())
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
def test_the_command(saved, tmp_path):
    _, folder = saved("grouped")
    run = tmp_path / "run"
    to_run = ("convert", f"--source={folder}", f"--target={run}", "--format=flm")
    done = json_of(*to_run)
    assert done["format"] == "flm" and done["gb_per_s"] > 0
    assert json_of("inspect", str(run))["stages"][0]["name"] == "imported"
    assert "exists and is not empty" in mistake(*to_run)
    assert "--format is missing" in mistake(*to_run[:3])
    assert "float8" in mistake(*to_run[:2], "--target=x", "--format=llama", "--dtype=float8")


@pytest.mark.slow
def test_a_chain_goes_on_from_weights(tmp_path):
    """The first stage's parameters come from a folder, are not trained, and grow."""
    config = config_files.experiment(config_files.shipped("demo").get_config("smoke"))
    model = config.stages[0].model
    params = random_params(model, 0)
    interop.save_hf(tmp_path / "hf", params, model, "teleflm", vocabulary="bytes")
    workdir = tmp_path / "run"
    command = (
        "train", "--config=configs/demo.py:smoke", f"--workdir={workdir}",
        f"--config.stages[0].source={tmp_path / 'hf'}", "--config.stages[0].steps=0",
        "--config.stages[1].steps=8", "--config.stages[2].steps=8",
    )  # fmt: skip
    wrong = mistake(*command, "--config.stages[0].model.d_ff=88", by=run)
    assert f"model.d_ff is 88, but source {tmp_path / 'hf'} has 84" in wrong
    assert "does not exist" not in wrong and not any(workdir.iterdir())
    status, _, err = run(*command)
    assert status == 0, err
    first, second, _ = RunFolder(workdir).stages()
    assert first["params_digest"] == params_digest(params)
    assert first["steps"] == first["tokens"] == 0
    assert second["receipt"]["max_abs_logit_diff"] <= 1e-4 * second["receipt"]["logit_scale"]
    assert abs(first["eval"]["bpb_end"] - second["eval"]["bpb_start"]) < 1e-4
    # A grown stage goes out, with the bytes' tokenizer.
    json_of(
        "convert", f"--source={workdir}", f"--target={tmp_path / 'out'}",
        "--format=granite", "--stage=medium",
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n\treturn 'é\x00\x7f\xad漢'"
    assert tokenizer(text).input_ids == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
