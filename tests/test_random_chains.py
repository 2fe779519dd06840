"""Random chains of growths equal an independent model in numpy; planted errors are noticed."""

import ast
import collections
import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.config import OptimizerConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.growth.operators import OPERATORS, choose
from flm_jax.params import trees
from flm_jax.studies import chain_check, chain_oracle, decoder_oracle, random_chains
from flm_jax.studies.chain_check import Chain, ChainGrowth, Counts, adam_of, check, with_adam
from flm_jax.studies.chain_oracle import Mismatch
from tests.commands import call, json_of, mistake

FAST = range(8)
SLOW = range(1000, 1060)
BLOCK = 20

MODEL = TransformerConfig(
    vocab_size=11, num_layers=2, d_model=6, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=5,
    mup_base_width=4, input_mult=1.3, output_mult=0.7, matrix_init_std=0.3, vector_init_std=0.5,
    rms_norm_eps=1e-2, dtype="float64",
)  # fmt: skip
ADAM = OptimizerConfig(b2=0.95, eps=1e-3, clip_norm=chain_check.UNCLIPPED)


def grows(recipe, sizes, **options):
    """A growth by "axis=operator,..."."""
    pairs = (item.split("=") for item in recipe.split(","))
    return ChainGrowth(operators=dict(pairs), sizes=sizes, **options)


def chain_of(*growths, model=MODEL, **values):
    return Chain(
        **({"seed": 3, "model": model, "updates": 7, "steps": 1, "optimizer": ADAM,
            "model_checks": False, "growths": growths} | values)
    )  # fmt: skip


@pytest.mark.parametrize("seed", FAST)
@pytest.mark.slow
def test_a_random_chain(seed):
    check(random_chains.draw(seed))


@pytest.mark.slow
@pytest.mark.parametrize("first", SLOW[::BLOCK])
def test_many_random_chains(first):
    for seed in range(first, first + BLOCK):
        found = random_chains.failure(random_chains.draw(seed))
        assert found is None, (seed, found)
    jax.clear_caches()


