"""A user's own model, with the public API alone: GPT-2's block with its own axis table.

LayerNorm with bias, learned positions, GELU, biases everywhere, and a head tied to the embedding.

Shapes: B batch, T length, D embed, F mlp, N heads, H head size, L layers, V vocab, P positions.
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from flm_jax import ModelSpec, Param, Plan, Scale, TrainState, UserError, grow, plan
from flm_jax.growth import LockedCopiesWarning

SIZES = {
    "vocab": 17,
    "positions": 11,
    "embed": 6,
    "mlp": 10,
    "kv_heads": 2,
    "head_dim": 4,
    "layers": 2,
}
WRITES_HEADS = "layers:stack embed:in kv_heads:out head_dim:out"
TABLE = {
    "wte": Param.of("vocab:in embed:out"),
    "wpe": Param.of("positions:in embed:out"),
    **{
        name: Param.of("layers:stack embed:gain")
        for name in ("ln1_gain", "ln1_bias", "ln2_gain", "ln2_bias")
    },
    **{name: Param.of(WRITES_HEADS) for name in ("q", "k", "v")},
    **{
        name: Param.of("layers:stack kv_heads:out head_dim:out")
        for name in ("q_bias", "k_bias", "v_bias")
    },
    "o": Param.of("layers:stack kv_heads:in head_dim:in embed:out"),
    "o_bias": Param.of("layers:stack embed:out"),
    "up": Param.of("layers:stack embed:in mlp:out"),
    "up_bias": Param.of("layers:stack mlp:out"),
    "down": Param.of("layers:stack mlp:in embed:out"),
    "down_bias": Param.of("layers:stack embed:out"),
    # The head is the embedding, so it cannot divide by the copy counts. The last norm does it.
    "lnf_gain": Param.of("embed:gain", carries=("embed",)),
    "lnf_bias": Param.of("embed:gain", carries=("embed",)),
}
SCALES = {name: Scale(std=0.0, decay=0.0) for name in TABLE if name.endswith("bias")}


KEY = jax.random.key(0)


def spec(**sizes) -> ModelSpec:
    return ModelSpec(TABLE, {**SIZES, **sizes}, SCALES)


def layer_norm(x_BTD, gain_D, bias_D):
    mean = jnp.mean(x_BTD, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x_BTD - mean), -1, keepdims=True)
    return gain_D * (x_BTD - mean) / jnp.sqrt(variance + 1e-3) + bias_D


class GPT2(nn.Module):
    spec: ModelSpec

    @nn.compact
    def __call__(self, tokens_BT):
        w = {
            name: self.param(name, nn.initializers.normal(0.5), self.spec.shape(name))
            for name in self.spec.table
        }
        T = tokens_BT.shape[1]
        causal_TT = jnp.tril(jnp.ones((T, T), bool))
        x_BTD = w["wte"][tokens_BT] + w["wpe"][:T]
        for n in range(self.spec.sizes["layers"]):
            y_BTD = layer_norm(x_BTD, w["ln1_gain"][n], w["ln1_bias"][n])
            q, k, v = (
                jnp.einsum("BTD,DNH->BTNH", y_BTD, w[name][n]) + w[f"{name}_bias"][n]
                for name in ("q", "k", "v")
            )
            scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q, k) / q.shape[-1] ** 0.5
            probs_BNTS = jax.nn.softmax(jnp.where(causal_TT, scores_BNTS, -1e30))
            mixed_BTNH = jnp.einsum("BNTS,BSNH->BTNH", probs_BNTS, v)
            x_BTD = x_BTD + jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, w["o"][n]) + w["o_bias"][n]
            y_BTD = layer_norm(x_BTD, w["ln2_gain"][n], w["ln2_bias"][n])
            a_BTF = jax.nn.gelu(y_BTD @ w["up"][n] + w["up_bias"][n])
            x_BTD = x_BTD + a_BTF @ w["down"][n] + w["down_bias"][n]
        return layer_norm(x_BTD, w["lnf_gain"], w["lnf_bias"]) @ w["wte"].T


def tokens(seed):
    return jnp.asarray(np.random.default_rng(seed).integers(0, SIZES["vocab"], (3, 9)), jnp.int32)


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(0.3, 0.6, model.shape(name))) for name in TABLE}


@functools.cache  # compiled once for each size
def forward(model):
    return jax.jit(lambda params, batch: GPT2(model).apply({"params": params}, batch))


@functools.cache
def gradient(model):
    def loss(params, batch):
        scores = jax.nn.log_softmax(GPT2(model).apply({"params": params}, batch[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(scores, batch[:, 1:, None], -1))

    return jax.jit(jax.grad(loss))


def logits(model, params, seed=7):
    return forward(model)(params, tokens(seed))


def change(growth_plan, params):
    """Returns the largest change of a logit at the growth."""
    grown = jax.jit(functools.partial(grow, plan=growth_plan))(params, key=KEY)
    return moved(growth_plan, params, grown)


def moved(growth_plan, params, grown):
    """Returns the largest difference of a logit between the grown model and the model before."""
    before, after = logits(growth_plan.small, params), logits(growth_plan.big, grown)
    return float(jnp.max(jnp.abs(after - before)))


def adam_state(model, params, seeds=(1, 2, 3)):
    """Returns Adam's state after gradients of three batches at the same parameters."""

    tx = optax.adam(1e-3)
    state = tx.init(params)
    for seed in seeds:
        with jax.numpy_dtype_promotion("standard"):  # optax promotes dtypes
            _, state = tx.update(gradient(model)(params, tokens(seed)), state)
    return state


