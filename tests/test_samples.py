"""Sample texts at evaluations, with and without masks below 1."""

import dataclasses

import jax
import pytest

from flm_jax import growth
from flm_jax.commands import config_files
from flm_jax.config import EvalConfig
from flm_jax.errors import UserError
from flm_jax.runs import samples
from flm_jax.sft.config import SftConfig
from tests import tiny_chain
from tests.models import changed, random_params
from tests.runs import BYTES


@pytest.mark.slow
def test_texts_continue_the_prompt_and_masks_are_folded_in():
    config = config_files.experiment(tiny_chain.get_config())
    asked = dataclasses.replace(config, eval=EvalConfig(samples=2, sample_prompt="def "))
    assert samples.sampler(config, "bytes", BYTES) is None  # none were asked for
    draw = samples.sampler(asked, "bytes", BYTES)
    params = random_params(BYTES, 0)
    first, second = draw(params, None, None)
    assert first.startswith("def ") and second.startswith("def ") and first != second
    assert draw(params, None, None) == [first, second]
    # Right after the growth the grown model says the same; with other masks something else.
    big = changed(BYTES, d_ff=40, num_layers=3)
    plan = growth.plan(BYTES, big, "msg")
    grown = growth.grow(params, plan, jax.random.key(1))
    draw = samples.sampler(asked, "bytes", plan.config)
    assert draw(grown, plan, 0.0) == [first, second]
    assert draw(grown, plan, None) != [first, second]


def test_fine_tuning_has_no_sample_texts():
    with pytest.raises(UserError, match=r"SftConfig\.eval\.samples is 1"):
        SftConfig(base="x", made=1, eval=EvalConfig(samples=1))
    SftConfig(base="x", made=1, eval=EvalConfig())
