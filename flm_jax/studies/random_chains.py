"""Random chains of growths: draws them, checks them (`chain_check.py`), shrinks failing ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from flm_jax import mapping
from flm_jax.config import OptimizerConfig, TransformerConfig
from flm_jax.growth.operators import EXACT, OPERATORS, able
from flm_jax.params.axes import axis_sizes
from flm_jax.studies.chain_check import UNCLIPPED, Chain, ChainGrowth, Counts, check
from flm_jax.studies.chain_oracle import Mismatch

LARGEST = {"vocab": 26, "embed": 24, "mlp": 20, "kv_heads": 6, "q_per_kv": 4, "layers": 6}
ANY_SIZE = (8, 1, 1)  # the mesh that splits no parameter
MESHES = (
    (4, 2, 1), (4, 1, 2), (2, 2, 2), (2, 4, 1), (2, 1, 4), (1, 4, 2), (1, 2, 4),
    (1, 8, 1), (1, 1, 8),
)  # fmt: skip
MESH_CHAINS = 0.12  # of all chains; they compile slowly
MODEL_CHAINS = 0.1
_ATTEMPTS = 80  # to shrink one chain
_KEEP_GOING = 50  # chains between two clearings of compiled programs, which bounds memory
Sizes = dict[str, int]


def draw(seed: int) -> Chain:
    """Draws a chain. The same seed gives the same chain."""
    rng = np.random.default_rng([seed, 77])
    on_mesh = rng.random() < MESH_CHAINS
    model = _model(rng, even=on_mesh)
    sizes, growths = axis_sizes(model), []
    for _ in range(_pick(rng, {1: 0.55, 2: 0.3, 3: 0.1, 4: 0.05})):
        g = _growth(rng, sizes, even=on_mesh)
        if not g.operators:
            continue  # everything is at its largest
        before, sizes = sizes, sizes | dict(g.sizes)
        if on_mesh:
            g = _with_meshes(rng, g, before, sizes)
        growths.append(g)
    optimizer = OptimizerConfig(
        b1=0.9,
        b2=_pick(rng, {0.95: 1, 0.999: 1}),
        eps=_pick(rng, {1e-3: 1, 1e-5: 1}),
        weight_decay=_pick(rng, {0.0: 1, 0.1: 2}),
        clip_norm=_pick(rng, {UNCLIPPED: 3, 0.5: 1}),
    )
    return Chain(
        seed=seed,
        model=model,
        updates=_pick(rng, {0: 1, 7: 3}),
        steps=_pick(rng, {0: 2, 1: 1, 2: 1}),
        optimizer=optimizer,
        model_checks=bool(rng.random() < MODEL_CHAINS),
        growths=tuple(growths),
    )


def _pick(rng: np.random.Generator, weights: dict[Any, float]) -> Any:
    """One of the keys, with these relative frequencies."""
    values, shares = list(weights), np.array(list(weights.values()), float)
    return values[rng.choice(len(values), p=shares / shares.sum())]


def _model(rng: np.random.Generator, *, even: bool) -> TransformerConfig:
    parametrisation = _pick(rng, {"mup": 3, "completep": 2, "sp": 1})
    layers = _pick(rng, {0: 1, 1: 2, 2: 2, 3: 1})
    deep = parametrisation == "completep"
    kv_heads = _pick(rng, {1: 1, 2: 2})
    q_per_kv = _pick(rng, {1: 1, 2: 2, 4: 1})
    return TransformerConfig(
        vocab_size=_pick(rng, {16: 1} if even else {11: 2, 16: 1}),
        num_layers=layers,
        d_model=_pick(rng, {4: 2, 6: 2, 8: 1} if even else {4: 2, 5: 1, 6: 2, 8: 1}),
        num_heads=kv_heads * q_per_kv,
        num_kv_heads=kv_heads,
        head_dim=_pick(rng, {2: 1, 4: 1}),
        d_ff=_pick(rng, {4: 2, 6: 1, 8: 2} if even else {3: 1, 5: 1, 6: 1}),
        mup_base_width=_pick(rng, {0: 1, 4: 2}),
        mup_base_depth=int(rng.integers(0, layers + 1)) if deep else 0,
        parametrisation=parametrisation,
        input_mult=1.3,
        output_mult=0.7,
        matrix_init_std=0.3,
        vector_init_std=0.5,
        rms_norm_eps=_pick(rng, {1e-2: 1, 1e-5: 1}),
        depth_scaled_init=False if deep else _pick(rng, {False: 2, True: 1}),
        dtype="float64",
    )


def _growth(rng: np.random.Generator, sizes: Sizes, *, even: bool) -> ChainGrowth:
    following = rng.random() < 0.12  # a growth after which the small model can be followed
    usable = ("tile", "uneven", "net2net", "tile_pad") if following else tuple(OPERATORS)
    operators, targets = _operators(rng, sizes, usable, even=even)
    moments, noise_db = (
        _pick(rng, {"asym": 2, "dual": 2, "reset": 1}),
        _pick(rng, {0.0: 2, 10.0: 1}),
    )
    rates = _pick(rng, {"target": 4, "carry": 4, "ramp": 3})
    if following:
        moments, rates, noise_db = "dual", "carry", 0.0
    if "ligo" in operators.values():
        rates = "target"  # no factor keeps the steps of a dense map
    return ChainGrowth(
        operators=operators,
        sizes=targets,
        moments=moments,
        rates=rates,
        noise_db=noise_db,
        ramp_steps=_pick(rng, {1: 1, 2: 2, 4: 1}),
        added_rate=_pick(rng, {1.0: 5, 1.5: 1}),
        input_mult=_pick(rng, {0.0: 4, 2.0: 1}),
        output_mult=_pick(rng, {0.0: 4, 1.9: 1}),
        steps=_pick(rng, {0: 2, 1: 2, 2: 2, 3: 1}),
    )


def _operators(
    rng: np.random.Generator, sizes: Sizes, usable: tuple[str, ...], *, even: bool
) -> tuple[dict[str, str], Sizes]:
    """An operator that is drawn first, so that each has its turn, and others on other axes."""
    operators: dict[str, str] = {}
    targets: Sizes = {}

    def add(axis: str, name: str) -> None:
        target = _target(rng, name, axis, sizes, even=even)
        if target is None or axis in targets:
            return
        operators[axis] = _ranges(rng, sizes[axis], target) if name == "ranges" else name
        targets[axis] = target
        if name == "repeat":  # the same queries, for more key/value heads
            operators.pop("q_per_kv", None)
            targets["q_per_kv"] = sizes["q_per_kv"] * sizes["kv_heads"] // target

    # APPROX operators take fewer first places, because fewer checks follow them.
    chances = np.array([4.0 if OPERATORS[name].exactness == EXACT else 3.0 for name in usable])
    order = rng.choice(len(usable), len(usable), replace=False, p=chances / chances.sum())
    for name in (usable[n] for n in order):
        for axis in rng.permutation(OPERATORS[name].axes).tolist():
            add(axis, name)
            if operators:
                break
        if operators:
            break
    for axis in LARGEST:
        # What is exact stays so; the first operator gives every other one its turn.
        exact = [n for n in able(axis) if OPERATORS[n].exactness == EXACT and n in usable]
        if exact and rng.random() < 0.3:
            add(axis, str(rng.choice(exact)))
    return operators, targets


def _target(
    rng: np.random.Generator, name: str, axis: str, sizes: Sizes, *, even: bool
) -> int | None:
    """A size that the operator can reach, or None."""
    size, room = sizes[axis], LARGEST[axis] - sizes[axis]
    if size == 0 and name not in ("fresh", "zero_pad", "msg"):
        return None
    step = 4 if even and axis in ("mlp", "vocab") else 1
    if name in ("tile", "uneven"):
        choices = [k * size for k in (2, 3)]
    elif name == "repeat":
        choices = [k * size for k in (2, 4) if sizes["q_per_kv"] % k == 0]
    elif name == "tile_pad":
        choices = [2 * size + n for n in range(0, size + 1, step)]
    else:
        choices = [size + n for n in range(step, max(size, 2) + 2, step)]
    choices = [c for c in choices if c - size <= room]
    return int(rng.choice(choices)) if choices else None


def _ranges(rng: np.random.Generator, size: int, target: int) -> str:
    """Operator `ranges` with overlapping ranges of all layers, in any order."""
    whole, rest = divmod(target - size, size)
    cut = int(rng.integers(max(rest, 1), size + 1))
    pieces = [(0, size)] * whole + [(0, cut), (cut - rest, size)]
    shuffled = [pieces[n] for n in rng.permutation(len(pieces))]
    text = ",".join(f"{first}-{end - 1}" for first, end in shuffled if first < end)
    return f"ranges({text})"


def _with_meshes(
    rng: np.random.Generator, g: ChainGrowth, before: Sizes, after: Sizes
) -> ChainGrowth:
    """The growth with meshes that both models can be split over."""
    split_queries = bool(rng.random() < 0.3)
    heads = "q_per_kv" if split_queries else "kv_heads"

    def fitting(sizes: Sizes) -> list[tuple[int, ...]]:
        fits: list[tuple[int, ...]] = [
            mesh
            for mesh in MESHES
            if sizes["embed"] % mesh[1] == 0
            and all(sizes[axis] % mesh[2] == 0 for axis in ("mlp", "vocab", heads))
        ]
        return fits or [ANY_SIZE]

    shapes = [options[int(rng.integers(len(options)))] for options in map(fitting, (before, after))]
    return dataclasses.replace(g, meshes=(*shapes[0], *shapes[1]), split_queries=split_queries)


def failure(chain: Chain, counts: Counts | None = None) -> Mismatch | None:
    """Checks a chain; returns the first mismatch, or None."""
    try:
        check(chain, counts)
    except Mismatch as mismatch:
        return mismatch
    return None


def _signature(mismatch: Mismatch) -> str:
    """What must stay the same while a chain is made smaller."""
    if mismatch.kind in ("crash", "refused"):
        return re.sub(r"[\d.e-]+", "", f"{mismatch.kind} {mismatch.detail}")
    return mismatch.kind


def shrink(chain: Chain, mismatch: Mismatch, attempts: int = _ATTEMPTS) -> tuple[Chain, Mismatch]:
    """Makes a failing chain smaller, as long as it fails in the same check.

    Args:
      chain: the chain.
      mismatch: how it fails.
      attempts: chains to try at most.

    Returns:
      The smallest failing chain found, and how it fails.
    """
    wanted, smaller = _signature(mismatch), True
    while smaller:
        smaller = False
        for candidate in _smaller(chain):
            if attempts == 0:
                return chain, mismatch
            attempts -= 1
            found = failure(candidate)
            if found and _signature(found) == wanted:
                chain, mismatch, smaller = candidate, found, True
                break
    return chain, mismatch


def _smaller(chain: Chain) -> Iterator[Chain]:
    """Chains with one thing less: growths, axes, options, steps, sizes."""

    def with_growth(n: int, **values: Any) -> Chain:
        growths = list(chain.growths)
        growths[n] = dataclasses.replace(growths[n], **values)
        return dataclasses.replace(chain, growths=tuple(growths))

    for n in range(len(chain.growths)):
        yield dataclasses.replace(chain, growths=chain.growths[:n])
        yield dataclasses.replace(chain, growths=chain.growths[:n] + chain.growths[n + 1 :])
    plain = {"meshes": (), "noise_db": 0.0, "added_rate": 1.0, "input_mult": 0.0,
             "output_mult": 0.0, "moments": "asym", "rates": "target", "steps": 0}  # fmt: skip
    for n, g in enumerate(chain.growths):
        for axis in g.operators:
            operators = {a: name for a, name in g.operators.items() if a != axis}
            gone = {axis, "q_per_kv"} if g.operators[axis] == "repeat" else {axis}
            sizes = {a: size for a, size in g.sizes.items() if a not in gone}
            if operators:
                yield with_growth(n, operators=operators, sizes=sizes)
        for name, value in plain.items():
            if getattr(g, name) != value:
                yield with_growth(n, **{name: value})
        if g.steps > 1:
            yield with_growth(n, steps=1)
    for values in (
        {"steps": 0}, {"updates": 0}, {"model_checks": False},
        {"optimizer": dataclasses.replace(chain.optimizer, clip_norm=UNCLIPPED)},
        {"optimizer": dataclasses.replace(chain.optimizer, weight_decay=0.0)},
    ):  # fmt: skip
        candidate = dataclasses.replace(chain, **values)
        if candidate != chain:
            yield candidate
    yield from _smaller_models(chain)


def _smaller_models(chain: Chain) -> Iterator[Chain]:
    """Chains from smaller models, on axes that never grow."""
    grows = {axis for g in chain.growths for axis in g.sizes}
    model = chain.model
    changes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("layers", {"num_layers": min(model.num_layers, 1), "mup_base_depth": 0}),
        ("embed", {"d_model": 4, "mup_base_width": min(model.mup_base_width, 4)}),
        ("mlp", {"d_ff": 2}),
        ("vocab", {"vocab_size": 8}),
        ("", {"mup_base_width": 0, "mup_base_depth": 0, "parametrisation": "mup"}),
        ("", {"input_mult": 1.0, "output_mult": 1.0, "depth_scaled_init": False}),
    )
    if not grows & {"kv_heads", "q_per_kv"}:
        changes = (*changes, ("", {"num_heads": 1, "num_kv_heads": 1}))
    for axis, values in changes:
        smaller = dataclasses.replace(model, **values)
        if axis not in grows and smaller != model:
            yield dataclasses.replace(chain, model=smaller)


def fuzz(chains: Sequence[Chain], progress: Callable[[int], None]) -> dict[str, Any]:
    """Checks chains, and makes one of each kind of failing ones smaller.

    Args:
      chains: the chains.
      progress: called with the number of chains done.

    Returns:
      Counts of what was run, the mismatches, and the chains made smaller, the smallest first. It is
      JSON-able.
    """
    counts, failing = Counts(), []
    for n, chain in enumerate(chains):
        if mismatch := failure(chain, counts):
            failing.append((chain, mismatch))
        if n % _KEEP_GOING == _KEEP_GOING - 1:
            jax.clear_caches()
        progress(n + 1)
    by_kind = {_signature(mismatch): (chain, mismatch) for chain, mismatch in reversed(failing)}
    shrunk = [shrink(*pair) for pair in by_kind.values()]
    shrunk.sort(key=lambda pair: len(pair[0].to_json()))
    return {
        "chains": len(chains),
        "growths": counts.growths,
        "exact_growths": counts.exact,
        "mesh_growths": counts.mesh,
        "checks": dict(counts.checks),
        "operators": {name: counts.operators[name] for name in OPERATORS},
        "mismatches": [
            {"seed": chain.seed, "kind": mismatch.kind, "detail": mismatch.detail}
            for chain, mismatch in failing
        ],
        "shrunk": [
            {"chain": mapping.to_dict(chain), "mismatch": str(mismatch)}
            for chain, mismatch in shrunk
        ],
    }
