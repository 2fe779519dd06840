"""The public API: it loads lazily, its names resolve, and wrong types give one clear error."""

import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys

import jax
import optax
import pytest

import flm_jax
import flm_jax.growth
import flm_jax.interop
from flm_jax import (
    OptimizerConfig,
    StageConfig,
    Transformer,
    TransformerConfig,
    UserError,
    grow,
    init_state,
    make_train_step,
    optimizer,
    plan,
)
from flm_jax.params import sharding
from flm_jax.train import schedules
from tests.commands import ROOT
from tests.models import SMALL, TINY, TINY_GROWN, random_params

KEY = jax.random.key(0)
PLAN = plan(TINY, TINY_GROWN, "msg")
STAGE = StageConfig("a", TINY, 1, 1, 1e-3, 1e-3)
PACKAGES = (flm_jax, flm_jax.growth, flm_jax.interop)


def import_report(statement):
    """Seconds that the statement takes in a fresh process, and the modules that it loads."""
    code = (
        "import json, sys, time\n"
        "before = time.perf_counter()\n"
        f"{statement}\n"
        "print(json.dumps([time.perf_counter() - before, sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


def test_import_is_quick_and_light():
    reports = [import_report("import flm_jax") for _ in range(3)]
    assert min(seconds for seconds, _ in reports) < 0.6
    for _, modules in reports:
        assert "flm_jax" in modules
        assert not {"jax", "tensorflow", "orbax", "orbax.checkpoint"} & modules


def test_a_heavy_import_is_noticed():
    """Negative control: a name of the API loads what it needs, when it is used."""
    _, modules = import_report("from flm_jax import Transformer")
    assert "jax" in modules


def test_every_name_resolves():
    for name in flm_jax.__all__:
        assert getattr(flm_jax, name) is not None
    for package in (flm_jax.growth, flm_jax.interop):
        for name in package.__all__:
            assert getattr(package, name) is not None
    assert set(flm_jax.__all__) <= set(dir(flm_jax))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = flm_jax.no_such_name


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_module_has_the_name_of_a_public_function(package):
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules
    for name in package.__all__:
        if not inspect.ismodule(getattr(package, name)):
            assert name not in modules, f"{package.__name__}.{name} is a module too"


def test_types_are_shipped():
    spec = importlib.util.find_spec("flm_jax")
    assert (ROOT / "flm_jax" / "py.typed").exists()
    assert str(ROOT) in spec.origin


def other_parameters():
    return grow(random_params(TINY_GROWN, 0), PLAN, KEY)


def foreign_optimizer_state():
    return grow(init_state(TINY, optax.sgd(0.1, momentum=0.9), KEY), PLAN, KEY)


def constant(config, settings=None):
    return optimizer(config, settings or OptimizerConfig(), schedules.steady)


MISTAKES = {
    "text for a number": (
        lambda: TransformerConfig("64", 1, 8, 2, 4, 16),
        r"TransformerConfig\.vocab_size is '64' of type str; it must be int",
    ),
    "a plan as a stage's model": (
        lambda: StageConfig("a", PLAN, 1, 1, 1e-3, 1e-3),
        r"StageConfig\.model is of type Plan; it must be a TransformerConfig",
    ),
    "a config as a plan": (
        lambda: grow(random_params(TINY, 0), TINY_GROWN, KEY),
        r"grow: plan is a TransformerConfig; make it with flm_jax\.plan",
    ),
    "a plan as a config, to plan": (
        lambda: plan(PLAN, TINY_GROWN),
        r"plan: small is a Plan; give a TransformerConfig",
    ),
    "a plan as a config, to the model": (
        lambda: Transformer(PLAN),
        r"Transformer: config is of type Plan; give a flm_jax\.TransformerConfig",
    ),
    "a plan as a config, to the state": (
        lambda: init_state(PLAN, optax.adam(1e-3), KEY),
        r"Transformer: config is of type Plan; give a flm_jax\.TransformerConfig",
    ),
    "a config as a stage": (
        lambda: constant(TINY),
        r"optimizer: stage is of type TransformerConfig; give a flm_jax\.StageConfig",
    ),
    "a config as Adam's settings": (
        lambda: constant(STAGE, TINY),
        r"optimizer: settings is of type TransformerConfig; give a flm_jax\.OptimizerConfig",
    ),
    "a config as a stage, to the step": (
        lambda: make_train_step(TINY, optax.adam(1e-3), sharding.one_device()),
        r"make_train_step: stage is of type TransformerConfig; give a flm_jax\.StageConfig",
    ),
    "a number as a recipe": (
        lambda: plan(TINY, TINY_GROWN, 3),
        r"recipe is 3; give names of operators, as in 'tile,identity'",
    ),
    "a foreign optimizer's state": (
        foreign_optimizer_state,
        r"grow: the optimizer state at .*trace.* is shaped like parameter 'embedding'",
    ),
    "parameters of another config": (
        other_parameters,
        r"grow: parameter 'embedding' is \(32, 32\), the plan's source has \(32, 16\)",
    ),
    "a list as a parameter": (
        lambda: grow({**random_params(TINY, 0), "final_norm": [1.0]}, PLAN, KEY),
        r"grow: parameter 'final_norm' is of type list, the plan's source has \(16,\)",
    ),
    "nothing as parameters": (
        lambda: grow(None, PLAN, KEY),
        r"grow: the tree is a NoneType; give parameters as nested dicts",
    ),
    "models with other heads": (
        lambda: plan(SMALL, TINY_GROWN),
        r"growth from head_dim 6 to 4",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_argument_gives_one_clear_line(name):
    call, message = MISTAKES[name]
    with pytest.raises(UserError, match=f"^{message}") as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


def test_right_arguments_pass():
    """Negative control: the same calls with arguments of the right types."""
    tx = constant(STAGE)
    state = init_state(TINY, tx, KEY)
    make_train_step(STAGE, tx, sharding.one_device())
    grown = grow(state, PLAN, KEY)
    assert grown.params["embedding"].shape == (32, 32)
