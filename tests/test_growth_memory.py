"""Growth and its receipt need no more memory than a train step: bytes per parameter, by device."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.config import MeshConfig, OptimizerConfig, TransformerConfig
from flm_jax.growth import measure, receipt
from flm_jax.params import axes, counts, sharding, trees
from flm_jax.train.train_step import init_state
from tests.models import changed, optimizer, packed_batch, random_params, stage_of

# Many layers: what a device gathers of one layer is then small beside its share of the state.
SMALL = TransformerConfig(
    vocab_size=64, num_layers=24, d_model=64, num_heads=4, head_dim=16, d_ff=96, mup_base_width=8,
    remat="full",
)  # fmt: skip
BIG = changed(SMALL, num_layers=48, d_ff=192)
LIMIT = 20  # parameters 4, moments 8, gradients 4; 4 are left for temporaries and activations


def live():
    """The bytes of all arrays on the first device."""
    first, sizes = jax.devices()[0], {}
    for x in jax.live_arrays():
        for shard in x.addressable_shards:
            if shard.device == first:  # looking at a shard makes an array of the same memory
                sizes[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(sizes.values())


class Meter:
    """Measures the first device's memory in every program that runs through it."""

    def __init__(self):
        self.found = []

    def of(self, program):
        """The same program, measured: what is alive when it starts, and what it adds to it."""

        def run(*args):
            memory = program.lower(*args).compile().memory_analysis()
            added = memory.temp_size_in_bytes + memory.output_size_in_bytes
            peak = live() + added - memory.alias_size_in_bytes
            self.found.append((program.__name__, peak))
            return program(*args)

        return run

    @contextlib.contextmanager
    def installed(self, monkeypatch):
        """Measures the programs that are made meanwhile, and those that exist already."""
        made = jax.jit
        with monkeypatch.context() as patch:
            for module in (measure, receipt):
                for name, value in vars(module).copy().items():
                    if hasattr(value, "lower") and hasattr(value, "trace"):
                        patch.setattr(module, name, self.of(value))
            patch.setattr(jax, "jit", lambda f, **options: self.of(made(f, **options)))
            yield


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["msg", "zero_pad,stack"])
def test_growth_and_receipt_fit_beside_the_state(monkeypatch, recipe):
    meter, mesh = Meter(), sharding.make_mesh(MeshConfig(1, 2, 4))
    plan = growth.plan(SMALL, BIG, recipe)
    stage = stage_of(BIG)
    batch = {name: np.asarray(x) for name, x in packed_batch(BIG, batch=4, length=8).items()}
    before = live()
    with jax.set_mesh(mesh):
        tx = optimizer(stage_of(SMALL))
        state = jax.jit(lambda key: init_state(SMALL, tx, key))(jax.random.key(0))
        state = jax.device_put(state, sharding.shardings(state, axes.table(SMALL), mesh))
        with meter.installed(monkeypatch):
            old = measure.source(state.params, batch, SMALL)
            layout = sharding.Layout(mesh)
            state = growth.grow_on_mesh(state, plan, jax.random.key(1), layout, layout)
            measure.function_change(old, state.params, batch, plan)
            measure.first_steps(state, batch, plan, stage, OptimizerConfig())
    share = counts.params(BIG) / mesh.size
    found = [(name, round((peak - before) / share, 2)) for name, peak in meter.found]
    assert 12 < max(peak for _, peak in found) <= LIMIT, found
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("rows", "accumulate", "count", "padded"),
    [(8, 1, 1, 8), (8, 2, 2, 8), (5, 1, 1, 8), (9, 2, 3, 12), (3, 8, 1, 4)],
)
def test_a_device_gets_no_more_sequences_than_in_training(rows, accumulate, count, padded):
    """A stage has eight sequences in a step, over four parts of the mesh."""
    stage = dataclasses.replace(stage_of(BIG), accumulate=accumulate)
    batch = packed_batch(BIG, batch=rows, length=8)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 2))):
        got, found = measure.in_microbatches(batch, stage)
    assert found == count and len(got["tokens"]) == padded
    assert padded // count <= max(8 // accumulate, 4)
    for name, x in batch.items():
        np.testing.assert_array_equal(got[name][:rows], x)
        assert not np.asarray(got[name][rows:]).any()


@pytest.mark.slow
def test_added_sequences_do_not_change_the_gradient():
    model = changed(SMALL, num_layers=2, dtype="float64")
    plan = growth.plan(model, changed(model, d_ff=192))
    with jax.enable_x64(True):
        params, batch = random_params(plan.config, 0), packed_batch(model, batch=5)
        alone = measure.gradient_program(plan, stage_of(plan.config), 1, params)
        want = alone(params, batch, np.float32(0.5))
        mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
        params = jax.device_put(params, sharding.shardings(params, plan.table, mesh))
        with jax.set_mesh(mesh):
            stage = dataclasses.replace(stage_of(plan.config), accumulate=2)
            more, count = measure.in_microbatches(batch, stage)
            assert count == 2 and len(more["tokens"]) == 8
            program = measure.gradient_program(plan, stage, count, params)
            got = program(params, more, np.float32(0.5))
    for (path, one), (_, two) in zip(trees.flatten(want), trees.flatten(got), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-12 * np.abs(one).max(), err_msg=path)
