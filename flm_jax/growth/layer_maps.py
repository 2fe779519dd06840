"""Where new layers go: layer maps, and the choice by smallest distance.

A layer map lists the source layer of every layer of the grown model. It contains each source layer
at least once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from flm_jax.errors import UserError


def beside_smallest(distances: Sequence[float], layers: int) -> list[int]:
    """Copies the layers that change their input least, each copy right after its layer.

    Tele-FLM chooses layers by the distance between their input and output. The metric and the
    placement are our choice: relative distance ||out - in|| / ||in|| (`models/layers.py`), because
    repeating a layer changes least if the layer is close to the identity. If more layers are added
    than there are, all are first copied equally often.

    Args:
      distances: distance of each of the source's layers.
      layers: number of layers of the grown model.

    Returns:
      The layer map, ascending.

    >>> beside_smallest([0.3, 0.1, 0.2], 5)
    [0, 1, 1, 2, 2]
    """
    source = len(distances)
    order = sorted(range(source), key=lambda i: (distances[i], i))
    every_layer, rest = divmod(layers - source, source)
    copies = [every_layer] * source
    for i in order[:rest]:
        copies[i] += 1
    return [i for i in range(source) for _ in range(1 + copies[i])]


def distances_matter(source: int, layers: int) -> bool:
    """Whether `beside_smallest` depends on the distances.

    It does not if every layer gets equally many copies.

    Args:
      source: number of layers of the source.
      layers: number of layers of the grown model.

    >>> distances_matter(4, 6), distances_matter(4, 8)
    (True, False)
    """
    return 0 < source < layers and layers % source != 0


def stacked(source: int, layers: int) -> list[int]:
    """Repeats the whole stack on top of itself: i mod l (G_stack, arXiv 2405.15319; StackBERT).

    >>> stacked(3, 5)
    [0, 1, 2, 0, 1]
    """
    return [i % source for i in range(layers)]


def interposed(source: int, layers: int) -> list[int]:
    """Puts copies right after their layers, spread evenly: floor(i l / L) (arXiv 2510.08008).

    >>> interposed(3, 6)
    [0, 0, 1, 1, 2, 2]
    """
    return [i * source // layers for i in range(layers)]


def middle(source: int, layers: int) -> list[int]:
    """Repeats the middle block of L - l layers in place (MIDAS, arXiv 2409.19044).

    If more layers are added than there are, the whole stack is repeated first.

    >>> middle(4, 6)
    [0, 1, 2, 1, 2, 3]
    """
    index = list(range(source))
    while len(index) < layers:
        block = min(layers - len(index), len(index))
        start = (len(index) - block) // 2
        index[start + block : start + block] = index[start : start + block]
    return index


def listed(text: str) -> list[int]:
    """The layers of comma-separated ranges "first-last", with both ends, or single layers.

    Raises:
      UserError: a range is malformed.

    >>> listed("0-2,1-3")
    [0, 1, 2, 1, 2, 3]
    """
    index: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part, re.ASCII)
        if ends is None or int(ends[1]) > int(ends[2] or ends[1]):
            raise _refusal(text, f"{part.strip()!r} is no range; write first-last, as in 0-23")
        index += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return index


def ranges(text: str, source: int, layers: int) -> list[int]:
    """Concatenates ranges of layers (SOLAR, arXiv 2312.15166; mergekit's passthrough).

    Args:
      text: the ranges, as in `listed`.
      source: number of layers of the source.
      layers: number of layers of the grown model.

    Raises:
      UserError: a range is malformed or outside the source; or the ranges have another number of
        layers, leave a source layer out, or only reorder them.
    """
    index = listed(text)
    if max(index) >= source:
        raise _refusal(
            text,
            f"they have layer {max(index)}, and the source has layers 0 to {source - 1}; change "
            "them (both ends count)",
        )
    if missing := sorted(set(range(source)) - set(index)):
        raise _refusal(
            text,
            f"they leave out {', '.join(map(str, missing))} of the source's {source} layers, and "
            "growth keeps every layer; add them",
        )
    if len(index) != layers:
        raise _refusal(
            text,
            f"they have {len(index)} layers, and the target has {layers}; change them, or set "
            f"num_layers to {len(index)}",
        )
    if layers == source and index != sorted(index):
        raise _refusal(
            text,
            f"they put the same {source} layers in another order, which is no growth; repeat "
            "layers, or leave the ranges out",
        )
    return index


def _refusal(text: str, why: str) -> UserError:
    return UserError(f"growth.recipe: ranges({text}): {why}")
