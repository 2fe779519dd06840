"""Operator `ranges`: depth by explicit ranges of source layers."""

import jax
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.growth import operators
from flm_jax.params import trees
from flm_jax.train.optim import SlotAdamState
from tests.models import SMALL, TABLE, changed, grow, packed_batch, random_params, trained

KEY = jax.random.key(2)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-2,1-3", [0, 1, 2, 1, 2, 3]),
        ("2-3, 0-3", [2, 3, 0, 1, 2, 3]),
        ("0,0-1,3,2-3", [0, 0, 1, 3, 2, 3]),
        ("0-3,0-3,0-3", [0, 1, 2, 3] * 3),
    ],
)
def test_parameters_and_moments_are_numpys_take_along_the_layers(text, layers):
    small = changed(SMALL, num_layers=4)
    big = changed(small, num_layers=len(layers))
    with jax.enable_x64(True):
        state = trained(small, None, [packed_batch(small)])
        plan = growth.plan(small, big, f"layers=ranges({text})", moments="dual")
        grown = grow(state, plan, KEY)
        assert plan.exactness == "APPROX" and plan.layer_map == tuple(layers)
        assert growth.Plan.from_json(plan.to_json()) == plan
        adam, grown_adam = (
            next(x for x in s.opt_state if isinstance(x, SlotAdamState)) for s in (state, grown)
        )
        for before, after in (
            (state.params, grown.params), (adam.mu, grown_adam.mu), (adam.nu, grown_adam.nu),
        ):  # fmt: skip
            after = dict(trees.flatten(after))
            for path, x in trees.flatten(before):
                want = np.take(x, layers, axis=0) if path.startswith("layers/") else x
                np.testing.assert_array_equal(after[path], want, err_msg=path)
        # Negative control: another map gives other layers.
        other = growth.plan(small, big, "layers=interpose", moments="dual")
        up = grow(state, other, KEY).params["layers"]["mlp"]["up"]
        assert (up != grown.params["layers"]["mlp"]["up"]).any()


def test_solar_grows_32_layers_to_48():
    """arXiv 2312.15166, section 2: without its last 8 layers, then without its first 8."""
    small = TransformerConfig(
        vocab_size=11, num_layers=32, d_model=4, num_heads=2, head_dim=2, d_ff=4
    )
    plan = growth.plan(small, changed(small, num_layers=48), "layers=ranges(0-23,8-31)")
    assert plan.layer_map == (*range(24), *range(8, 32))
    added = np.flatnonzero(growth.added_slots(plan)["layers"])
    assert added.tolist() == list(range(24, 40))  # layers 8 to 23 for the second time
    params = random_params(small, 1)
    grown = dict(trees.flatten(grow(params, plan, KEY)))
    for path, x in trees.flatten(params):
        index = np.array(plan.layer_map)
        want = np.asarray(x)[index] if TABLE[path].stacked else np.asarray(x)
        np.testing.assert_array_equal(grown[path], want, err_msg=path)


def test_ranges_go_with_other_operators_in_any_place():
    big = changed(SMALL, num_layers=3, d_ff=40)
    for recipe in (
        "tile,layers=ranges(0-1,1-1)",
        "layers = ranges( 0 - 1, 1 ),mlp=tile",
        "ranges(0-1,1),mlp=tile",
    ):
        chosen = operators.choose(recipe)
        assert chosen["layers"].name == "ranges" and chosen["mlp"].name == "tile"
        plan = growth.plan(SMALL, big, recipe)
        assert plan.layer_map == (0, 1, 1)
        assert plan.by_axis["mlp"].operator == "tile"
    # A depth that stays may be written out.
    assert growth.plan(SMALL, changed(SMALL, d_ff=40), "tile,layers=ranges(0,1)").expansions


@pytest.mark.parametrize(
    ("recipe", "layers", "message"),
    [
        ("layers=ranges(0-2,3-4)", 6, r"ranges\(0-2,3-4\): they have layer 4, and the source has"
                                      r" layers 0 to 3"),
        ("layers=ranges(0-1,0-1)", 4, "they leave out 2, 3 of the source's 4 layers"),
        ("layers=ranges(0-2,1-3)", 7, "have 6 layers, and the target has 7; .*num_layers to 6"),
        ("layers=ranges(0-3)", 6, "they have 4 layers, and the target has 6"),
        ("layers=ranges(2-3,0-1)", 4, "the same 4 layers in another order"),
        ("layers=ranges(0-3,0)", 4, "they have 5 layers, and the target has 4"),
        ("layers=ranges(3-0,0-3)", 8, "'3-0' is no range; write first-last, as in 0-23"),
        ("layers=ranges(0:3,0-3)", 8, "'0:3' is no range"),
        ("layers=ranges(-1,0-3)", 5, "'-1' is no range"),
        ("layers=ranges()", 8, "'' is no range"),
        ("layers=ranges(0-3,)", 8, "'' is no range"),
        ("layers=ranges(0-99999999999)", 8, "'0-99999999999' is no range"),
        ("layers=ranges", 8, r"'ranges' takes an argument in parentheses; write ranges\(0-23,8-31"),
        ("layers=ranges(0-3,0-3", 8, "'ranges' takes an argument in parentheses"),
        ("layers=ranges(0-3))", 8, "'ranges' takes an argument in parentheses"),
        ("stack(0-3)", 8, "has 'stack.0-3.', but operator 'stack' takes no argument; write stack"),
        ("mlp=ranges(0-3)", 8, "operator 'ranges' grows layers, not 'mlp'"),
        ("range(0-3,0-3)", 8, "no operator 'range'; choose one of"),
    ],
)  # fmt: skip
def test_what_is_no_growth_by_ranges_is_refused_in_one_line(recipe, layers, message):
    small = changed(SMALL, num_layers=4)
    with pytest.raises(UserError, match=message) as raised:
        growth.plan(small, changed(small, num_layers=layers), recipe)
    assert "\n" not in str(raised.value)


def test_no_layers_have_no_ranges():
    none = changed(SMALL, num_layers=0)
    with pytest.raises(UserError, match="copies layers, and there are none; use operator 'fresh'"):
        growth.plan(none, SMALL, "layers=ranges(0-1)")
