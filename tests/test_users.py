"""Typical mistakes of users: each gives one line with the field, the values and what to do.

Rows of the command line stop before anything trains. `TAKEN` are the negative controls: the same
inputs with a right value are not refused.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

from flm_jax import StageConfig, TransformerConfig, UserError, grow, init_state, plan
from flm_jax.commands import config_files
from flm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    GrowthConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.growth import Plan
from flm_jax.runs import limits
from flm_jax.runtime import display
from flm_jax.studies.config import ArmConfig, ProbeConfig
from tests import tiny_chain
from tests.commands import ROOT, call, mistake
from tests.models import TINY, TINY_GROWN, changed, random_params

CHAIN = "--config=tests/tiny_chain.py"
KEY = jax.random.key(0)
STAGE = StageConfig("a", TINY, 1, 1, 1e-3, 1e-3)
FILE = "from flm_jax.commands import config_files\nfrom flm_jax.config import *\n"

# Overrides of a chain that `flm train` refuses before it writes anything -> words of the line.
OVERRIDES = {
    "eval.every_steps=0": ("config.eval.every_steps is 0", "above 0"),
    "checkpoint.every_steps=0": ("config.checkpoint.every_steps is 0", "every_minutes"),
    "checkpoint.keep=0": ("config.checkpoint.keep is 0", "above 0"),
    "eval.sequences=0": ("config.eval.sequences is 0", "above 0"),
    "eval.batch_size=-1": ("config.eval.batch_size is -1", "0 or above"),
    "schedule.warmup_steps=-5": ("config.schedule.warmup_steps is -5", "0 or above"),
    "schedule.decay_steps=-4": ("config.schedule.decay_steps is -4", "0 or above"),
    "schedule.total_steps=-5": ("config.schedule.total_steps is -5", "0 or above"),
    "schedule.warmup_steps=500": ("500", "24 steps", "shorter"),
    "schedule.decay_steps=500": ("502", "24 steps", "shorter"),
    "optimizer.weight_decay=-1": ("config.optimizer.weight_decay is -1", "0 or above"),
    "optimizer.b1=1": ("config.optimizer.b1 is 1", "[0, 1)"),
    "data.sequence_length=999999999": ("stage small", "999999999", "TB", "memory"),
    "stages[0].batch_size=80000000": ("stage small", "80000000", "TB", "memory"),
    "eval.batch_size=900000000": ("stage small", "eval.batch_size 900000000", "TB"),
    "stages[1].growth.calibration_sequences=900000000": (
        "stage large",
        "growth.calibration_sequences 900000000",
        "TB",
    ),
    "stages[1].model.num_kv_heads=3": ("stage large", "stages[1].model.num_heads is 8", "3"),
    "stages[1].model.head_dim=3": ("stage large", "head_dim is 3", "even"),
    "stages[1].model.d_model=8": ("stage large", "d_model", "'embed'", "8", "16", "small"),
    "stages[1].model.d_ff=20": ("stage large", "d_ff", "'mlp'", "20", "24", "small"),
    "stages[1].model.num_layers=0": ("stage large", "num_layers", "'layers'", "0", "1", "small"),
    "stages[1].growth.recipe=nope": ("stage large", "no operator 'nope'", "msg"),
    "stages[1].growth.moments=no": ("stage large", "growth.moments is 'no'", "dual"),
    "stages[1].growth.rewarmup_ratio=2": ("stage large", "rewarmup_ratio is 2", "[0, 1]"),
    "stages[1].growth.ramp_steps=50": ("stage large", "ramp_steps is 50", "12"),
    "stages[1].batch_size=7": ("stage large", "batch_size 7", "4 devices"),
    "stages[0].learning_rate=abc": ("stages[0].learning_rate=abc", "float", "0.02"),
    "stages[0].lerning_rate=1": ("lerning_rate", "'learning_rate'"),
    "mesh.fsdp=64 mesh.data=0": ("fsdp 64", "128 devices", "there are 8", "these work"),
}

# Other command lines that are refused.
LINES = {
    "a config without .py": (
        "train --config=tests/tiny_chain --workdir=x", ("tests/tiny_chain", "tiny_chain.py?")
    ),
    "a config of fine-tuning": (
        "train --config=configs/sft_demo.py --workdir=x", ("flm sft", "ExperimentConfig")
    ),
    "a config of a probe": (
        "train --config=configs/probe_growth.py --workdir=x", ("flm growth probe",)
    ),
    "a config of a µP study": ("describe --config=configs/mup_study.py", ("flm mup check",)),
    "a chain given to fine-tuning": (f"sft {CHAIN} --workdir=x", ("flm train", "SftConfig")),
    "a chain given to a probe": (f"growth probe {CHAIN} --workdir=x", ("flm train",)),
    "a missing folder": ("inspect /nowhere/run", ("/nowhere/run", "no such folder")),
    "a folder as a model": ("generate /nowhere/run --prompt=a", ("/nowhere/run holds no model",)),
    "two folders as a model": ("generate runs/a runs/b --prompt=a", ("unexpected", "--prompt")),
    "two runs to inspect": ("inspect /nowhere/a /nowhere/b", ("flm compare",)),
    "a flag's other name": (
        "generate --checkpoint=x --prompt=a --max_tokens=5", ("max_tokens", "--max_new_tokens?")
    ),
    "a typing error in a flag": (f"train {CHAIN} --workdr=x", ("workdr", "--workdir?")),
    "a field without config.": (
        f"describe {CHAIN} --stages[0].steps=3", ("--config.stages[0].steps?",)
    ),
}  # fmt: skip

# The text of a config file -> words of the line.
FILES = {
    "a stage without the tuple's comma": (
        "def get_config():\n"
        "    model = TransformerConfig(32, 1, 8, 2, 4, 8)\n"
        "    return config_files.to_config_dict(\n"
        "        ExperimentConfig(stages=(StageConfig('a', model, 1, 1, 1.0, 1.0))))",
        ("ExperimentConfig.stages", "StageConfig", "(entry,)"),
    ),
    "a dataclass": (
        "def get_config():\n"
        "    model = TransformerConfig(32, 1, 8, 2, 4, 8)\n"
        "    return ExperimentConfig((StageConfig('a', model, 1, 1, 1.0, 1.0),))",
        ("get_config must return a ConfigDict", "config_files.to_config_dict"),
    ),
    "a tuple as a recipe": (
        "def get_config():\n"
        "    config = config_files.shipped('demo').get_config('smoke')\n"
        "    config.stages[0].growth.recipe = ('tile', 'stack')\n"
        "    return config",
        ("own.py:5", "field 'recipe'", "('tile', 'stack')", "tuple", "'tile,layers=identity'"),
    ),
    "text as a tuple": (
        "def get_config():\n"
        "    config = config_files.shipped('demo').get_config('smoke')\n"
        "    config.stages[0].train_paths = 'head'\n"
        "    return config",
        ("field 'train_paths'", "'head'", "of type str", "a tuple", "(entry,)"),
    ),
    "text as a group": (
        "def get_config():\n"
        "    config = config_files.shipped('demo').get_config('smoke')\n"
        "    config.schedule = 'cosine'\n"
        "    return config",
        ("field 'schedule'", "'cosine'", "a group of fields"),
    ),
    "one stage for the stages": (
        "def get_config():\n"
        "    config = config_files.shipped('demo').get_config('smoke')\n"
        "    config.stages = (config.stages[0])\n"
        "    return config",
        ("field 'stages'", "a group of fields", "a tuple", "(entry,)"),
    ),
    "text as a number": (
        "def get_config():\n    return config_files.to_config_dict(EvalConfig(sequences='96'))",
        ("EvalConfig.sequences is '96' of type str", "int"),
    ),
    "a recipe as a dict": (
        "def get_config():\n"
        "    return config_files.to_config_dict(GrowthConfig(recipe={'layers': 'stack'}))",
        ("GrowthConfig.recipe", "of type dict", "'tile,layers=identity'"),
    ),
}


GROWTH = plan(TINY, TINY_GROWN, "tile,layers=stack")


def state_of(tx, model=TINY):
    """A train state without arrays, so that nothing is compiled."""
    return jax.eval_shape(lambda: init_state(model, tx, KEY))


def grown(state):
    """The shapes of a grown state."""
    return jax.eval_shape(lambda x: grow(x, GROWTH, KEY), state)


PYTHON = {
    "a fraction of a layer": (lambda: changed(TINY, num_layers=2.5), ("num_layers is 2.5", "int")),
    "no layer width": (lambda: changed(TINY, d_ff=0), ("d_ff is 0", "above 0")),
    "a number as text": (
        lambda: dataclasses.replace(STAGE, learning_rate="1e-3"),
        ("StageConfig.learning_rate is '1e-3'", "float"),
    ),
    "one path as text": (
        lambda: dataclasses.replace(STAGE, train_paths="head"),
        ("StageConfig.train_paths is 'head'", "tuple of str", "(entry,)"),
    ),
    "one stage without a tuple": (lambda: ExperimentConfig(STAGE), ("stages", "(entry,)")),
    "a smaller stage": (
        lambda: ExperimentConfig((STAGE, dataclasses.replace(
            STAGE, name="b", steps=200, model=changed(TINY, d_ff=8)))),
        ("stage b", "'mlp'", "8", "24"),
    ),
    "no evaluation": (lambda: EvalConfig(every_steps=0), ("every_steps is 0",)),
    "no checkpoint": (lambda: CheckpointConfig(every_steps=0), ("every_steps is 0",)),
    "negative decay": (lambda: OptimizerConfig(weight_decay=-0.1), ("weight_decay is -0.1",)),
    "negative warm-up": (lambda: ScheduleConfig(warmup_steps=-1), ("warmup_steps is -1",)),
    "a text as a vocabulary": (
        lambda: open_tokenizer(str(ROOT / "README.md")),
        ("README.md", "text file", "tokenizer.json"),
    ),
    "a name of the hub": (lambda: open_tokenizer("gpt2"), ("'gpt2'", "hf download", "--local-dir")),
    "no text": (lambda: DataConfig(sequence_length=0), ("sequence_length is 0",)),
    "a number that is none": (lambda: GrowthConfig(noise_db=float("nan")), ("noise_db is nan",)),
    "a recipe of numbers": (lambda: plan(TINY, TINY_GROWN, {"layers": 3}), ("{'layers': 3}",)),
    "a recipe for no axis": (lambda: plan(TINY, TINY_GROWN, {"x": "tile"}), ("'x'", "tile")),
    "variables": (
        lambda: grow({"params": random_params(TINY, 0)}, GROWTH, KEY), ("tree['params']",)
    ),
    "nnx's variables": (
        lambda: grow(
            nnx.State(jax.tree.map(nnx.Param, random_params(TINY, 0))), GROWTH, KEY
        ),
        ("nnx Param", "nnx.to_pure_dict"),
    ),
    "adafactor": (
        lambda: grown(state_of(optax.adafactor(1e-3))),
        ("v_row", "register_moments"),
    ),
    "names of arms with one folder": (
        lambda: ProbeConfig(
            ExperimentConfig((STAGE, StageConfig("b", TINY, 200, 1, 1.0, 1.0))),
            (ArmConfig("tile + stack"), ArmConfig("tile, stack")),
        ),
        ("tile + stack", "differ"),
    ),
}  # fmt: skip


def said(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_value_is_refused_before_anything_is_written(override, tmp_path):
    values = (f"--config.{value}" for value in override.split())
    line = mistake("train", CHAIN, f"--workdir={tmp_path}/run", *values)
    assert all(word in line for word in OVERRIDES[override]), line
    assert not (tmp_path / "run/stages").exists()


@pytest.mark.parametrize("name", LINES)
def test_a_wrong_command_line_is_refused(name):
    args, words = LINES[name]
    line = mistake(*args.split(" "))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_config_file_is_refused(name, tmp_path):
    text, words = FILES[name]
    (tmp_path / "own.py").write_text(FILE + text)
    line = mistake("describe", f"--config={tmp_path}/own.py")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name", PYTHON)
def test_a_wrong_call_is_refused(name):
    call, words = PYTHON[name]
    line = said(call)
    assert all(word in line for word in words) and "\n" not in line, line


def test_right_values_are_taken():
    """Negative control of the tables above."""
    CheckpointConfig(every_steps=0, every_minutes=1.0)
    ScheduleConfig(warmup_steps=0)
    ExperimentConfig((STAGE,))
    dataclasses.replace(STAGE, train_paths=("head",))
    config = config_files.experiment(tiny_chain.get_config())
    limits.check_memory(config, jax.devices())
    assert limits.remarks(config) == []


def test_numpys_numbers_and_recipes_by_axis_make_plans():
    sizes = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}
    numbers = {k: np.int64(v) if type(v) is int else v for k, v in sizes.items()}
    small = TransformerConfig(**numbers)
    assert small == TINY and type(small.d_model) is int
    made = plan(small, TINY_GROWN, "mlp=tile,embed=tile,kv_heads=tile,layers=stack")
    axes = {"mlp": "tile", "embed": "tile", "kv_heads": "tile", "layers": "stack"}
    assert plan(small, TINY_GROWN, axes) == made == Plan.from_json(made.to_json())


def test_states_of_optax_and_flax_grow_with_their_moments():
    tx = optax.adamw(1e-3)
    state, want = state_of(tx), state_of(tx, GROWTH.config)
    assert grown(state) == want != state
    of_flax = train_state.TrainState(state.step, None, state.params, tx, state.opt_state)
    after = grown(of_flax)
    assert type(after) is train_state.TrainState
    assert (after.params, after.opt_state) == (want.params, want.opt_state)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (ScheduleConfig("cosine", 2, total_steps=5), ("total_steps is 5", "24 steps", "0.1")),
        (ScheduleConfig(), ("warmup_steps is 100", "24 steps", "0.24")),
        (ScheduleConfig("cosine", 2, decay_steps=4), ("decay_steps is 4", "'cosine'")),
        (ScheduleConfig("constant", 2, total_steps=5), ()),
        (ScheduleConfig("wsd", 2, total_steps=24, decay_steps=4), ()),
    ],
)
def test_numbers_that_miss_the_schedule_give_a_remark(schedule, words):
    config = config_files.experiment(tiny_chain.get_config())
    remarks = limits.remarks(dataclasses.replace(config, schedule=schedule))
    assert len(remarks) == bool(words)
    assert all(word in line for line in remarks for word in words), remarks


def test_a_long_rewarmup_names_its_stage():
    config = config_files.experiment(tiny_chain.get_config())
    small, large = config.stages
    large = dataclasses.replace(large, growth=dataclasses.replace(large.growth, rewarmup_steps=13))
    (line,) = limits.remarks(dataclasses.replace(config, stages=(small, large)))
    assert line.startswith("stage large") and "13" in line and "12" in line


def test_help_lists_the_fields_of_the_commands_config():
    status, text, _ = call("train", "--help")
    lines = [line.strip() for line in text.splitlines()]
    assert status == 0
    assert "stages[0].learning_rate: float (required)  # peak, for vector-like parameters" in text
    assert "schedule.kind: str = 'wsd'" in lines
    assert "stages[0].growth.ramp_steps: int = 100" in text and "SftConfig" not in text
    for command, field in {
        "sft": "base: str (required)",
        "growth probe": "arms[0].name: str (required)",
        "mup sweep": "width_factors: tuple[int, ...] = (1, 2, 4)",
    }.items():
        status, text, _ = call(*command.split(), "--help")
        assert status == 0 and field in text
    _, text, _ = call("inspect", "--help")  # takes no config
    assert "--config" not in text and "schedule.kind" not in text
    _, text, _ = call("samples", "select", "--help")
    assert "flm_jax/sft" not in text and text.count("docs/selection.md") < 4


def test_nothing_is_wrapped_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    display.open_console().print("word " * 60, "[1]")
    assert capsys.readouterr().out.count("\n") == 1
    display.open_console(force_terminal=True).print("word " * 60)
    assert capsys.readouterr().out.count("\n") > 1