# Growths that interact with each other, with an empty axis or with a mesh.
SMALL_HEADS = dataclasses.replace(MODEL, num_heads=4, num_kv_heads=1)
ON_MESH = dataclasses.replace(MODEL, vocab_size=16, d_ff=6)
INTERACTIONS = {
    "noise on a mesh that does not divide": chain_of(
        grows("embed=tile_pad", {"embed": 17}, noise_db=10.0, meshes=(2, 2, 2, 4, 1, 2)),
        model=ON_MESH,
    ),
    "means on a mesh": chain_of(
        grows("vocab=mean", {"vocab": 24}, meshes=(2, 2, 2, 1, 2, 4)),
        model=dataclasses.replace(ON_MESH, num_kv_heads=4, d_ff=8),
    ),
    "from no layer": chain_of(
        grows("layers=zero_pad", {"layers": 2}, rates="carry", steps=2),
        grows("layers=identity", {"layers": 3}, steps=1),
        model=dataclasses.replace(MODEL, num_layers=0),
    ),
    "carry, then carry": chain_of(
        grows("embed=zero_pad", {"embed": 8}, rates="carry", steps=1),
        grows("embed=tile", {"embed": 16}, moments="dual", rates="carry", steps=2),
    ),
    "three growths, carried": chain_of(
        grows("mlp=msg,layers=msg", {"mlp": 6, "layers": 3}, rates="carry", ramp_steps=1, steps=2),
        grows("embed=zero_pad,mlp=zero_pad", {"embed": 8, "mlp": 8}, rates="carry", steps=2),
        grows("embed=tile,mlp=tile,q_per_kv=tile", {"embed": 16, "mlp": 16, "q_per_kv": 4},
              moments="dual", rates="carry", steps=3),
    ),
    "ramp, then carry": chain_of(
        grows("embed=tile", {"embed": 12}, moments="dual", rates="ramp", ramp_steps=2, steps=3),
        grows("mlp=zero_pad", {"mlp": 7}, rates="carry", steps=2),
    ),
    "an unfinished ramp, then carry": chain_of(
        grows("embed=tile", {"embed": 12}, moments="dual", rates="ramp", ramp_steps=4, steps=2),
        grows("mlp=zero_pad", {"mlp": 7}, rates="carry", steps=2),
    ),
    "repeat and carry": chain_of(
        grows("kv_heads=repeat", {"kv_heads": 2, "q_per_kv": 2}, moments="dual", rates="carry",
              steps=2), model=SMALL_HEADS,
    ),
    "repeat and asym": chain_of(
        grows("kv_heads=repeat", {"kv_heads": 2, "q_per_kv": 2}, steps=2), model=SMALL_HEADS
    ),
    "new columns of copied rows": chain_of(
        grows("embed=zero_pad,mlp=tile", {"embed": 9, "mlp": 10}, rates="carry", steps=2)
    ),
    "depth under CompleteP": chain_of(
        grows("layers=zero_pad,embed=tile", {"layers": 4, "embed": 12}, moments="dual",
              rates="carry", steps=1),
        grows("layers=identity,mlp=tile", {"layers": 6, "mlp": 10}, moments="dual", rates="ramp",
              steps=2),
        model=dataclasses.replace(MODEL, parametrisation="completep", mup_base_depth=1),
    ),
    "learned maps": chain_of(grows("mlp=ligo,layers=ligo", {"mlp": 8, "layers": 3}, steps=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERACTIONS)
def test_growths_that_interact(name):
    counts = Counts()
    check(INTERACTIONS[name], counts)
    followed = name in ("carry, then carry", "three growths, carried")
    assert (counts.checks["trajectory"] > 0) == followed


# Negative controls.

TILED = grows(
    "embed=tile,mlp=tile,layers=identity", {"embed": 12, "mlp": 10, "layers": 3},
    moments="dual", rates="carry", steps=1,
)  # fmt: skip


def with_params(state, **leaves):
    flat = dict(trees.flatten(state.params)) | leaves
    return dataclasses.replace(state, params=trees.unflatten(flat))


def change(state, path, function):
    return with_params(state, **{path: function(dict(trees.flatten(state.params))[path])})


def second_moment_not_squared(plan, before, grown):
    adam = adam_of(grown)
    mapped = dict(trees.flatten(adam_of(before).nu))["layers/mlp/up"]
    wrong = jnp.concatenate([mapped, mapped], -1)
    wrong = jnp.concatenate([wrong, wrong], 1) * 0.5
    nu = dict(trees.flatten(adam.nu))
    nu["layers/mlp/up"] = nu["layers/mlp/up"].at[0].set(wrong[0])
    return with_adam(grown, adam._replace(nu=trees.unflatten(nu)))


def age_not_reset(plan, before, grown):
    adam = adam_of(grown)
    return with_adam(
        grown, adam._replace(born={**adam.born, "layers": jnp.zeros_like(adam.born["layers"])})
    )


def share_on_the_writers(plan, before, grown):
    down = change(grown, "layers/mlp/down", lambda x: 2 * x)
    return change(down, "layers/mlp/up", lambda x: x / 2)


def query_heads_in_another_order(plan, before, grown):
    def flat(x):
        return x.swapaxes(2, 3).reshape(x.shape)

    return change(grown, "layers/attention/query", flat)


def multipliers_dropped(plan, before, grown):
    unscaled = dataclasses.replace(plan, rates="target")
    return growth.grow(before, unscaled, jax.random.key(0))


def copy_of_another_layer(plan, before, grown):
    return change(grown, "layers/mlp/up", lambda x: x[::-1])


def added_layer_acts(plan, before, grown):
    return change(grown, "layers/mlp/down", lambda x: x.at[1].set(x[0]))


def noise_that_does_not_cancel(plan, before, grown):
    return change(grown, "layers/mlp/down", lambda x: x.at[0, 0].add(0.01))


def fresh_entries_all_zero(plan, before, grown):
    return change(grown, "layers/mlp/up", lambda x: x.at[..., 5:].set(0))


NOISY = grows("mlp=tile", {"mlp": 10}, moments="dual", noise_db=10.0)
PADDED = grows("mlp=zero_pad", {"mlp": 7})


@pytest.mark.parametrize(
    ("tamper", "kind", "first"),
    [
        (second_moment_not_squared, "moments", TILED),
        (age_not_reset, "ages", TILED),
        (share_on_the_writers, "parameters", TILED),
        (query_heads_in_another_order, "parameters", TILED),
        (multipliers_dropped, "step", TILED),
        (copy_of_another_layer, "parameters", TILED),
        (added_layer_acts, "parameters", TILED),
        (noise_that_does_not_cancel, "noise", NOISY),
        (fresh_entries_all_zero, "parameters", PADDED),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_planted_error_is_noticed(tamper, kind, first):
    chain = chain_of(first)
    with pytest.raises(Mismatch) as found:
        check(chain, tamper=tamper)
    assert found.value.kind == kind, found.value


def test_the_unchanged_growths_pass():
    for first in (TILED, NOISY, PADDED):
        check(chain_of(first), tamper=lambda plan, before, grown: grown)


def test_an_eps_that_is_not_carried_is_noticed(monkeypatch):
    """Two copies halve a writer's gradient, so that twice the carried eps is the old one."""
    made = chain_check.optim.optimizer

    def twice(stage, settings, shape, grown_at=None):
        if grown_at is not None:
            settings = dataclasses.replace(settings, eps=2 * settings.eps)
        return made(stage, settings, shape, grown_at)

    monkeypatch.setattr(chain_check.optim, "optimizer", twice)
    with pytest.raises(Mismatch, match="step"):
        check(chain_of(TILED))


def test_a_wrong_lock_is_noticed():
    chain_check.check_locks({"mlp": (5, 6)}, {"mlp": (5, 6), "embed": ()})
    for claimed in ({}, {"mlp": (5,)}, {"mlp": (5, 6), "embed": (1,)}):
        with pytest.raises(Mismatch, match="locks"):
            chain_check.check_locks({"mlp": (5, 6)}, claimed)


def test_the_independent_gradient_is_that_of_its_own_loss():
    """Central differences in random entries; masks, packed documents and unequal weights."""
    model = dataclasses.replace(MODEL, parametrisation="completep", mup_base_depth=1)
    config = dataclasses.asdict(model)
    rng = np.random.default_rng(0)
    p = {path: rng.normal(0.1, 0.5, decoder_oracle.shape_of(path, config))
         for path in decoder_oracle.PARAMS}  # fmt: skip
    size = decoder_oracle.sizes(config)
    masks = {axis: rng.uniform(0.2, 1, n) for axis, n in size.items() if axis != "head_dim"}
    tokens = rng.integers(0, 11, (2, 7))
    batch = {
        "tokens": tokens, "targets": rng.integers(0, 11, (2, 7)),
        "segment_ids": np.tile([1, 1, 1, 2, 2, 2, 0], (2, 1)),
        "positions": np.tile([0, 1, 2, 0, 1, 2, 0], (2, 1)),
        "weights": rng.uniform(0, 2, (2, 7)),
    }  # fmt: skip
    _, grads = decoder_oracle.gradient(config, p, batch, masks)
    for path, leaf in p.items():
        direction = rng.normal(size=leaf.shape)
        if path == "embedding":
            direction[~np.isin(np.arange(11), tokens)] = 0

        def loss(step, path=path, leaf=leaf, direction=direction):
            moved = p | {path: leaf + step * direction}
            return decoder_oracle.gradient(config, moved, batch, masks)[0]

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert slope == pytest.approx(float(np.sum(grads[path] * direction)), rel=1e-6), path


@pytest.mark.parametrize("module", [chain_oracle, decoder_oracle], ids=lambda m: m.__name__)
def test_the_independent_model_imports_nothing_that_it_checks(module):
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    own = {name for name in names if name.startswith(("flm_jax", "jax", "optax", "flax"))}
    assert own <= {decoder_oracle.__name__}


# Drawing and shrinking.


def test_five_hundred_chains_use_every_operator():
    used, meshes = collections.Counter(), 0
    for seed in range(500):
        chain = random_chains.draw(seed)
        assert Chain.from_json(chain.to_json()) == chain == random_chains.draw(seed)
        for g in chain.growths:
            used.update({o.name for o in choose(g.recipe).values()})
            meshes += bool(g.meshes)
    assert set(used) == set(OPERATORS) and min(used.values()) >= 20, used
    assert meshes >= 50


def test_a_failing_chain_is_made_smaller(monkeypatch):
    """The failure is that a growth tiles `mlp` with moments "dual": nothing else is left."""

    def failure(chain, counts=None):
        fails = any(g.operators.get("mlp") == "tile" and g.moments == "dual" for g in chain.growths)
        return Mismatch("step", "") if fails else None

    monkeypatch.setattr(random_chains, "failure", failure)
    seed = next(s for s in range(5000) if len(random_chains.draw(s).growths) > 1
                and failure(random_chains.draw(s)))  # fmt: skip
    chain = random_chains.draw(seed)
    small, mismatch = random_chains.shrink(chain, failure(chain))
    (g,) = small.growths
    assert mismatch.kind == "step" and (dict(g.operators), g.moments) == ({"mlp": "tile"}, "dual")
    assert (g.rates, g.noise_db, g.steps, small.steps) == ("target", 0.0, 0, 0)
    assert small.model.num_heads == 1 and small.model.d_model == 4


def test_the_command_counts_and_fails_with_the_smallest_chain(monkeypatch):
    result = json_of("growth", "fuzz", "--chains=2", "--seed=1")
    assert result["chains"] == 2 and result["growths"] >= 2 and result["mismatches"] == []
    assert sum(result["operators"].values()) >= 2 and result["checks"]["parameters"] > 0
    assert "chain: not JSON" in mistake("growth", "fuzz", "--chain={")
    assert "give the object" in mistake("growth", "fuzz", "--chain=[1]")
    with pytest.raises(UserError, match=r"meshes is \(1, 2\)"):
        grows("mlp=tile", {"mlp": 10}, meshes=(1, 2))
    assert "chain.sed" in mistake("growth", "fuzz", '--chain={"sed": 1}')

    def wrong(chain, counts=None, tamper=None):
        raise Mismatch("step", "planted")

    monkeypatch.setattr(random_chains, "check", wrong)
    status, out, err = call("growth", "fuzz", "--chains=3", "--json")
    result = json.loads(out)
    assert status == 1 and "3 of 3 chains fail: planted" in err.splitlines()[-1]
    assert [m["seed"] for m in result["mismatches"]] == [0, 1, 2]
    (small,) = result["shrunk"]
    assert small["mismatch"] == "step: planted" and small["chain"]["growths"] == []
    again = json.dumps(small["chain"])
    status, out, _ = call("growth", "fuzz", f"--chain={again}", "--json")
    assert status == 1 and json.loads(out)["chains"] == 1
