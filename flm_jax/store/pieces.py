"""Cuts arrays into consecutive pieces of bounded size."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np


def chunk_shape(
    shape: Sequence[int], itemsize: int, limit: int, whole: Collection[int] = ()
) -> tuple[int, ...]:
    """Consecutive entries in C order, at most `limit` bytes, in pieces as even as possible.

    Dimensions in `whole` are not cut; what lies between the pieces of others is then no longer
    consecutive, and the limit may not be reached.
    """
    chunk = list(shape)
    for dim, size in enumerate(shape):
        if itemsize * math.prod(chunk) <= limit:
            break
        if dim not in whole:
            rows = limit // (itemsize * math.prod(chunk[:dim] + chunk[dim + 1 :]))
            chunk[dim] = math.ceil(size / math.ceil(size / max(rows, 1)))
    return tuple(max(size, 1) for size in chunk)


def cells(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The pieces of an array, as slices, in C order."""
    grid = [math.ceil(n / c) for n, c in zip(shape, chunk, strict=True)]
    for cell in np.ndindex(*grid):
        yield tuple(
            slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(cell, chunk, shape, strict=True)
        )
