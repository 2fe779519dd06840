"""Sample texts at the evaluations of a run, if its config asks for them (`eval.samples`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from flm_jax import growth
from flm_jax.config import ExperimentConfig, TransformerConfig
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.growth.folding import fold
from flm_jax.inference.generation import Sampling, generate

TOKENS = 64  # of each continuation
_TEMPERATURE = 0.8

# (parameters, the growth whose masks are below 1, their value) -> texts, with the prompt.
Sampler = Callable[[Any, growth.Plan | None, float | None], list[str]]


def sampler(config: ExperimentConfig, vocabulary: str, model: TransformerConfig) -> Sampler | None:
    """Makes what draws a stage's sample texts; None if the config asks for none.

    The first text is the most likely continuation of `eval.sample_prompt`. The others are drawn at
    a temperature, at every evaluation with the same random numbers.

    Args:
      config: the chain.
      vocabulary: the run's.
      model: the stage's model.
    """
    count, prompt = config.eval.samples, config.eval.sample_prompt
    if not count or jax.process_count() > 1:  # the prompt would be read by every process
        return None
    tokenizer = open_tokenizer(vocabulary)
    ids = [tokenizer.start_id, *tokenizer.encode(prompt)]

    def draw(params: Any, plan: growth.Plan | None, mask: float | None) -> list[str]:
        of = model
        if plan is not None and mask is not None:
            params, folded = fold(params, plan, mask)
            assert isinstance(folded, TransformerConfig)
            of = folded
        of = of.with_tokens(tokenizer.vocab_size)
        texts = []
        for temperature, rows in ((0.0, 1), (_TEMPERATURE, count - 1)):
            if rows == 0:
                break
            sampling = Sampling(TOKENS, temperature, stop_tokens=tokenizer.stop_ids)
            drawn = generate(params, of, [ids] * rows, sampling, jax.random.key(config.seed))
            texts += [prompt + tokenizer.decode(tokens) for tokens in drawn]
        return texts

    return draw
