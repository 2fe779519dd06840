"""Where new layers go: layer maps, and the choice by smallest distance.

A layer map lists the source layer of every layer of the grown model. It contains each source layer
at least once.
"""

from __future__ import annotations

from collections.abc import Sequence


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
