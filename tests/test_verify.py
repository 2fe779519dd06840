"""`flm convert --verify`: the comparison with transformers passes, and fails where it should."""

import importlib.util
import json

import numpy as np
import pytest
import safetensors.numpy

from flm_jax import interop
from flm_jax.errors import UserError
from flm_jax.interop import verify
from tests.commands import call, json_of, mistake
from tests.models import SMALL, changed, random_params

needs_hf = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the oracle: extra [hf]"
)
# Non-default values everywhere: both multipliers, grouped queries, norms of heads in qwen3.
MODELS = {
    "granite": changed(SMALL, vocab_size=41, dtype="float32", mup_base_width=0, residual_mult=0.7),
    "qwen3": changed(
        SMALL, vocab_size=41, dtype="float32", mup_base_width=0, input_mult=1.0, output_mult=1.0,
        qk_norm="head", qkv_bias=True, out_bias=True,
    ),
}  # fmt: skip


def written(folder, format):
    model = MODELS[format]
    interop.save_hf(folder, random_params(model, 0), model, format, context=40)
    return str(folder)


def edit(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@needs_hf
@pytest.mark.parametrize(
    ("source", "format", "dtype"),
    [("granite", "llama", "float32"), ("granite", "granite", "bfloat16"),
     ("granite", "llama", "float16"), ("qwen3", "qwen3", "float32"), ("qwen3", "flm", "")],
)  # fmt: skip
def test_conversions_pass(source, format, dtype, tmp_path):
    folder, target = written(tmp_path / "a", source), str(tmp_path / "b")
    verify.check_possible(folder, format)
    interop.convert(folder, target, format, dtype=dtype, vocab_size=48)
    result = verify.verify(folder, target)
    assert result["ok"] and verify.failure(result) == ""
    assert result["distance"] < 1e-5
    rounded = dtype in ("bfloat16", "float16")
    assert 1e-3 < result["change"] < 0.3 if rounded else result["change"] < 1e-5


# What is wrong in the written folder, and which of the two comparisons notices it.
@needs_hf
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", ["another tensor", "another theta", "another cap", "infinite"])
def test_mistakes_in_the_target_are_noticed(wrong, dtype, tmp_path, monkeypatch):
    folder, target = written(tmp_path / "a", "granite"), tmp_path / "b"
    interop.convert(folder, str(target), "granite", dtype=dtype)
    if wrong == "another theta":
        edit(target, rope_parameters={"rope_type": "default", "rope_theta": 3.0}, rope_theta=3.0)
    if wrong == "another tensor":
        (file,) = target.glob("*.safetensors")
        tensors = safetensors.numpy.load_file(file)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = np.roll(tensors[name], 1, axis=0)
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    if wrong in ("another cap", "infinite"):
        # This library reads the files in another way than transformers.
        ours = verify.our_logits
        change = {"another cap": lambda x: 5 * np.tanh(x / 5), "infinite": lambda x: x * np.inf}
        monkeypatch.setattr(verify, "our_logits", lambda *a: [change[wrong](x) for x in ours(*a)])
    result = verify.verify(folder, str(target))
    assert not result["ok"] and "verify failed" in verify.failure(result)
    if wrong == "another cap":
        assert result["change"] <= result["change_limit"] and result["distance"] > 1e-3
    elif wrong == "infinite":
        assert result["distance"] is None and "not finite" in verify.failure(result)
    else:
        assert result["change"] > result["change_limit"]
    json.dumps(result, allow_nan=False)


@needs_hf
def test_the_command_prints_the_distances_and_exits_with_1_above_the_limit(tmp_path, monkeypatch):
    folder = written(tmp_path / "a", "granite")
    args = ("convert", f"--source={folder}", "--format=granite", "--verify")
    result = json_of(*args, f"--target={tmp_path / 'b'}")["verify"]
    assert result["ok"] and result["distance"] < 1e-5
    monkeypatch.setattr(verify, "LIMIT", 1e-12)
    status, out, err = call(*args, f"--target={tmp_path / 'c'}")
    assert status == 1 and "(limit 1e-12)" in out and "verify failed" in err.splitlines()[-1]
    assert "verify" not in json_of(*args[:-1], f"--target={tmp_path / 'd'}")


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_extra_is_named_before_anything_is_written(package, tmp_path, monkeypatch):
    folder, find = written(tmp_path / "a", "granite"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    got = mistake(
        "convert", f"--source={folder}", f"--target={tmp_path / 'b'}", "--format=llama", "--verify"
    )
    assert f"verify needs the package {package}" in got and "pip install 'flm_jax[hf]'" in got
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@needs_hf
def test_what_transformers_does_not_have_is_refused(tmp_path):
    folder, run = written(tmp_path / "a", "granite"), str(tmp_path / "run")
    with pytest.raises(UserError, match="has no model_type 'TeleFLM'"):
        verify.check_possible(folder, "teleflm")
    interop.convert(folder, run, "flm")
    with pytest.raises(UserError, match="both runs of this library; leave verify out"):
        verify.check_possible(run, "flm")
