"""What a chain takes from its first stage's source: its model and its vocabulary."""

import dataclasses
import functools
import json
import shutil

import ml_collections
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from flm_jax import config as config_lib
from flm_jax import interop
from flm_jax.commands import config_files
from flm_jax.config import DataConfig, ExperimentConfig, GrowthConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.interop.opening import open_stored_model
from flm_jax.interop.stage_source import check_function, check_vocabulary, resolved
from flm_jax.runs import chain
from flm_jax.sft.config import SftConfig
from flm_jax.sft.fine_tune import open_base
from flm_jax.store.lineage import RunFolder
from tests.commands import call, mistake
from tests.models import SMALL, changed, random_params

stage_of = functools.partial(
    StageConfig, steps=0, batch_size=8, learning_rate=1e-3, matrix_learning_rate=1e-3
)
TEXT = "def add(a, b):\n    return a + b\n" * 40
DRAWN = changed(SMALL, vocab_size=300, dtype="float32", mup_base_width=0)
MODEL = changed(DRAWN, matrix_init_std=0.02, vector_init_std=0.02)  # files have no such values


def write_bpe(folder, tokens=270):
    """Writes a byte-level BPE tokenizer into a folder."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of Hugging Face files with a tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    interop.save_hf(folder, random_params(DRAWN, 0), DRAWN, "granite", context=64)
    write_bpe(folder)
    return folder


def two_stages(source, first="source", second=None, **data):
    """A chain from a source; its second stage has one layer more unless `second` says otherwise."""
    second = {"base": "previous", "num_layers": 3} if second is None else second
    grown = GrowthConfig(recipe="identity", ramp_steps=2, rewarmup_steps=1, calibration_sequences=2)
    return ExperimentConfig(
        stages=(
            stage_of("base", first, source=str(source)),
            stage_of("grown", second, steps=3, growth=grown),
        ),
        data=DataConfig(**{"vocabulary": "source", "sequence_length": 32, **data}),
    )


def test_models_and_vocabulary_come_from_the_source(source):
    second = {"base": "source", "num_layers": 4, "rope": {"factor": 2.0}}
    got = resolved(two_stages(source, second=second))
    assert got.stages[0].model == MODEL == interop.load_hf(source)[1]
    assert got.stages[1].model == dataclasses.replace(
        MODEL, num_layers=4, rope=dataclasses.replace(MODEL.rope, factor=2.0)
    )
    assert got.data.vocabulary == str(source)
    assert resolved(got) == got
    # "previous" has the changes of the stage before, "source" has not.
    third = {"base": "previous", "num_layers": 5}
    got = resolved(two_stages(source, {"base": "source", "dtype": "bfloat16"}, third))
    assert [s.model.dtype for s in got.stages] == ["bfloat16", "bfloat16"]
    assert got.stages[1].model.num_layers == 5


def test_a_config_without_a_source_is_unchanged():
    config = ExperimentConfig(stages=(stage_of("a", MODEL),))
    assert resolved(config) == config


def test_a_mapping_gives_the_same_chain(source):
    config = two_stages(source)
    assert config_lib.experiment(config_files.plain(config_files.to_config_dict(config))) == config
    single = {"model": "source", "stage": {f.name: getattr(config.stages[0], f.name)
              for f in dataclasses.fields(StageConfig) if f.name != "model"}}  # fmt: skip
    assert resolved(config_lib.experiment(single)).stages[0].model == MODEL


MISTAKES = {
    "no source": (two_stages(""), "stage base, which has none; set its source"),
    "no stage before": (two_stages("SOURCE", "previous"), "no stage is before it; give 'source'"),
    "an unknown field": (
        two_stages("SOURCE", second={"base": "source", "layers": 3}),
        r"config.stages\[1\].model.layers: TransformerConfig has no such field",
    ),
    "a wrong nested type": (
        two_stages("SOURCE", second={"base": "source", "rope": {"factor": "x"}}),
        r"config.stages\[1\].model.rope.factor is 'x' of type str; it must be float",
    ),
    "an impossible value": (two_stages("SOURCE", {"base": "source", "num_heads": 3}), "num_heads"),
    "no model": (two_stages("nowhere"), "nowhere holds no model"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_refused_in_one_line(kind, source):
    config, words = MISTAKES[kind]
    if config.stages[0].source == "SOURCE":
        first = dataclasses.replace(config.stages[0], source=str(source))
        config = dataclasses.replace(config, stages=(first, *config.stages[1:]))
    with pytest.raises(UserError, match=words) as caught:
        resolved(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["next", {"base": "next"}, {"base": 3}, {"base": None}, 7])
def test_other_bases_are_refused(model):
    with pytest.raises(UserError, match=r"StageConfig.model is .*(TransformerConfig|one of)"):
        stage_of("base", model)


def test_a_source_without_a_tokenizer_has_no_vocabulary(source, tmp_path):
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"'source', but .* has no tokenizer; give"):
        resolved(two_stages(tmp_path / "hf"))
    check_vocabulary(DataConfig(vocabulary="bytes"), open_stored_model(str(tmp_path / "hf")))


CONFIG_FILE = """
from flm_jax.commands import config_files
from flm_jax.config import *
from tests.test_stage_source import two_stages