@pytest.fixture(autouse=True)
def relaxed():
    """Enables float64 and the dtype promotion of Flax and optax."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


WIDER = {"embed": 12, "mlp": 20, "kv_heads": 4}


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ("tile", WIDER),
        ("tile", {**WIDER, "embed": 18}),
        ("identity", {"layers": 5}),
        ("tile,identity", {**WIDER, "layers": 3}),
        ("zero_pad", {"mlp": 13, "kv_heads": 3}),
        ("tile_pad,embed=tile", {**WIDER, "mlp": 23}),
    ],
)
def test_growth_keeps_the_function_and_adams_state(recipe, sizes):
    small, big = spec(), spec(**sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LockedCopiesWarning)
        growth_plan = plan(small, big, recipe, moments="dual")
    params = random_params(small)
    assert growth_plan.exactness == "EXACT"
    before = adam_state(small, params)
    state = TrainState(jnp.int32(3), params, before)
    grown = jax.jit(functools.partial(grow, plan=growth_plan))(state, key=KEY)
    assert moved(growth_plan, params, grown.params) < 1e-10
    # Moments that the grown model's own gradients would have given: an average of gradients maps
    # as they do. Entries that are new have no history.
    want = adam_state(big, grown.params)[0]
    got = grown.opt_state[0]
    assert int(got.count) == int(want.count) == 3
    for ours, theirs in ((got.mu, want.mu), (got.nu, want.nu)):
        for name in TABLE:
            kept = np.asarray(ours[name]) != 0
            assert kept.sum() >= (np.asarray(before[0].mu[name]) != 0).sum()
            np.testing.assert_allclose(
                ours[name][kept], theirs[name][kept], rtol=1e-9, atol=1e-10, err_msg=name
            )


@pytest.mark.parametrize("wrong", ["not carried", "copied layers"])
def test_negative_controls(wrong):
    """A tied head without `carries` counts copies twice; copied layers act."""
    params = random_params(spec())
    if wrong == "copied layers":
        growth_plan = plan(spec(), spec(layers=4), "stack")
        assert growth_plan.exactness == "APPROX"
    else:
        table = {name: dataclasses.replace(p, carries=()) for name, p in TABLE.items()}
        small, big = (ModelSpec(table, {**SIZES, **more}, SCALES) for more in ({}, WIDER))
        growth_plan = plan(small, big, "tile")
    assert change(growth_plan, params) > 1e-2


def test_a_plan_of_a_spec_is_data():
    growth_plan = plan(spec(), spec(**WIDER), "tile")
    assert Plan.from_json(growth_plan.to_json()) == growth_plan
    assert hash(Plan.from_json(growth_plan.to_json())) == hash(growth_plan)


def test_new_entries_start_as_the_spec_says():
    grown = grow(
        random_params(spec()), plan(spec(), spec(layers=4, mlp=40), "msg,fresh"), jax.random.key(0)
    )
    assert (grown["up_bias"][:, 10:] == 0).all() and (grown["ln1_bias"][2:] == 0).all()
    assert (grown["ln1_gain"][2:] == 1).all()
    assert 0.015 < float(jnp.std(grown["up"][:, :, 10:])) < 0.025


def test_what_does_not_fit_is_refused():
    params, key = random_params(spec()), jax.random.key(0)
    with pytest.raises(UserError, match=r"'embed' from 6 to 9.*another norm.*use operator 'tile'"):
        plan(spec(), spec(embed=9), "zero_pad")
    with pytest.raises(UserError, match="different axis tables"):
        plan(spec(), ModelSpec({"wte": TABLE["wte"]}, SIZES), "tile")
    with pytest.raises(UserError, match=r"no axis 'positions'.*'wpe'"):
        ModelSpec(TABLE, {k: v for k, v in SIZES.items() if k != "positions"})
    growth_plan = plan(spec(), spec(**WIDER), "tile")
    foreign = TrainState(jnp.int32(0), params, optax.adan(0.1).init(params))
    with pytest.raises(UserError, match=r"optimizer state at .* is shaped like parameter"):
        grow(foreign, growth_plan, key)
    adam = TrainState(jnp.int32(0), params, optax.adam(0.1).init(params))
    with pytest.raises(UserError, match=r"rates 'carry'.*ScaleByAdamState.*rates='target'"):
        grow(adam, dataclasses.replace(growth_plan, rates="carry"), key)
    with pytest.raises(UserError, match=r"tree is a tuple.*TrainState"):
        grow((params,), growth_plan, key)
