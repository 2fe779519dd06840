"""What belongs to a model beside its weights: ids, settings, templates, terms, card, rounding."""

import json

import numpy as np
import pytest

from flm_jax import interop
from flm_jax.data.chat_template import TemplateConfig
from flm_jax.errors import UserError
from flm_jax.interop import converter, hf_config, weights
from flm_jax.interop.model_card import with_readme
from flm_jax.interop.tokenizer_files import Vocabulary, write_config
from flm_jax.params import trees
from tests.commands import mistake
from tests.interop_models import SMALL
from tests.models import random_params


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL, 0)


def edit(file, **values):
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | values))


def read(file):
    return json.loads(file.read_text())


@pytest.fixture
def source(params, tmp_path):
    """A folder with all that a model on the Hub has, and a tokenizer with 50 tokens."""
    import tokenizers

    folder = tmp_path / "source"
    interop.save_hf(folder, params, SMALL, "llama")
    words = {f"w{i}": i for i in range(SMALL.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder / "config.json", bos_token_id=1, eos_token_id=[2, 7], pad_token_id=None)
    edit(folder / "generation_config.json", eos_token_id=[2, 7], temperature=0.5)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n\n# Theirs\n")
    (folder / "License.txt").write_text("the terms")
    (folder / "USE_POLICY.md").write_text("the policy")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    return folder


@pytest.mark.parametrize("by_a_run", [False, True])
def test_all_files_are_carried_over(by_a_run, source, tmp_path):
    origin = source
    if by_a_run:
        interop.convert(str(source), str(tmp_path / "run"), "flm")
        origin = tmp_path / "run"
    out = tmp_path / "out"
    interop.convert(str(origin), str(out), "llama")
    for name in ("License.txt", "USE_POLICY.md", "chat_template.jinja", "tokenizer.json",
                 "additional_chat_templates/tools.jinja"):  # fmt: skip
        assert (out / name).read_text() == (source / name).read_text(), name
    assert read(out / "config.json")["eos_token_id"] == [2, 7]
    settings = read(out / "generation_config.json")
    assert settings["eos_token_id"] == [2, 7] and settings["temperature"] == 0.5
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\ntags: [x]\n---\n")  # where the Hub looks for it
    assert card.index("# out") < card.index("# Theirs") and card.count("---\n") == 2


def test_a_card_comes_before_a_readme_without_a_header():
    assert with_readme("card\n", "text") == "card\ntext"
    assert with_readme("card\n", "") == "card\n"
    assert with_readme("card\n", "\ufeff---\r\na: b\r\n---\r\ntext").startswith(
        "---\r\na: b\r\n---"
    )
    rule = "text\n---\nmore\n---\n"
    assert with_readme("card\n", rule) == "card\n" + rule


def test_a_template_of_the_fine_tuning_replaces_all_others(source, tmp_path):
    vocabulary = Vocabulary(str(source))
    model = weights.HuggingFace(source)
    template = TemplateConfig(jinja="{{ bos_token }}")
    out = tmp_path / "out"
    converter.write_hf(out, model, "llama", "float32", vocabulary, template=template)
    assert read(out / "tokenizer_config.json")["chat_template"] == "{{ bos_token }}"
    assert not [path for path in out.rglob("*.jinja")]


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "decoder_start_token_id"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("value", "kept"), [
    (50, None), (-1, None), ([7, 50, 51], [7]), ([50], None), ("2", None), (49, 49),
])  # fmt: skip
def test_an_id_that_the_vocabulary_lacks_is_left_out_with_a_note(
    key, name, value, kept, source, tmp_path
):
    edit(source / name, **{key: value})
    report = interop.convert(str(source), str(tmp_path / "out"), "llama")
    assert read(tmp_path / "out" / name)[key] == kept
    notes = [note for note in report["notes"] if f"{name}: {key}" in note]
    assert len(notes) == (kept != value)


