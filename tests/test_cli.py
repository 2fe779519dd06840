"""The commands' front, and commands without training: describe, configs, mistakes."""

import ast
import pathlib
import runpy
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from flm_jax.commands import config_files, front
from flm_jax.commands.command import Command, NoFlags
from flm_jax.config import DataConfig, ExperimentConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.mapping import differences, from_mapping, to_dict
from flm_jax.models import Transformer
from flm_jax.params import axes, counts, trees
from flm_jax.sft.config import SftConfig
from flm_jax.studies.config import MupStudyConfig, ProbeConfig
from flm_jax.studies.growth_study.config import GrowthStudyConfig
from flm_jax.studies.less_is_more import LessIsMoreConfig
from tests.commands import ROOT, call, json_of, mistake, peak_memory
from tests.models import TABLE

CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common"))
FRONTS = sorted(p for p in (ROOT / "experiments").glob("*.py") if p.stem != "__init__")
DEMO = "--config=configs/demo.py"


def load(path, variant=""):
    namespace: dict = {"__name__": path.stem}
    exec(compile(path.read_text(), path, "exec"), namespace)
    return namespace["get_config"](variant), namespace["__doc__"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_resolves_and_opens_with_its_command(path):
    config, doc = load(path)
    assert f"--config=configs/{path.name}" in doc
    with pytest.raises(UserError, match="variant 'nonsense'"):
        load(path, "nonsense")
    if "base" in config or "sft" in config:  # fine-tuning: the base has the model
        kind = SftConfig if "base" in config else LessIsMoreConfig
        assert isinstance(config_files.dataclass_of(kind, config), kind)
        return
    if "models" in config:  # the study of growth
        assert config_files.dataclass_of(GrowthStudyConfig, config).models
        return
    source = config.get("stages") and config.stages[0].source
    if source and not pathlib.Path(source).exists():  # the user downloads it
        with pytest.raises(UserError, match=f"{source} holds no model"):
            config_files.experiment(config)
        return
    if "experiment" in config:  # a study over an experiment
        kind = ProbeConfig if "arms" in config else MupStudyConfig
        chain = config_files.dataclass_of(kind, config).experiment
    else:
        chain = config_files.experiment(config)
    assert isinstance(chain, ExperimentConfig)
    for stage in chain.stages:
        shapes = jax.eval_shape(
            Transformer(stage.model).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
        )["params"]
        assert {p: s.shape for p, s in trees.flatten(shapes)} == {
            p: param.shape(axes.axis_sizes(stage.model)) for p, param in TABLE.items()
        }


@pytest.mark.parametrize(
    ("name", "override", "params"),
    [
        ("proxy", "", 281_215_488),
        ("52b", "", 52_817_829_888),
        ("52b", "--config.model.vocab_size=80384", 52_824_121_344),
        ("102b", "", 102_198_487_040),
        ("1t", "", 1_083_735_265_280),
        ("1t", "--config.model.vocab_size=81920", 1_083_813_908_480),
    ],
)
def test_describe_counts_the_papers_parameters(name, override, params):
    args = [a for a in (f"--config=configs/tele_flm_{name}.py", override) if a]
    described = json_of("describe", *args)
    assert described["params"] == params == sum(described["params_by_component"].values())
    assert described["param_bytes"] == 4 * params
    assert described["optimizer_bytes"] == 8 * params
    assert described["flops_per_token_train"] == 3 * described["flops_per_token_forward"]


def test_describe_allocates_nothing_at_1t():
    args = ("describe", "--config=configs/tele_flm_1t.py", "--json")
    start = time.monotonic()
    assert peak_memory(*args) < 5e8
    assert time.monotonic() - start < 15


def test_describe_lists_a_chain():
    stages = json_of("describe", "--config=configs/tele_flm_1t_chain.py")["stages"]
    assert [s["params"] for s in stages] == [
        52_817_829_888,
        102_198_487_040,
        1_083_735_265_280,
    ]


def test_flops_by_hand():
    """One layer of multi-head attention, counted product by product."""
    D, F, V, H, T = 8, 20, 11, 4, 16
    config = TransformerConfig(V, 1, D, 2, H, F)
    projections = 4 * 2 * D * (2 * H)
    scores_and_values = 2 * 2 * T * (2 * H)
    mlp = 3 * 2 * D * F
    assert counts.flops_per_token_forward(config, T) == (
        projections + scores_and_values + mlp + 2 * D * V
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((DEMO, "--config.stages[0].model.vocab_sze=3"), ("vocab_sze", "vocab_size")),
        ((DEMO, "--config.stages[0].model.vocab_size=abc"), ("vocab_size", "abc")),
        ((DEMO, "--config.seed=1", "--config.stages[7].steps=1"), ("stages[7]", "0 to 2")),
        ((DEMO, "--config.seed", "1", "--config.data.seed", "abc"), ("data.seed=abc", "int")),
        ((DEMO, "--config.data=1"), ("--config.data", "group")),
        (("--config=README.md",), ("README.md", "SyntaxError")),
        (("--config=configs/common.py",), ("configs/common.py", "get_config")),
        ((DEMO, "--config.modle.vocab_size=1"), ("modle",)),
        (
            (
                DEMO,
                "--config.stages[0].model.num_heads=3",
                "--config.stages[0].model.num_kv_heads=2",
            ),
            ("num_heads is 3", "num_kv_heads 2"),
        ),
        (("--config=configs/nope.py",), ("configs/nope.py", "no such file")),
        (("--config=configs/demo.py:nope",), ("variant 'nope'", "smoke")),
        ((), ("--config is missing",)),
        ((DEMO, "--jsn"), ("jsn",)),
        ((DEMO, "extra"), ("'extra'",)),
    ],
)
def test_a_mistake_is_one_line(args, words):
    line = mistake("describe", *args)
    assert all(word in line for word in words), line