def get_config():
    return config_files.to_config_dict(two_stages({source!r}, **{more!r}))
"""


def parsed(tmp_path, source, *overrides, **more):
    """The experiment of a config file with overrides, as a command gets it."""
    from flm_jax.commands.describe import COMMAND

    file = tmp_path / "chain.py"
    file.write_text(CONFIG_FILE.format(source=str(source), more=more))
    parsed = COMMAND.parse("describe", [f"--config={file}", *overrides])
    assert isinstance(parsed.config, ml_collections.ConfigDict)
    return config_files.experiment(parsed.config)


def test_overrides_reach_every_field_of_a_model_from_the_source(source, tmp_path):
    got = parsed(
        tmp_path,
        source,
        "--config.stages[0].model.dtype=bfloat16",
        "--config.stages[1].model.num_layers=6",
        "--config.stages[1].model.rope.factor=2.5",
        "--config.stages[1].model.layer_kinds=('full', 'full_nope')",
        "--config.stages[1].model.tied=true",
    )
    assert got.stages[0].model == changed(MODEL, dtype="bfloat16")
    assert got.stages[1].model == changed(
        MODEL,
        dtype="bfloat16",
        num_layers=6,
        layer_kinds=("full", "full_nope"),
        tied=True,
        rope=dataclasses.replace(MODEL.rope, factor=2.5),
    )
    assert parsed(tmp_path, source) == resolved(two_stages(source))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.d_ff=x", "give a value of type int"),
        ("model.num_layers=x", "give a value of type int, as 3"),
        ("model.layers=3", "has no field 'layers'"),
        ("model.rope.factr=3", "did you mean 'factor'"),
        ("model.base=next", "'next'; give a TransformerConfig"),
    ],
)
def test_wrong_overrides_are_refused(override, words, source, tmp_path):
    with pytest.raises(UserError, match=words):
        parsed(tmp_path, source, f"--config.stages[1].{override}")


# A value of each field that differs from the source's, with the fields that it needs.
OTHER = {
    "vocab_size": {"vocab_size": 301}, "num_layers": {"num_layers": 3},
    "d_model": {"d_model": 13}, "num_heads": {"num_heads": 8}, "head_dim": {"head_dim": 8},
    "d_ff": {"d_ff": 21}, "num_kv_heads": {"num_kv_heads": 4}, "rope_theta": {"rope_theta": 7.0},
    "rms_norm_eps": {"rms_norm_eps": 1e-3}, "input_mult": {"input_mult": 1.0},
    "output_mult": {"output_mult": 1.0}, "mup_base_width": {"mup_base_width": 6},
    "tied": {"tied": True}, "qkv_bias": {"qkv_bias": True}, "out_bias": {"out_bias": True},
    "mlp_bias": {"mlp_bias": True}, "norms": {"norms": "both"}, "qk_norm": {"qk_norm": "head"},
    "activation": {"activation": "gelu"}, "layer_kinds": {"layer_kinds": ("full", "full_nope")},
    "window": {"window": 3}, "attention_mult": {"attention_mult": 0.3},
    "attention_softcap": {"attention_softcap": 3.0}, "logit_softcap": {"logit_softcap": 3.0},
    "residual_mult": {"residual_mult": 0.5},
    "mup_base_depth": {"mup_base_depth": 1, "parametrisation": "completep"},
    "rope.factor": {"rope": config_lib.RopeConfig(factor=2.0)},
    "rope.fraction": {"rope": config_lib.RopeConfig(fraction=1 / 3)},
}  # fmt: skip


@pytest.mark.parametrize("field", OTHER)
def test_every_field_of_the_function_is_compared_and_named(field, source):
    stored = open_stored_model(str(source))
    model = changed(MODEL, **OTHER[field])
    with pytest.raises(UserError) as caught:
        check_function(stage_of("base", model, source=str(source)), stored)
    message = str(caught.value)
    assert f"model.{field} is " in message and "or model to 'source'" in message
    for part in message.split("model.")[1:]:  # every name in the message is a field
        name = part.split(" is ")[0]
        assert name in OTHER or name == "parametrisation", message


def test_all_fields_are_known_to_set_the_function_or_not():
    """A new field of the model must be listed here as one that is compared, or one that is not."""
    others = {"parametrisation", "matrix_init_std", "vector_init_std", "depth_scaled_init", "dtype",
              "remat", "attention", "scan_unroll", "num_tokens", "loss_chunks", "splash",
              "cudnn_documents", "gradient_reduction"}  # fmt: skip
    compared = {name.split(".")[0] for name in OTHER} | {"qk_norm_eps"}
    fields = {f.name for f in dataclasses.fields(config_lib.TransformerConfig)}
    assert fields == compared | others and not compared & others


def test_other_fields_may_differ(source):
    stored = open_stored_model(str(source))
    # The same factors by other fields: two times the multiplier over two times the width.
    model = changed(
        MODEL, dtype="bfloat16", remat="full", attention="plain", vector_init_std=0.1,
        mup_base_width=6, output_mult=2 * MODEL.output_mult, layer_kinds=("full",),
        qk_norm_eps=0.5,
    )  # fmt: skip
    check_function(stage_of("base", model, source=str(source)), stored)


def test_the_eps_of_head_norms_is_compared_where_there_are_such_norms(tmp_path):
    model = changed(MODEL, qk_norm="head", input_mult=1.0, output_mult=1.0)
    interop.save_hf(tmp_path / "hf", random_params(model, 0), model, "qwen3")
    stored = open_stored_model(str(tmp_path / "hf"))
    check_function(stage_of("base", changed(model, qk_norm_eps=model.rms_norm_eps)), stored)
    with pytest.raises(UserError, match=r"model.qk_norm_eps is 0.5"):
        check_function(stage_of("base", changed(model, qk_norm_eps=0.5)), stored)


def test_another_vocabulary_is_refused_unless_told_otherwise(source, tmp_path):
    stored = open_stored_model(str(source))
    words = rf"data\.vocabulary is 'bytes', but source {source} has a tokenizer of 270 tokens"
    with pytest.raises(UserError, match=words):
        check_vocabulary(DataConfig(), stored)
    check_vocabulary(DataConfig(other_vocabulary=True), stored)
    # Another BPE tokenizer of the same size is refused too; a copy in another file is the same.
    (tmp_path / "copy").mkdir()
    shutil.copy(source / "tokenizer.json", tmp_path / "copy")
    check_vocabulary(DataConfig(vocabulary=str(tmp_path / "copy/tokenizer.json")), stored)
    fields = json.loads((source / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    a, b = list(vocabulary)[40:42]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "copy/tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"has a tokenizer of 270 tokens"):
        check_vocabulary(DataConfig(vocabulary=str(tmp_path / "copy")), stored)


def test_bytes_are_the_same_vocabulary_before_and_after_a_conversion(tmp_path):
    interop.save_hf(tmp_path / "hf", random_params(MODEL, 0), MODEL, "granite", vocabulary="bytes")
    stored = open_stored_model(str(tmp_path / "hf"))
    check_vocabulary(DataConfig(vocabulary="bytes"), stored)
    interop.convert(str(tmp_path / "hf"), str(tmp_path / "run"), "flm")
    check_vocabulary(DataConfig(vocabulary="bytes"), open_stored_model(str(tmp_path / "run")))


def test_fine_tuning_refuses_another_vocabulary(source):
    config = SftConfig(base=str(source), paths=("a",), batch_size=4, data=DataConfig())
    with pytest.raises(UserError, match=r"data.vocabulary is 'bytes', but source"):
        open_base(config)
    own = dataclasses.replace(config, data=DataConfig(vocabulary="source"))
    assert open_base(own).data.vocabulary == str(source)


def test_a_chain_with_another_vocabulary_or_function_is_refused_and_writes_nothing(
    source, tmp_path
):
    (tmp_path / "chain.py").write_text(CONFIG_FILE.format(source=str(source), more={}))
    command = ("train", f"--config={tmp_path / 'chain.py'}", f"--workdir={tmp_path / 'run'}")
    got = mistake(*command, "--config.data.vocabulary=bytes")
    assert "data.vocabulary is 'bytes'" in got and f"'{source}'" in got
    got = mistake(*command, *(f"--config.stages[{i}].model.num_kv_heads=4" for i in (0, 1)))
    assert "model.num_kv_heads is 4, but source" in got and "has 2; set it to 2" in got
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_chain_from_a_source_trains_and_resumes(source, tmp_path):
    texts = tmp_path / "text"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text(TEXT)
    more = {"task": "text_files", "path": str(texts), "shuffle_tokens": 1 << 12}
    (tmp_path / "chain.py").write_text(CONFIG_FILE.format(source=str(source), more=more))
    command = ("train", f"--config={tmp_path / 'chain.py'}", f"--workdir={tmp_path / 'run'}")
    status, _, err = call(*command)
    assert status == 0, err
    run = RunFolder(tmp_path / "run")
    # The stored config is resolved: no "source" is left, and the same call finds the run complete.
    stored = [run.stage(i, s["name"]).experiment() for i, s in enumerate(run.stages())]
    assert [s.stages[0].model for s in stored] == [MODEL, changed(MODEL, num_layers=3)]
    assert {s.data.vocabulary for s in stored} == {str(source)}
    config = two_stages(source, **more)
    assert chain.run(config, str(run.path)) == run.stages()
    # Negative control: the source is trained on its own tokens, which bytes are not.
    own = run.stages()[0]["eval"]["bpb_end"]
    other = dataclasses.replace(
        config,
        stages=config.stages[:1],
        data=dataclasses.replace(config.data, vocabulary="bytes", other_vocabulary=True),
    )
    assert chain.run(other, str(tmp_path / "bytes"))[0]["eval"]["bpb_end"] != own
