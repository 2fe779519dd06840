"""The coordinate check of µP: do activations move equally far at every width?

(Tensor Programs V, arXiv 2203.03466, appendix D.1.) A model is trained for a few steps at several
widths. Of every layer's attention, MLP and stream, and of the logits, on one batch: the root mean
square, and that of its change since initialisation. Under µP the change does not depend on the
width; its slope against the width, both logarithms, is near 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.config import TransformerConfig
from flm_jax.models import Transformer
from flm_jax.studies.config import MupStudyConfig
from flm_jax.studies.study import Study, widened

Sizes = dict[str, np.ndarray]  # "attention 0" -> [step]


def _activations(params: Any, batch: dict[str, jax.Array], config: TransformerConfig) -> Any:
    logits, captured = Transformer(config).apply(
        {"params": params}, batch["tokens"], batch["segment_ids"], batch["positions"],
        capture_intermediates=True, mutable=["intermediates"],
    )  # fmt: skip
    layers = captured["intermediates"]["layers"]
    per_layer = {
        "attention": layers["attention"]["__call__"][0][0],
        "mlp": layers["mlp"]["__call__"][0],
        "stream": layers["__call__"][0][0],
    }
    found = {f"{name} {n}": x for name, xs in per_layer.items() for n, x in enumerate(xs)}
    return {**found, "logits": logits}


def sizes(
    study: Study, config: MupStudyConfig, parametrisation: str, factor: int, seed: int
) -> tuple[Sizes, ...]:
    """Root mean squares of activations, and of their change, after 0, 1, 2, .. steps."""
    proxy = study.experiment.stages[0]
    model = dataclasses.replace(widened(proxy.model, factor, parametrisation), remat="none")
    stage = dataclasses.replace(proxy, model=model)
    batches = study.batches(stage, seed)
    watched = jax.tree.map(jnp.asarray, next(batches))
    activations = jax.jit(_activations, static_argnums=2)
    state, step = study.start(stage, seed), study.step(stage)
    first = activations(state.params, watched, model)
    absolute: dict[str, list[float]] = {name: [] for name in first}
    change: dict[str, list[float]] = {name: [] for name in first}
    for n in range(config.coordinate_steps + 1):
        if n:
            state, _, _ = step(state, next(batches), np.float32(1))
        for name, x in activations(state.params, watched, model).items():
            absolute[name].append(float(jnp.sqrt(jnp.mean(jnp.square(x)))))
            change[name].append(float(jnp.sqrt(jnp.mean(jnp.square(x - first[name])))))
    return tuple({k: np.array(v) for k, v in group.items()} for group in (absolute, change))


def check(study: Study, config: MupStudyConfig, note: Any = print) -> dict[str, Any]:
    """For "mup" and "sp": widths, sizes, slopes of the change after the last step, max_slope.

    max_slope is the slope furthest from 0.
    """
    found: dict[str, Any] = {}
    base = study.experiment.stages[0].model.d_model
    for parametrisation in ("mup", "sp"):
        widths = [base * factor for factor in config.coordinate_factors]
        absolute: list[Sizes] = []
        change: list[Sizes] = []
        for factor in config.coordinate_factors:
            note(f"{parametrisation}: width {base * factor}")
            seeds = range(config.coordinate_seeds)
            runs = [sizes(study, config, parametrisation, factor, seed) for seed in seeds]
            for kept, groups in zip((absolute, change), zip(*runs, strict=True), strict=True):
                kept.append({k: np.mean([g[k] for g in groups], axis=0) for k in groups[0]})
        slopes = {
            name: float(np.polyfit(np.log2(widths), np.log2([c[name][-1] for c in change]), 1)[0])
            for name in change[0]
        }
        found[parametrisation] = {
            "max_slope": max(slopes.values(), key=abs),
            "slopes": slopes,
            "widths": widths,
            "sizes": {k: [a[k].tolist() for a in absolute] for k in absolute[0]},
            "changes": {k: [c[k].tolist() for c in change] for k in change[0]},
        }
    return found