def test_an_error_in_a_config_file_says_where(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(variant=''):\n    return {}['missing']\n")
    assert f"{path}:2: KeyError: 'missing'" in mistake("describe", f"--config={path}")


def test_flag_and_value_may_be_two_words():
    described = json_of(
        "describe", "--config", "configs/tele_flm_52b.py", "--config.model.vocab_size", "80384"
    )
    assert described["params"] == 52_824_121_344


def test_json_is_alone_on_standard_output():
    """The output of other programs and of C++ libraries goes to standard error."""
    code = (
        "import os, sys, types\n"
        "from flm_jax.commands import front\n"
        "from flm_jax.commands.command import Command, NoFlags\n"
        "def main(call):\n    print('noise'); os.system('echo noise'); return {'a': 1}\n"
        "noisy = types.SimpleNamespace(COMMAND=Command(main, NoFlags, config='none'))\n"
        "sys.modules['flm_jax.commands.inspect'] = noisy\n"
        "sys.exit(front.run(['inspect', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == '{"a": 1}\n'
    assert done.stderr.count("noise") == 2


def test_help_is_quick_and_does_not_import_jax():
    """In new processes, as a user calls it; the best of 3 is not slowed down by other programs."""
    code = (
        "import sys\n"
        "from flm_jax.commands import front\n"
        "status = front.run(['--help'])\n"
        "print([m for m in ('jax', 'tensorflow', 'numpy') if m in sys.modules], file=sys.stderr)\n"
        "sys.exit(status)"
    )
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        seconds.append(time.monotonic() - start)
        assert "growth checkpoint" in done.stdout
        assert done.stderr.strip() == "[]"
    assert min(seconds) < 1.5


def command_modules():
    """Returns the module of each command, as a name and a path."""
    for name in front.COMMANDS:
        yield (
            f"flm_jax.commands.{name.replace(' ', '.')}",
            (ROOT / "flm_jax/commands" / f"{name.replace(' ', '/')}.py"),
        )


def imports_of(text):
    """Returns every absolute name that Python source imports, also inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_commands(text):
    return sorted({module for module, _ in command_modules()} & set(imports_of(text)))


@pytest.mark.parametrize("path", [path for _, path in command_modules()], ids=lambda p: p.stem)
def test_no_command_imports_another(path):
    """Flags that several commands share are in `model_flags`, which is not a command."""
    assert imported_commands(path.read_text()) == []


def test_an_imported_command_is_noticed():
    """Negative control."""
    for line in (
        "from flm_jax.commands.generate import Flags",
        "from flm_jax.commands import generate",
        "def main():\n    import flm_jax.commands.generate",
    ):
        assert imported_commands(line) == ["flm_jax.commands.generate"]
    assert imported_commands("from flm_jax.commands.model_flags import ModelFlags") == []


def test_help_shows_an_example_and_the_flags():
    status, out, _ = call("train", "--help")
    assert status == 0
    assert "--config=configs/demo.py --workdir=runs/demo" in out and "--workdir" in out
    assert "--[no]distributed" in out and "--config" in out


def test_help_lists_every_command_with_its_first_line():
    status, out, _ = call("--help")
    lines = [line.split("  ") for line in out.splitlines()]
    listed = {words[1]: words[-1].strip() for words in lines if len(words) > 2}
    assert status == 0 and set(front.COMMANDS) <= set(listed)
    assert all(listed[name].endswith((".", "?", "report.")) for name in front.COMMANDS)
    status, out, _ = call("growth", "--help")
    assert status == 0 and "growth checkpoint" in out and "mup" not in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("trian",), ("no command 'trian'", "did you mean 'train'?", "flm --help")),
        (("growth", "chek"), ("no 'chek'", "did you mean 'check'?", "checkpoint")),
        (("growth", "--list"), ("needs a subcommand", "check, fuzz, checkpoint, probe, draw")),
        ((), ("give a command", "flm --help")),
        (("inspect",), ("got no argument", "give flm inspect DIR")),
        (("inspect", "a", "b"), ("got a b", "give flm inspect DIR")),
        (("growth", "check", "--config=configs/demo.py"), ("config",)),
    ],
)
def test_a_wrong_command_is_one_line(args, words):
    line = mistake(*args)
    assert line.startswith("flm") and all(word in line for word in words), line


@pytest.mark.parametrize("path", FRONTS, ids=lambda p: p.stem)
def test_every_module_of_experiments_is_a_command(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"experiments.{path.stem}", run_name="__main__")
    assert ended.value.code == 0
    assert "  flm " in capsys.readouterr().out or path.stem in front.GROUPS


def test_every_command_is_a_module_of_experiments_too():
    words = {name.split()[0] for name in front.COMMANDS}
    assert words <= {path.stem for path in FRONTS}


def test_benchmark_without_a_subcommand_is_the_old_benchmark(monkeypatch, capsys):
    """The command became a group of commands; the old call still works."""
    for given in (["--help"], ["step", "--help"]):
        monkeypatch.setattr(sys, "argv", ["benchmark", *given])
        with pytest.raises(SystemExit):
            runpy.run_module("experiments.benchmark", run_name="__main__")
        assert "flm benchmark step --config" in capsys.readouterr().out


def test_calls_share_nothing():
    """A flag or an override affects neither the next call nor another command."""
    override = (DEMO, "--config.stages[0].model.d_ff=400", "--mup")
    one = json_of("describe", *override)
    assert "parameters" in one["stages"][0]
    two = json_of("describe", DEMO)
    assert "parameters" not in two["stages"][0]
    assert two["stages"][0]["params_by_component"]["mlp"] == 4 * 3 * 128 * 336
    assert "Unknown command line flag 'mup'" in mistake("growth", "check", "--mup")


def test_a_local_config_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("configs/demo.py", "demo.py", "demo"):
        assert config_files.find(given) == ROOT / "configs/demo.py"
    (tmp_path / "demo.py").write_text("")
    assert config_files.find("demo.py") == pathlib.Path("demo.py")
    for given in ("elsewhere/demo.py", "demo.txt", "configs/__init__.py", "nope"):
        with pytest.raises(UserError, match=r"no such file.*tele_flm_52b"):
            config_files.find(given)


def test_a_config_of_another_folder_uses_shipped_ones_and_dataclasses(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from flm_jax.commands import config_files\n"
        "@dataclasses.dataclass\n"
        "class Size:\n    layers: int = 2\n"
        "def get_config(variant=''):\n"
        "    config = config_files.shipped('tele_flm_proxy').get_config()\n"
        "    config.model.num_layers = Size().layers\n"
        "    return config\n"
    )
    described = json_of("describe", f"--config={path}")
    assert 0 < described["params"] < 281_215_488


def test_config_files_are_checked_field_by_field():
    good = to_dict(DataConfig())
    assert from_mapping(DataConfig, good) == DataConfig()
    with pytest.raises(UserError, match="did you mean 'sequence_length"):
        from_mapping(DataConfig, {"sequence_lenght": 3})
    with pytest.raises(UserError, match=r"config.seed is '0' of type str; it must be int"):
        from_mapping(DataConfig, {**good, "seed": "0"})
    with pytest.raises(UserError, match="needs vocab_size, num_layers"):
        from_mapping(TransformerConfig, {})


def test_differences_name_the_field_and_both_values():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 0}
    assert differences(old, old) == []
    assert differences(old, {"a": {"b": 2, "c": [1, 3]}, "d": 0}) == [
        "config.a.b: 1 -> 2",
        "config.a.c[1]: 2 -> 3",
    ]


def test_a_command_names_its_flag_where_the_library_names_an_argument():
    command = Command(lambda call: {}, NoFlags, workdir="required")
    for error, line in [
        (UserError("workdir=x: no", argument="workdir"), "--workdir=x: no"),
        (UserError("x is not empty", argument="workdir"), "--workdir: x is not empty"),
        (UserError("workdirs: no", argument="workdir"), "--workdir: workdirs: no"),
        (UserError("memory is 3", argument="memory"), "memory is 3"),  # no such flag
        (UserError("x"), "x"),
    ]:
        assert command.line(error) == line


def test_a_module_of_experiments_is_the_same_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["growth", "check", "--list"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("experiments.growth", run_name="__main__")
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "| `msg` |" in out
    assert call("growth", "check", "--list") == (0, out, "")
