"""Where new layers go: layer maps, and the choice by smallest distance.

A layer map is a list with one source layer for every layer of the grown model.
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
    """
    source = len(distances)
    order = sorted(range(source), key=lambda i: (distances[i], i))
    each, rest = divmod(layers - source, source)
    copies = [each] * source
    for i in order[:rest]:
        copies[i] += 1
    return [i for i in range(source) for _ in range(1 + copies[i])]