@pytest.mark.parametrize("value", [None, "64", 0, -5, 1.5])
def test_a_context_that_is_no_number_of_tokens_is_refused_or_replaced(value, source, tmp_path):
    edit(source / "config.json", max_position_embeddings=value)
    edit(source / "generation_config.json", max_length=99)
    if value is None:  # not known
        interop.convert(str(source), str(tmp_path / "out"), "llama")
        assert read(tmp_path / "out/config.json")["max_position_embeddings"] == 2048
    else:
        line = mistake("convert", f"--source={source}", f"--target={tmp_path}/out",
                       "--format=llama")  # fmt: skip
        assert "config.json: max_position_embeddings is" in line
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_tokenizers_own_model_leaves_only_its_ids(params, source, tmp_path):
    """A vocabulary may lie beside the config.json of any model."""
    config = {"model_type": "bert", "max_position_embeddings": 512, "is_encoder_decoder": True,
              "quantization_config": {"bits": 4}, "n_head": 12, "eos_token_id": 3}  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    interop.save_hf(out, params, SMALL, "llama", vocabulary=str(source), context=77)
    values = read(out / "config.json")
    assert values["eos_token_id"] == 3 and values["max_position_embeddings"] == 77
    assert not {"is_encoder_decoder", "quantization_config", "n_head"} & set(values)


_ANY = ("llama", "mistral", "granite", "smollm3")  # families that have a plain model


@pytest.mark.parametrize("format", _ANY)
def test_no_id_is_left_to_the_familys_own(format):
    """transformers puts a family's own ids where a file has none; SmolLM3's pad is 128004."""
    values = hf_config.write(SMALL, format, "float32", {}, 64)
    assert {key: values[key] for key in hf_config.SPECIAL_IDS} == dict.fromkeys(
        hf_config.SPECIAL_IDS
    )
    same = hf_config.write(SMALL, format, "float32", {"model_type": format}, 64)
    assert same["pad_token_id"] is None and "eos_token_id" not in same


@pytest.mark.parametrize("format", _ANY)
def test_a_model_without_a_vocabulary_opens_in_transformers(format, params, tmp_path):
    transformers = pytest.importorskip("transformers", reason="extra [hf]")
    pytest.importorskip("torch", reason="extra [hf]")
    interop.save_hf(tmp_path / "out", params, SMALL, format)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id is None and model.config.eos_token_id is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_reported_with_its_largest_size(dtype, params, source, tmp_path):
    report = interop.convert(str(source), str(tmp_path / "out"), "llama", dtype=dtype)
    rounded = interop.load_hf(tmp_path / "out")[0]
    pairs = zip(trees.flatten(params), trees.flatten(rounded), strict=True)
    largest = max(float(np.abs(a - b).max()) for (_, a), (_, b) in pairs)
    assert f"parameters are rounded to {dtype}, by at most {largest:.2g}" in report["notes"]
    again = interop.convert(str(tmp_path / "out"), str(tmp_path / "again"), "llama")
    assert not any("rounded" in note for note in again["notes"])


def test_rounding_of_a_run_is_reported_too(params, tmp_path):
    from safetensors.numpy import load_file, save_file

    interop.save_hf(tmp_path / "source", params, SMALL, "llama")
    file = tmp_path / "source/model.safetensors"
    wide = {name: x.astype(np.float64) for name, x in load_file(file).items()}
    wide["model.norm.weight"][3] = 1 + 2.0**-30
    save_file(wide, file)
    report = interop.convert(str(tmp_path / "source"), str(tmp_path / "run"), "flm")
    assert f"parameters are rounded to float32, by at most {2.0**-30:.2g}" in report["notes"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 3.4e38])
def test_values_that_a_file_cannot_hold_are_not_written(value, dtype, params, tmp_path):
    """3.4e38 is finite in float32 alone."""
    leaves = {path: np.array(x) for path, x in trees.flatten(params)}
    leaves["layers/mlp/up"][1, 2, 3] = value
    tree = trees.unflatten(leaves)
    if value == 3.4e38 and dtype == "float32":
        interop.save_hf(tmp_path / "out", tree, SMALL, "llama", dtype=dtype)
        return
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight has values that"):
        interop.save_hf(tmp_path / "out", tree, SMALL, "llama", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_json_that_is_written_has_no_nan(tmp_path):
    values = {"vocab_size": 50, "max_position_embeddings": 64, "own": float("nan")}
    (tmp_path / "generation_config.json").write_text('{"temperature": Infinity}')
    write_config(tmp_path, values)
    assert read(tmp_path / "config.json")["own"] is None
    assert read(tmp_path / "generation_config.json")["temperature"] is None
