"""The named operators: which expansion each gives an axis, and what it promises.

A recipe is a comma-separated list that gives every growing axis one operator: `msg`, or
`tile,identity`, or `zero_pad,layers=stack`. An entry NAME sets all axes that the operator can grow;
an entry AXIS=NAME sets one axis. Later entries win. An operator that takes an argument has it in
parentheses: `layers=ranges(0-23,8-31)`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flm_jax.errors import UserError
from flm_jax.growth import layer_maps
from flm_jax.growth.expansion import (
    NEW,
    DenseMap,
    Expansion,
    Learned,
    Run,
    append_new,
    from_index,
)

EXACT, APPROX = "EXACT", "APPROX"
_LARGEST_DENSE = 1 << 22  # entries of a learned map: it is kept in the plan
_FROM_NONE = ("fresh", "zero_pad", "msg")  # operators that grow from no layers
HEADS = ("kv_heads", "q_per_kv")
WIDTHS = ("embed", "mlp", *HEADS)


@dataclasses.dataclass(frozen=True)
class Request:
    """One axis to grow, from one model to another."""

    axis: str
    source: int
    target: int
    small: Mapping[str, int]  # sizes of all axes before
    big: Mapping[str, int]  # and after
    distances: Sequence[float]  # of the source's layers from the identity
    normed: frozenset[str]  # axes over which the model has norms
    argument: str = ""  # what the recipe has in parentheses


@dataclasses.dataclass(frozen=True)
class Operator:
    """A named way to grow some axes.

    Attributes:
      name: its name in recipes.
      axes: the axes that it can grow.
      exactness: what it promises in general (a single expansion may promise less).
      symmetry: what makes added slots differ from their sources.
      paper: its source.
      build: makes the expansion of a request. Raises UserError if the sizes do not fit.
      two_steps: whether growing twice gives the same as growing once.
      by_distance: whether it copies the layers that are closest to the identity.
      takes: an example of its argument; "": it takes none.
      argument: its argument in a recipe.
    """

    name: str
    axes: tuple[str, ...]
    exactness: str
    symmetry: str
    paper: str
    build: Callable[[Request], Expansion]
    two_steps: bool = False
    by_distance: bool = False
    takes: str = ""
    argument: str = ""


def refusal(r: Request, why: str, instead: Sequence[str]) -> UserError:
    """The error of a request that cannot be met; `instead` names operators that could."""
    names = " or ".join(repr(name) for name in instead)
    advice = f"use operator {names}" if instead else "no operator grows it; keep its size"
    return UserError(
        f"growth of axis {r.axis!r} from {r.source} to {r.target}: {why}; {advice}",
    )


# Role whose entries are zero at new slots, so that these have no effect yet.
_ACTS = {"embed": "out", "mlp": "in", "kv_heads": "in", "q_per_kv": "in", "layers": "stack"}


def _msg(r: Request) -> Expansion:
    how: dict[str, Any] = {"operator": "msg", "masked": True}
    if r.axis == "layers" and r.source:
        index = layer_maps.beside_smallest(r.distances, r.target)
        return from_index(r.axis, r.source, index, **how)
    fill = "mean" if r.axis == "vocab" else "fresh"
    return append_new(r.axis, r.source, r.target, fill=fill, **how)


def _norm_gain(r: Request, counted: int, instead: Sequence[str]) -> float:
    """sqrt(q d / D), since zeros lower the mean square from S / d to q S / D.

    Raises UserError for a norm over heads. Its queries and keys would both have to be zero in new
    heads, so that neither would ever get a gradient.
    """
    if r.axis in r.normed and r.axis != "embed":
        why = "the model has a norm over all heads, whose mean new heads would change"
        raise refusal(r, why, instead)
    return math.sqrt(counted / r.target) if r.axis == "embed" else 1.0


def _zero_pad(r: Request) -> Expansion:
    gain = _norm_gain(r, r.source, ("msg", "tile"))
    return append_new(
        r.axis, r.source, r.target, operator="zero_pad", zero=(_ACTS[r.axis],), gain=gain
    )


def _tile(r: Request) -> Expansion:
    if r.target % r.source:
        why = f"operator 'tile' makes whole copies, and {r.target} is no multiple of {r.source}"
        raise refusal(r, why, ("tile_pad", "zero_pad", "msg"))
    k = r.target // r.source
    runs = (Run(0, r.source, 1 / k),) * k
    return Expansion(r.axis, r.source, runs, operator="tile")


def _tile_pad(r: Request) -> Expansion:
    q, rest = divmod(r.target, r.source)
    new = (Run(NEW, rest),) if rest else ()
    gain = _norm_gain(r, q * r.source, ("msg", "net2net")) if rest else 1.0
    return Expansion(
        r.axis, r.source, (Run(0, r.source, 1 / q),) * q + new, operator="tile_pad",
        zero=(_ACTS[r.axis],) if rest else (),
        gain=gain,
    )  # fmt: skip


def _uneven(r: Request) -> Expansion:
    if r.target % r.source:
        why = f"operator 'uneven' makes whole copies, and {r.target} is no multiple of {r.source}"
        raise refusal(r, why, ("net2net", "tile_pad", "zero_pad", "msg"))
    if r.axis in r.normed:
        why = "the model has a norm over all heads, which gives unequal copies equal gradients"
        raise refusal(r, why, ("tile", "msg"))
    k = r.target // r.source
    total = k * (k + 1) / 2
    runs = tuple(Run(0, r.source, (i + 1) / total) for i in range(k))
    return Expansion(r.axis, r.source, runs, operator="uneven")


def _random_copies(r: Request) -> tuple[list[int], list[float]]:
    """Old slots, then copies of randomly chosen slots; weights: 1 / number of occurrences."""
    rng = np.random.default_rng([zlib.crc32(r.axis.encode()), r.source, r.target])
    whole, rest = divmod(r.target, r.source)
    index = list(range(r.source)) * whole
    index += rng.choice(r.source, size=rest, replace=False).tolist()
    count = np.bincount(index, minlength=r.source)
    return index, (1 / count[index]).tolist()


def _net2net(r: Request) -> Expansion:
    index, weights = _random_copies(r)
    # A norm counts every copy of a coordinate, so unequal numbers of copies change its mean.
    exact = r.axis not in r.normed or r.target % r.source == 0
    return from_index(
        r.axis, r.source, index, weights, operator="net2net", exactness=EXACT if exact else APPROX
    )


def _aki(r: Request) -> Expansion:
    """Copies as in `net2net`; those after the old slots are written as in the next layer."""
    copies = from_index(r.axis, r.source, *_random_copies(r), operator="aki", exactness=APPROX)
    runs: list[Run] = []
    first_slot = 0
    for run in copies.runs:
        runs.append(dataclasses.replace(run, ahead=first_slot >= r.source))
        first_slot += run.length
    return dataclasses.replace(copies, runs=tuple(runs))


def _query_heads(sizes: Mapping[str, int]) -> int:
    """Number of all query heads."""
    return sizes["kv_heads"] * sizes.get("q_per_kv", 1)


def _repeat(r: Request) -> Expansion:
    times, rest = divmod(r.target, r.source)
    why = ""
    if rest:
        why = f"operator 'repeat' copies whole heads, and {r.target} is no multiple of {r.source}"
    elif _query_heads(r.small) != _query_heads(r.big):
        why = (
            f"operator 'repeat' gives the same query heads more key/value heads, but there are "
            f"{_query_heads(r.small)} and {_query_heads(r.big)} query heads"
        )
    if why:
        raise refusal(r, why, ("msg", "zero_pad"))
    index = [slot for slot in range(r.source) for _ in range(times)]
    return from_index(
        r.axis, r.source, index, [1 / times] * r.target, operator="repeat", splits="q_per_kv"
    )


def _layers(
    name: str, layer_map: Callable[[int, int], list[int]]
) -> Callable[[Request], Expansion]:
    """The `build` of an operator that copies layers by a layer map."""

    def build(r: Request) -> Expansion:
        if r.source == 0:
            why = f"operator {name!r} copies layers, and there are none"
            raise refusal(r, why, _FROM_NONE)
        index = layer_map(r.source, r.target)
        return from_index(r.axis, r.source, index, operator=name, exactness=APPROX)

    return build


def _ranges(r: Request) -> Expansion:
    if r.source == 0:
        raise refusal(r, "operator 'ranges' copies layers, and there are none", _FROM_NONE)
    index = layer_maps.ranges(r.argument, r.source, r.target)
    return from_index(r.axis, r.source, index, operator="ranges", exactness=APPROX)


def _identity(r: Request) -> Expansion:
    if r.source == 0:
        raise refusal(r, "operator 'identity' copies layers, and there are none", _FROM_NONE)
    index = layer_maps.beside_smallest(r.distances, r.target)
    return from_index(r.axis, r.source, index, operator="identity", zero=("stack",))


def _fresh(r: Request) -> Expansion:
    return append_new(r.axis, r.source, r.target, operator="fresh", exactness=APPROX)


def _mean(r: Request) -> Expansion:
    return append_new(r.axis, r.source, r.target, operator="mean", fill="mean", exactness=APPROX)


def _ligo(r: Request) -> Expansion:
    """Where the fit starts (`ligo.py`): copies as in `net2net`, layers as in `stack`."""
    if r.source * r.target > _LARGEST_DENSE:
        why = (
            f"operator 'ligo' would learn {r.source * r.target:,} entries, and the plan stores at "
            f"most {_LARGEST_DENSE:,}"
        )
        raise refusal(r, why, ("tile_pad", "zero_pad", "msg"))
    if r.source == 0:
        raise refusal(r, "operator 'ligo' mixes layers, and there are none", _FROM_NONE)
    if r.axis == "layers":
        index, weights = layer_maps.stacked(r.source, r.target), [1.0] * r.target
    else:
        index, weights = _random_copies(r)
    selection = np.zeros((r.target, r.source), np.float32)
    selection[np.arange(r.target), index] = 1
    shared = selection * np.array(weights, np.float32)[:, None]
    learned = Learned.of(DenseMap(reads=shared, writes=selection))
    return from_index(
        r.axis, r.source, index, weights, operator="ligo", exactness=APPROX, learned=learned
    )


_LAYERS = ("layers",)
_BREAK = "copies stay identical; set moments='asym' or noise_db"

OPERATORS: dict[str, Operator] = {
    o.name: o
    for o in (
        Operator("msg", (*WIDTHS, "layers", "vocab"), EXACT, "fresh entries; layers by place",
                 "Masked Structural Growth, arXiv 2305.02869", _msg, by_distance=True),
        Operator("zero_pad", (*WIDTHS, "layers"), EXACT, "fresh entries",
                 "Gesmundo & Maile, arXiv 2308.06103; norm's eps derived here", _zero_pad),
        Operator("tile", WIDTHS, EXACT, _BREAK, "HyperCloning, arXiv 2409.12903", _tile,
                 two_steps=True),
        Operator("tile_pad", WIDTHS, EXACT, f"{_BREAK}; fresh entries of the rest",
                 "after LEMON, arXiv 2310.07999; RMSNorm derived here", _tile_pad),
        Operator("uneven", ("mlp", *HEADS), EXACT, "unequal weights 1 : 2 : ..",
                 "after LEMON, arXiv 2310.07999", _uneven),
        Operator("net2net", WIDTHS, EXACT, _BREAK,
                 "Net2Net, arXiv 1511.05641; FPI of bert2BERT", _net2net),
        Operator("aki", WIDTHS, APPROX, "copies from the next layer",
                 "bert2BERT, arXiv 2110.07143", _aki),
        Operator("repeat", ("kv_heads",), EXACT, "each copy serves other queries",
                 "derived here", _repeat, two_steps=True),
        Operator("identity", _LAYERS, EXACT, "place in the stack",
                 "LLaMA-Pro, arXiv 2401.02415; places after Tele-FLM-1T, arXiv 2407.02783",
                 _identity, by_distance=True),
        Operator("stack", _LAYERS, APPROX, "place in the stack",
                 "G_stack, arXiv 2405.15319", _layers("stack", layer_maps.stacked), two_steps=True),
        Operator("interpose", _LAYERS, APPROX, "place in the stack",
                 "arXiv 2510.08008", _layers("interpose", layer_maps.interposed), two_steps=True),
        Operator("middle", _LAYERS, APPROX, "place in the stack",
                 "MIDAS, arXiv 2409.19044", _layers("middle", layer_maps.middle)),
        Operator("ranges", _LAYERS, APPROX, "place in the stack",
                 "SOLAR, arXiv 2312.15166; mergekit, arXiv 2403.13257", _ranges,
                 takes="0-23,8-31"),
        Operator("fresh", _LAYERS, APPROX, "fresh entries",
                 "zero- and one-layer expansion", _fresh),
        Operator("ligo", (*WIDTHS, "layers"), APPROX, "learned",
                 "LiGO, arXiv 2303.00980", _ligo),
        Operator("mean", ("vocab",), APPROX, "covariance noise on the embedding",
                 "Hewitt 2021, \"Initializing new word embeddings\"", _mean),
    )
}  # fmt: skip


def markdown() -> str:
    """All operators as a Markdown table, as in docs/growth.md."""
    lines = ["| operator | grows | claim | what separates added slots | source |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for o in OPERATORS.values():
        lines.append(
            f"| `{_written(o)}` | {', '.join(o.axes)} | {o.exactness} | {o.symmetry} | {o.paper} |"
        )
    return "\n".join(lines)


def _written(operator: Operator) -> str:
    """An operator as recipes have it, with an example of its argument."""
    return f"{operator.name}({operator.takes})" if operator.takes else operator.name


def text_of(recipe: str | Mapping[str, str]) -> str:
    """A recipe as text; a mapping gives the operator of each axis.

    Raises:
      UserError: it is neither text nor such a mapping.

    >>> text_of({"layers": "stack", "mlp": "tile"})
    'layers=stack,mlp=tile'
    """
    if isinstance(recipe, str):
        return recipe
    entries = list(recipe.items()) if isinstance(recipe, Mapping) else []
    if entries and all(isinstance(x, str) for entry in entries for x in entry):
        return ",".join(f"{axis}={name}" for axis, name in entries)
    raise UserError(
        f"recipe is {recipe!r}; give names of operators, as in 'tile,identity' or "
        "{'mlp': 'tile', 'layers': 'identity'}"
    )


def choose(recipe: str) -> dict[str, Operator]:
    """Reads a recipe: the operator of each axis; "none" grows no axis.

    Args:
      recipe: comma-separated names of operators; see the head of this module.

    Raises:
      UserError: an operator or axis is unknown, the operator does not grow the axis, or it lacks
        its argument or has one that it does not take.

    >>> {axis: o.name for axis, o in choose("vocab=mean,layers=stack").items()}
    {'vocab': 'mean', 'layers': 'stack'}
    >>> choose("msg,layers=ranges(0-2,1-3)")["layers"].argument
    '0-2,1-3'
    """
    if recipe == "none":
        return {}
    chosen: dict[str, Operator] = {}
    for entry in re.split(r",(?![^()]*\))", recipe):  # commas outside parentheses
        written, bracket, argument = (part.strip() for part in entry.partition("("))
        axis, equals, name = (part.strip() for part in written.rpartition("="))
        if name not in OPERATORS:
            raise UserError(
                f"growth.recipe {recipe!r}: no operator {name!r}; choose one of "
                f"{', '.join(OPERATORS)}"
            )
        operator = OPERATORS[name]
        if bool(bracket) != bool(operator.takes) or argument.find(")") != len(argument) - 1:
            takes = "an argument in parentheses" if operator.takes else "no argument"
            raise UserError(
                f"growth.recipe {recipe!r}: it has {entry.strip()!r}, but operator {name!r} takes "
                f"{takes}; write {_written(operator)}"
            )
        operator = dataclasses.replace(operator, argument=argument[:-1])
        if equals and axis not in operator.axes:
            raise UserError(
                f"growth.recipe {recipe!r}: operator {name!r} grows {', '.join(operator.axes)}, "
                f"not {axis!r}; operators for it: {', '.join(able(axis)) or 'none'}"
            )
        chosen |= dict.fromkeys([axis] if equals else operator.axes, operator)
    return chosen


def able(axis: str) -> list[str]:
    """Names of the operators that can grow an axis.

    >>> able("vocab")
    ['msg', 'mean']
    """
    return [name for name, operator in OPERATORS.items() if axis in operator.axes]


def uses_distances(recipe: str, layers: int, grown_layers: int) -> bool:
    """Whether a growth depends on how far the source's layers are from the identity.

    Args:
      recipe: names of operators.
      layers: number of layers of the source.
      grown_layers: number of layers of the target.

    Raises:
      UserError: as `choose`.
    """
    operator = choose(recipe).get("layers")
    by_distance = operator is not None and operator.by_distance
    return by_distance and layer_maps.distances_matter(layers, grown_layers)


def expansions(
    recipe: str,
    small: Mapping[str, int],
    big: Mapping[str, int],
    distances: Sequence[float],
    normed: frozenset[str],
) -> tuple[Expansion, ...]:
    """Makes an expansion for every axis whose size changes.

    Args:
      recipe: names of operators.
      small: sizes of the source's axes.
      big: sizes of the target's axes.
      distances: distances of the source's layers from the identity.
      normed: axes over which the model has norms.

    Raises:
      UserError: the recipe cannot grow an axis; names it, both sizes and operators that can.
    """
    chosen = choose(recipe)
    by_axis: dict[str, Expansion] = {}
    for axis, source in small.items():
        operator = chosen.get(axis)
        argument = operator.argument if operator else ""
        r = Request(axis, source, big[axis], small, big, distances, normed, argument)
        if any(e.splits == axis for e in by_axis.values()):
            continue
        if r.target == source:
            if operator and operator.takes:
                operator.build(r)  # raises if the argument asks for something else
            continue
        if r.target < source:
            same_heads = axis == "q_per_kv" and _query_heads(small) == _query_heads(big)
            raise UserError(
                f"growth of axis {axis!r} from {source} to {r.target}: a target is never smaller "
                f"than its source; set it to {source} or more"
                + (", or grow by kv_heads=repeat" if same_heads else "")
            )
        if operator is None:
            raise refusal(r, f"recipe {recipe!r} does not grow it", able(axis))
        by_axis[axis] = operator.build(r)
    return tuple(by_axis.values())
