"""A chain's stages get the RMSNorm eps that their growths need."""

import itertools

import pytest

from flm_jax.config import ExperimentConfig, GrowthConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.runs.stage import plan_of, with_derived
from tests.models import SMALL, changed

WIDER = changed(SMALL, d_model=18)


def chain(*models, recipe="zero_pad"):
    growth = GrowthConfig(recipe=recipe, ramp_steps=1)
    return ExperimentConfig(
        tuple(
            StageConfig(f"s{n}", model, 4, 1, 1e-3, 1e-3, growth=growth)
            for n, model in enumerate(models)
        )
    )


def test_each_growth_of_a_chain_lowers_eps_by_its_share_of_zeros():
    derived = with_derived(chain(SMALL, WIDER, changed(WIDER, d_model=36)))
    first, second, third = (stage.model.rms_norm_eps for stage in derived.stages)
    assert first == SMALL.rms_norm_eps
    assert second == pytest.approx(first * 12 / 18, rel=1e-12)
    assert third == pytest.approx(first * 12 / 36, rel=1e-12)
    for small, stage in itertools.pairwise(derived.stages):
        assert plan_of(small.model, stage).config == stage.model
    # A derived eps stays as it is, and growth without zeros changes nothing.
    assert with_derived(derived) == derived
    assert with_derived(chain(SMALL, WIDER, recipe="msg")) == chain(SMALL, WIDER, recipe="msg")


def test_another_eps_is_refused_by_the_growth():
    derived = with_derived(chain(SMALL, changed(WIDER, rms_norm_eps=3e-3)))
    assert derived.stages[1].model.rms_norm_eps == 3e-3
    with pytest.raises(UserError, match=r"from rms_norm_eps 0\.01 to 0\.003: .*exact with 0\.0066"):
        plan_of(SMALL, derived.stages[1])
