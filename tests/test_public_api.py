"""The public API: fast to import, complete, and with clear errors about wrong types."""

import importlib.util
import pathlib
import pkgutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import flm_jax
from flm_jax import ModelSpec, TrainState, TransformerConfig, UserError, grow, growth, interop, plan
from tests import models
from tests.models import changed, random_params

SMALL = changed(models.SMALL, dtype="float32")
BIG = changed(SMALL, d_ff=40)
KEY = jax.random.key(0)


def test_the_import_is_fast_and_loads_few_modules():
    code = (
        "import sys, flm_jax\n"
        "print([m for m in ('jax', 'tensorflow', 'seqio', 'orbax') if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.monotonic() - start)
        assert done.stdout.strip() == "[]", done.stderr
    assert min(seconds) < 0.6


def test_every_public_name_exists():
    for name in flm_jax.__all__:
        assert getattr(flm_jax, name) is not None, name
    assert set(flm_jax.__all__) <= set(dir(flm_jax))
    with pytest.raises(AttributeError, match="no attribute 'growht'"):
        _ = flm_jax.growht
    assert (pathlib.Path(flm_jax.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("package", [flm_jax, growth, interop], ids=lambda p: p.__name__)
def test_no_module_has_the_name_of_a_public_function(package):
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    functions = {
        name for name in package.__all__ if not hasattr(getattr(package, name), "__path__")
    }
    assert not modules & functions
    # `growth.plan` is a function, also after the import of module `growth._plan`.
    assert importlib.util.find_spec("flm_jax.growth._plan")
    assert callable(flm_jax.growth.plan) and callable(flm_jax.growth.grow)


def test_wrong_types_are_one_clear_error():
    sizes = {"num_layers": 1, "d_model": 4, "num_heads": 1, "head_dim": 4, "d_ff": 3}
    with pytest.raises(UserError, match=r"vocab_size is '64' of type str; it must be int"):
        TransformerConfig(vocab_size="64", **sizes)
    with pytest.raises(UserError, match=r"vocab_size is True"):
        TransformerConfig(vocab_size=True, **sizes)
    with pytest.raises(UserError, match=r"big is a dict.*TransformerConfig"):
        plan(SMALL, {})
    with pytest.raises(UserError, match="small is a TransformerConfig and big a ModelSpec"):
        plan(SMALL, ModelSpec({}, {}))
    growth_plan = plan(SMALL, BIG)
    with pytest.raises(UserError, match=r"plan is a TransformerConfig.*make it with flm_jax.plan"):
        grow(random_params(SMALL, 0), BIG, KEY)
    with pytest.raises(UserError, match=r"'layers/mlp/down' is .*the plan's source has"):
        grow(random_params(changed(SMALL, d_ff=8), 0), growth_plan, KEY)
    params = random_params(SMALL, 0)
    foreign = TrainState(jnp.int32(0), params, optax.adan(0.1).init(params))
    with pytest.raises(UserError, match=r"optimizer state at .*is shaped like parameter"):
        grow(foreign, growth_plan, KEY)
