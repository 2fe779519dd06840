"""An argument of the wrong type gives one clear line; the call with the right type passes."""

import jax
import optax
import pytest

from flm_jax import (
    OptimizerConfig,
    StageConfig,
    Transformer,
    UserError,
    grow,
    init_state,
    make_train_step,
    optimizer,
    plan,
    run,
)
from flm_jax.params import sharding
from flm_jax.train import schedules
from tests.models import SMALL, TINY, TINY_GROWN, random_params

KEY = jax.random.key(0)
PLAN = plan(TINY, TINY_GROWN, "msg")
STAGE = StageConfig("a", TINY, 1, 1, 1e-3, 1e-3)


def constant(stage, settings=None):
    """Returns the stage's optimizer at a constant learning rate."""
    return optimizer(stage, settings or OptimizerConfig(), schedules.steady)


MISTAKES = {
    "a plan as a stage's model": (
        lambda: StageConfig("a", PLAN, 1, 1, 1e-3, 1e-3),
        r"StageConfig\.model is of type Plan; it must be a TransformerConfig",
    ),
    "a plan as a config, to plan": (
        lambda: plan(PLAN, TINY_GROWN),
        r"plan: small is a Plan; give a TransformerConfig",
    ),
    "a plan as a config, to the model": (
        lambda: Transformer(PLAN),
        r"Transformer: config is of type Plan; give a flm_jax\.config\.TransformerConfig",
    ),
    "a plan as a config, to the state": (
        lambda: init_state(PLAN, optax.adam(1e-3), KEY),
        r"Transformer: config is of type Plan; give a flm_jax\.config\.TransformerConfig",
    ),
    "a config as a stage, to the optimizer": (
        lambda: constant(TINY),
        r"optimizer: stage is of type TransformerConfig; give a flm_jax\.config\.StageConfig",
    ),
    "a config as Adam's settings": (
        lambda: constant(STAGE, TINY),
        r"optimizer: settings is of type TransformerConfig; .*config\.OptimizerConfig",
    ),
    "a config as a stage, to the step": (
        lambda: make_train_step(TINY, optax.adam(1e-3), sharding.one_device()),
        r"make_train_step: stage is of type TransformerConfig; give a flm_jax\.config\.StageConfig",
    ),
    "a config as an experiment": (
        lambda: run(TINY, "/nowhere"),
        r"run: config is of type TransformerConfig; give a flm_jax\.config\.ExperimentConfig",
    ),
    "a number as a recipe": (
        lambda: plan(TINY, TINY_GROWN, 3),
        r"recipe is 3; give names of operators, as in 'tile,identity'",
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
