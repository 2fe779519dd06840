"""Where new layers go: layer maps, and the choice by smallest distance.

A layer map is a list with one source layer for every layer of the grown model, which keeps each
source layer at least once.
"""

from __future__ import annotations

from collections.abc import Sequence


def beside_smallest(distances: Sequence[float], layers: int) -> list[int]:
    """Copies the layers that change their input least, each copy right after its layer.

    Tele-FLM chooses layers by the distance between their input and output; the metric and the
    placement are our choice (relative distance ||out - in|| / ||in||, see `models/layers.py`): a
    layer close to the identity is closest to commuting with a repeat of itself. When more layers
    are added than there are, all are copied equally often first.

    Args:
      distances: of the source's layers.
      layers: number of layers of the grown model.

    Returns: the layer map, ascending.

    >>> beside_smallest([0.3, 0.1, 0.2], 5)
    [0, 1, 1, 2, 2]
    """
    source = len(distances)
    order = sorted(range(source), key=lambda i: (distances[i], i))
    each, rest = divmod(layers - source, source)
    copies = [each] * source
    for i in order[:rest]:
        copies[i] += 1
    return [i for i in range(source) for _ in range(1 + copies[i])]


def distances_matter(source: int, layers: int) -> bool:
    """Says whether `beside_smallest` depends on the distances.

    It does not where every layer gets equally many copies.

    Args:
      source: number of layers of the source.
      layers: number of layers of the grown model.
    """
    return 0 < source < layers and layers % source != 0


def stacked(source: int, layers: int) -> list[int]:
    """The whole stack again on top: i mod l (G_stack, arXiv 2405.15319; StackBERT).

    >>> stacked(3, 5)
    [0, 1, 2, 0, 1]
    """
    return [i % source for i in range(layers)]


def interposed(source: int, layers: int) -> list[int]:
    """Each copy right after its layer, spread evenly: floor(i l / L) (arXiv 2510.08008).

    >>> interposed(3, 6)
    [0, 0, 1, 1, 2, 2]
    """
    return [i * source // layers for i in range(layers)]


def middle(source: int, layers: int) -> list[int]:
    """The middle block of L - l layers twice in a row (MIDAS, arXiv 2409.19044).

    When more layers are added than there are, the whole stack is repeated first.

    >>> middle(4, 6)
    [0, 1, 2, 1, 2, 3]
    """
    index = list(range(source))
    while len(index) < layers:
        block = min(layers - len(index), len(index))
        start = (len(index) - block) // 2
        index[start + block : start + block] = index[start : start + block]
    return index
