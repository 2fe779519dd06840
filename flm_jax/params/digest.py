"""A digest of parameters: equal bits give equal digests, in every layout.

The bits of each leaf are 32-bit words (a narrower entry is one word, an 8-byte entry two). Each of
`LANES` numbers is a sum over all words, modulo 2^32:

  lane = sum over positions p of  mix(word at p  xor  mix(key of p in this lane))

`mix` is the finaliser of MurmurHash3 (A. Appleby), a bijection of 32-bit words, and the key of a
position is linear in its coordinates, with multipliers of the lane's own. Sums do not depend on
order or grouping. So every device sums the shards that it holds, the devices exchange one number
per leaf and lane, and the result does not depend on mesh, devices or processes. The digest is the
SHA-256 of names, dtypes, shapes and lanes.

What it detects (derived here): mixing is a bijection of the word, so a change inside one word, such
as one flipped bit, changes every lane with certainty. Other accidents, such as exchanged entries or
rows, stay unnoticed if all lanes agree by chance: 2^-128 if they behave like random numbers. It is
no cryptographic hash: someone who tries can construct two equal digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flm_jax.params import trees

LANES = 4
DIMS = 8  # most dimensions of a leaf; the two words of an 8-byte entry count as one
SCHEME = "v2"  # before each digest; digests without it are of the earlier scheme (SHA-256 of bytes)


def _constants(name: str, count: int) -> np.ndarray:
    """uint32 [count]: numbers that look random."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * count), "<u4")


_START = _constants("start", LANES)  # the lanes' keys at the origin
# Odd, so that a key differs from all others along one dimension.
_MULTIPLIERS = (_constants("step", LANES * DIMS) | np.uint32(1)).reshape(LANES, DIMS)

_BLOCK_BYTES = 4 << 20

Piece = tuple[Sequence[slice], np.ndarray]  # where it is in the leaf, and its entries


def params_digest(params: Mapping[str, Any]) -> str:
    """Computes a digest of parameters: equal for bit-identical ones, whatever their sharding.

    No entry leaves its device: devices and processes exchange `LANES` numbers per leaf.

    Args:
      params: nested dicts of arrays, all on the same devices.

    Returns:
      `SCHEME`, "-", and 64 hexadecimal digits.
    """
    leaves = dict(trees.flatten(params))
    words = {path: _words(x) if isinstance(x, np.ndarray) else x for path, x in leaves.items()}
    lanes = np.asarray(digest_program(words)(words))
    return _digest((path, x, row) for (path, x), row in zip(leaves.items(), lanes, strict=True))


def digest_program(leaves: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], jax.Array]:
    """Makes the jitted program of `params_digest`.

    Args:
      leaves: arrays or `ShapeDtypeStruct`s by path. If their shardings are named, the result is on
        every device of the mesh.

    Returns:
      The program: leaves -> uint32 [leaves, LANES], in the order of sorted paths.
    """
    placed = [getattr(x, "sharding", None) for x in leaves.values()]
    meshes = [at.mesh for at in placed if isinstance(at, NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    return jax.jit(_lanes_of_all, out_shardings=everywhere)


def digest_of_pieces(leaves: Iterable[tuple[str, Any, Iterable[Piece]]]) -> str:
    """Computes `params_digest` from pieces, for parameters that are not in memory.

    Args:
      leaves: for each leaf its path, a value with its dtype and shape, and pieces that hold each of
        its entries once, in any order.
    """

    def lanes(pieces: Iterable[Piece]) -> np.ndarray:
        total = np.zeros(LANES, np.uint32)
        for index, piece in pieces:
            start = [s.start for s in index]
            for row, block in _blocks(piece):
                first = _first_keys([start[0] + row, *start[1:]] if start else start)
                total += np.asarray(_lanes_at(_words(block), first))
        return total

    return _digest((path, leaf, lanes(pieces)) for path, leaf, pieces in leaves)


def _blocks(piece: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts a piece along its first axis: its words are needed once more for each lane."""
    rows = max(1, _BLOCK_BYTES * len(piece) // max(piece.nbytes, 1)) if piece.ndim else 1
    if not piece.ndim or rows >= len(piece):
        yield 0, piece
        return
    for row in range(0, len(piece), rows):
        yield row, piece[row : row + rows]


def _digest(leaves: Iterable[tuple[str, Any, np.ndarray]]) -> str:
    """Combines path, dtype, shape and lanes of all leaves."""
    hashed = hashlib.sha256()
    for path, leaf, lanes in sorted(leaves, key=lambda entry: entry[0]):
        numbers = " ".join(str(int(lane)) for lane in lanes)
        hashed.update(f"{path} {np.dtype(leaf.dtype).name} {leaf.shape} {numbers}\n".encode())
    return f"{SCHEME}-{hashed.hexdigest()}"


def _words(x: np.ndarray) -> np.ndarray:
    """The entries' bits as unsigned integers of at most 32 bits; 8-byte entries get a last axis."""
    x = np.ascontiguousarray(x).reshape(x.shape)
    if x.dtype.itemsize == 8:
        return x[..., None].view(np.uint32)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def _first_keys(start: Sequence[int]) -> np.ndarray:
    """uint32 [LANES]: the keys of the position with these coordinates."""
    keys = _START.copy()
    for dim, at in enumerate(start):
        keys += np.uint32(at) * _MULTIPLIERS[:, dim]
    return keys


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32: the finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _lanes(x: jax.Array, first: Any) -> jax.Array:
    """The lanes of a part of a leaf, uint32 [LANES].

    Args:
      x: the part.
      first: uint32 [LANES], the keys of its first entry.
    """
    bits = min(8 * x.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)[None]
    key = trees.along(jnp.asarray(first), 0, words.ndim)
    for dim, size in enumerate(words.shape[1:]):
        at = trees.along(jnp.arange(size, dtype=jnp.uint32), dim + 1, words.ndim)
        key = key + at * trees.along(_MULTIPLIERS[:, dim], 0, words.ndim)
    return jnp.sum(_mix(words ^ _mix(key)), axis=range(1, words.ndim), dtype=jnp.uint32)


_lanes_at = jax.jit(_lanes)


def _lanes_of_all(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """uint32 [leaves, LANES]."""
    return jnp.stack([_lanes(leaves[path], _first_keys(())) for path in sorted(leaves)])
