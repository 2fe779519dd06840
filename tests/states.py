"""Helpers of the tests: random train states, a bit-exact comparison, a limit on file sizes."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.config import OptimizerConfig, StageConfig
from flm_jax.store.checkpoint import by_name
from flm_jax.train import optim, schedules, train_step


def random_state(config, seed=0):
    """Returns a train state in which every entry is random, and multipliers positive."""
    stage = StageConfig("s", config, 9, 2, 1e-3, 1e-3)
    tx = optim.optimizer(stage, OptimizerConfig(), schedules.steady)
    like = train_step.abstract_state(config, tx)
    rng = np.random.default_rng(seed)

    def draw(x):
        if x.dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, 50, x.shape), jnp.int32)
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    state = jax.tree.map(draw, like)

    def positive(node):
        if not isinstance(node, optim.SlotAdamState):
            return node
        created = jax.tree.map(jnp.zeros_like, node.created)
        factors = {"share": node.share, "step_scale": node.step_scale, "eps_scale": node.eps_scale}
        return node._replace(
            created=created, kept=jnp.ones_like(node.kept), **jax.tree.map(jnp.abs, factors)
        )

    return jax.tree.map(positive, state, is_leaf=lambda x: isinstance(x, optim.SlotAdamState))


def assert_same_bits(got, want):
    """Checks that two trees have the same leaves, bit for bit."""
    got, want = by_name(got), by_name(want)
    assert got.keys() == want.keys()
    for name, x in want.items():
        x, y = np.asarray(x), np.asarray(got[name])
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert x.tobytes() == y.tobytes(), name


@contextlib.contextmanager
def files_of_at_most(size):
    """Makes a context in which writing a file of more than `size` bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
