"""Files of weights: headers against the safetensors library, buffers, dtypes, tied heads."""

import json
import random
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from flm_jax import interop
from flm_jax.errors import UserError
from flm_jax.interop import opening
from flm_jax.interop.tensor_files import SafetensorsFile
from flm_jax.params import trees
from tests.interop_models import SMALL, equal
from tests.models import random_params

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "source"
    interop.save_hf(folder, random_params(SMALL, 0), SMALL, "llama")
    return folder


def change(folder, tensors=None, **keys):
    """Changes the tensors of a folder, and keys in its config.json."""
    file = folder / "model.safetensors"
    if tensors is not None:
        save_file(tensors(load_file(file)), file)
    values = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(values))


def header(entries, data):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def damaged(draw):
    """A file of two tensors whose header has a mistake, or none."""
    a = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    b = {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]}
    key = draw.choice(list(a))
    odd = {
        "dtype": ["F32", "F16", "f32", None, 3, [], "I8"],
        "shape": [[2, 3], [3, 2], [6], [-2, -3], [2.0, 3], ["2", 3], None, 6, "ab", [], [0],
                  [True, 6], [[2, 3]], {"0": 2}],
        "data_offsets": [[0, 24], [24, 0], [-1, 23], [0, 23], [0, 40], [8, 32], [0], None, "ab",
                         [0, 24, 24], ["0", "24"], [0.0, 24.0], [None, 24], {"0": 0, "24": 24}],
    }[key]  # fmt: skip
    which = draw.choice([a, b])
    which[key] = draw.choice(odd)
    if draw.random() < 0.1:
        which.pop(key)
    entries = draw.choice([{"a": a, "b": b}, {"b": b, "a": a}, {"a": a}, {"a": a, "b": dict(a)}])
    return header(entries, bytes(draw.choice([40, 40, 40, 24, 39, 48, 0])))


def test_what_the_library_refuses_is_refused_in_one_line(tmp_path):
    draw, refused = random.Random(0), 0
    for number in range(1500):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(damaged(draw))
        try:
            with safetensors.safe_open(file, "np") as theirs:
                want = {name: theirs.get_tensor(name) for name in theirs.keys()}  # noqa: SIM118
        except Exception:  # it raises several types
            want = None
        try:
            ours = SafetensorsFile(file)
            got = {name: ours.read(name, 0, shape[0]) for name, shape in ours.shapes.items()
                   if shape}  # fmt: skip
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            refused += 1
        else:
            assert want is not None, file.read_bytes()
            assert all(np.array_equal(x, want[name]) for name, x in got.items())
        file.unlink()
    assert 0 < refused < 1500


@pytest.mark.parametrize(("name", "dtype"), [
    ("model.rotary_emb.inv_freq", np.float32),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", np.float16),
    ("model.rotary_emb.original_inv_freq", np.float32),
    ("model.rotary_emb_local.inv_freq", np.float32),
    ("model.rotary_emb.sliding_attention_inv_freq", np.float32),
    ("model.layers.1.self_attn.rotary_emb.cos_cached", np.float32),
    ("model.position_ids", np.int64),
])  # fmt: skip
@pytest.mark.parametrize("indexed", ["whole", "in the index", "not in the index", "only there"])
def test_buffers_of_older_versions_are_ignored(name, dtype, indexed, folder):
    want = interop.load_hf(folder)[0]
    tensors = load_file(folder / "model.safetensors")
    buffer = {} if indexed == "only there" else {name: np.ones(4, dtype)}
    if indexed == "whole":
        save_file(tensors | buffer, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").unlink()
        save_file(tensors | buffer, folder / "model-00001-of-00001.safetensors")
        listed = [*tensors, *([] if indexed == "not in the index" else [name])]
        index = {"weight_map": dict.fromkeys(listed, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(want, interop.load_hf(folder)[0])


def test_another_tensor_is_still_refused(folder):
    """Negative control: only buffers are ignored."""
    change(folder, lambda tensors: tensors | {"model.rotary_emb.weight": np.ones(4, np.float32)})
    with pytest.raises(UserError, match=r"tensor model.rotary_emb.weight has no place"):
        interop.load_hf(folder)


def test_more_layers_than_tensors_are_refused_at_once(folder):
    for layers, line in (
        (9_999, r"num_hidden_layers 9999, but the files have"),
        (10**6, r"num_layers is 10{6}; it must be at most 10000"),
        (10**12, r"num_hidden_layers is 10{12}; it must be an integer above 0 and below 2\^31"),
    ):
        change(folder, num_hidden_layers=layers)
        with pytest.raises(UserError, match=line):
            opening.open_stored_model(str(folder))


def test_a_tied_model_may_have_its_head_alone(folder):
    """transformers ties the embedding to the tensor that is there."""

    def without(tensors):
        del tensors[EMBEDDING]
        return tensors

    want = load_file(folder / "model.safetensors")[HEAD]
    change(folder, without, tie_word_embeddings=True)
    stored = opening.open_stored_model(str(folder))
    params, config = interop.load_hf(folder)
    assert config.tied and np.array_equal(params["embedding"], want)
    assert stored.notes == (f"config.json says tie_word_embeddings, and the files have {HEAD} "
                            f"alone; it is also {EMBEDDING}, as in transformers",)  # fmt: skip
    change(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=f"tensor {EMBEDDING} .* is missing"):
        interop.load_hf(folder)


def test_a_tied_head_alone_is_read_as_by_transformers(folder):
    torch = pytest.importorskip("torch", reason="extra [hf]")
    transformers = pytest.importorskip("transformers", reason="extra [hf]")
    change(folder, lambda tensors: {k: x for k, x in tensors.items() if k != EMBEDDING},
           tie_word_embeddings=True)  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = theirs.get_input_embeddings().weight.numpy()
    assert np.array_equal(interop.load_hf(folder)[0]["embedding"], want)


@pytest.mark.parametrize(("one", "other", "kept"), [
    ("float16", "bfloat16", "float32"), ("float32", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"), ("float64", "float16", "float32"),
])  # fmt: skip
def test_mixed_dtypes_are_kept_without_loss_where_files_can(one, other, kept, folder, tmp_path):
    def mixed(tensors):
        dtypes = [np.dtype(getattr(ml_dtypes, name, name)) for name in (one, other)]
        return {
            name: x.astype(dtypes[number % 2]) for number, (name, x) in enumerate(tensors.items())
        }

    change(folder, mixed)
    params = interop.load_hf(folder)[0]
    report = interop.convert(str(folder), str(tmp_path / "out"), "llama")
    assert report["dtype"] == kept
    assert any("of several dtypes" in note for note in report["notes"]) == (one != other)
    written = dict(trees.flatten(interop.load_hf(tmp_path / "out")[0]))
    for path, x in trees.flatten(params):
        np.testing.assert_array_equal(written[path], x.astype(np.float32), path)
