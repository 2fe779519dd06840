"""Reads and writes files of named tensors by rows: safetensors, and PyTorch's older .bin.

This module reads and writes the safetensors format (8 bytes length, a JSON header, raw bytes)
without its library (0.8). The library cannot write a tensor in parts. It reads parts of a tensor
through a mapping of the file, whose pages stay in the process's memory. Measured on files of 1 GB,
float32 and bfloat16 alike, read in rows of 16 MiB: a peak of 986 MiB above the start, against 32
MiB here, and 0.15 s against 0.12 s. Opening the file for every read bounds the peak (66 MiB), but
parses the header each time: 3.2 s for 2000 small tensors, against 0.02 s. And its errors name no
tensor. The tests compare the files of both.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import operator
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from flm_jax import extras
from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.runtime import paths, regular

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bits of a value of every dtype that the format has.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64), **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16), "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"
_LONGEST_HEADER = 100 << 20  # bytes; the same limit as in the safetensors library
_MOST_AXES = 32
_BUFFER = r"(^|\.)(rotary_\w*\.\w*(inv_freq|cos_cached|sin_cached)|position_ids)$"
_TORCH_NAMES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16",
                "torch.bfloat16": "BF16"}  # fmt: skip


def is_buffer(name: str) -> bool:
    """Whether a tensor is one that older versions saved and that config.json determines.

    These are RoPE's frequencies, cosines and sines, and the positions.
    """
    return bool(re.search(_BUFFER, name))


class TensorFile(Protocol):
    """One file of tensors.

    Attributes:
      path: the file.
      shapes, dtypes: shape and dtype of each tensor by name.
    """

    path: pathlib.Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads rows `start` to `stop` of a tensor, in its own dtype."""


class SafetensorsFile:
    """A safetensors file, read by rows."""

    def __init__(self, path: pathlib.Path):
        """Reads the header.

        Raises:
          UserError: the file is truncated or damaged, or has a tensor that is not of floats.
        """
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._offsets: dict[str, int] = {}
        header, data = self._header()
        extents: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            code, shape, start, stop = self._entry(name, entry)
            extents.append((start, stop, name))
            if is_buffer(name):
                continue
            if code not in DTYPES:
                raise UserError(
                    f"{path}: {name} has dtype {code}; convert it to one of {', '.join(DTYPES)}"
                )
            self.dtypes[name], self.shapes[name] = DTYPES[code], shape
            self._offsets[name] = data + start
        self._check_extents(extents, data)

    def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
        """Reads a tensor's dtype, shape and place, by the rules of the safetensors library.

        The library counts in 64 bits, and refuses a shape whose product overflows on the way.
        """
        try:
            code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = isinstance(shape, list) and all(
                type(x) is int and 0 <= x < 2**64 for x in (*shape, start, stop)
            )
            bits = _BITS[code]
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise self._torn(f"its header has {entry!r} for {name}")
        if len(shape) > _MOST_AXES:
            raise self._torn(f"{name} has {len(shape)} axes")
        counts = itertools.accumulate((bits, *shape), operator.mul)
        if max(counts) >= 2**64 or math.prod(shape) * bits != (stop - start) * 8:
            raise self._torn(f"{name} {shape} has {stop - start} bytes of {code}")
        return code, tuple(shape), start, stop

    def _check_extents(self, extents: list[tuple[int, int, str]], data: int) -> None:
        """Checks that the tensors fill the file, each once; `data` is the offset of the first."""
        end = 0
        for start, stop, name in sorted(extents):
            if data + stop > self._size:
                raise self._torn(f"{name} ends at byte {data + stop:,} of {self._size:,}")
            if start != end:
                raise self._torn(f"{name} starts at byte {start:,} of the data, not at {end:,}")
            end = stop
        if data + end != self._size:
            raise self._torn(f"its tensors end at byte {data + end:,} of {self._size:,}")

    def _torn(self, reason: str) -> UserError:
        """The error for a truncated or damaged file."""
        return UserError(f"{self.path}: truncated or damaged: {reason}; fetch the file again")

    def _header(self) -> tuple[Any, int]:
        """Reads the header; returns it and the offset of the data in bytes."""
        with regular.opened(self.path) as file:
            self._size = paths.size(self.path)
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(self._size - 8, _LONGEST_HEADER):
                raise self._torn(f"{self._size:,} bytes, header of {length:,}")
            try:
                text = file.read(length)
                header = json_text.parse(text, strict=True)
            except ValueError as error:
                raise self._torn(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict) or not text.startswith(b"{"):
            raise self._torn("its header is no JSON object")
        more = header.pop("__metadata__", None)
        if not isinstance(more, dict | None) or any(
            type(x) is not str for x in (more or {}).values()
        ):
            raise self._torn("__metadata__ in its header is no object of texts")
        return header, 8 + length

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        shape, dtype = self.shapes[name], self.dtypes[name]
        row = math.prod(shape[1:])
        rows = np.empty((stop - start, *shape[1:]), dtype)
        view = rows.reshape(-1).view(np.uint8).data
        with paths.unbuffered(self.path) as file:
            file.seek(self._offsets[name] + start * row * dtype.itemsize)
            while view:
                read = file.readinto(view)
                if not read:
                    raise self._torn(f"{name} ends early")
                view = view[read:]
        return rows


class BinFile:
    """PyTorch's format, read with `weights_only=True`, which runs no code from the file."""

    def __init__(self, path: pathlib.Path):
        """Maps the file.

        Raises:
          UserError: torch is not installed, or the file is damaged or holds other objects.
        """
        paths.check_local(path, ".bin files")
        with extras.named(f"{path}: reading a .bin file", "convert it to safetensors"):
            import torch
        self.path = path
        regular.opened(path).close()  # torch would wait for a pipe
        try:
            self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises many types
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{path}: torch's loader for weights alone refuses it ({reason}); fetch the file "
                "again, or convert it to safetensors"
            ) from error
        self.shapes, self.dtypes = {}, {}
        if not isinstance(self._tensors, dict) or not all(
            isinstance(n, str) for n in self._tensors
        ):
            raise UserError(f"{path}: no tensors by name; fetch the file again")
        for name, tensor in self._tensors.items():
            if is_buffer(name):
                continue
            code = _TORCH_NAMES.get(str(getattr(tensor, "dtype", type(tensor).__name__)))
            if code is None:
                raise UserError(f"{path}: {name} is no tensor of floats; remove it")
            self.shapes[name], self.dtypes[name] = tuple(tensor.shape), DTYPES[code]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        import torch

        rows = self._tensors[name][start:stop].contiguous()
        if rows.dtype == torch.bfloat16:  # torch cannot convert it to numpy
            return np.asarray(rows.view(torch.int16).numpy()).view(DTYPES["BF16"])
        return np.asarray(rows.numpy())


class Tensors:
    """All tensors of a folder, across its shards."""

    def __init__(self, folder: pathlib.Path, only: TensorFile | None = None):
        """Reads the headers, not the tensors; `only`: a file that holds them all.

        Raises:
          UserError: the folder has no weights, the index is malformed or names a missing file, or
            index and files disagree about a tensor.
        """
        self.folder = folder
        self.files: dict[str, TensorFile] = {}
        if only is not None:
            self.files = dict.fromkeys(only.shapes, only)
            return
        for single, kind in ((WEIGHTS, SafetensorsFile), (BIN, BinFile)):
            index = folder / f"{single}.index.json"
            # The order of transformers, which prefers one file to shards.
            if (folder / single).exists():
                file = kind(folder / single)
                self.files = dict.fromkeys(file.shapes, file)
                return
            if index.exists():
                self._read_index(index, kind)
                return
        raise UserError(
            f"{folder}: no weights ({WEIGHTS}, {BIN}, or either's .index.json); give a folder that "
            "has them"
        )

    def _read_index(self, index: pathlib.Path, kind: type[SafetensorsFile] | type[BinFile]) -> None:
        try:
            names = dict(json_text.read_object(index)["weight_map"].items())
        except (KeyError, AttributeError):
            raise UserError(f"{index}: no JSON object with a weight_map; fetch it again") from None
        for name, file in names.items():
            if (
                not isinstance(file, str)
                or file in ("", "..")
                or not paths.is_name(file)
                or file != pathlib.PurePath(file).name
            ):
                raise UserError(
                    f"{index}: {name} is in {file!r}, which is no file of this folder; fetch it "
                    "again"
                )
        by_file = collections.defaultdict(set)
        for name, file in names.items():
            if not is_buffer(name):
                by_file[file].add(name)
        for file, expected in sorted(by_file.items()):
            path = self.folder / file
            if not path.exists():
                raise UserError(
                    f"{path}: missing; {index.name} says that it holds {min(expected)}"
                    f"{_more(expected)}; fetch it"
                )
            shard = kind(path)
            if absent := expected - set(shard.shapes):
                raise UserError(
                    f"{path}: no tensor {min(absent)}{_more(absent)}, which {index.name} says it "
                    "holds; fetch both again"
                )
            if extra := set(shard.shapes) - expected:
                raise UserError(
                    f"{path}: tensor {min(extra)}{_more(extra)}, which {index.name} does not know; "
                    "fetch both again"
                )
            self.files |= dict.fromkeys(expected, shard)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Checks names and shapes of the tensors.

        Args:
          expected: shape of each tensor that must be there; no other may be.

        Raises:
          UserError: a tensor is missing, unexpected or of another shape; the message names it.
        """
        for name, shape in expected.items():
            if name not in self.files:
                raise UserError(
                    f"{self.folder}: tensor {name} {list(shape)} is missing; config.json needs it"
                )
            file = self.files[name]
            if file.shapes[name] != shape:
                raise UserError(
                    f"{file.path}: {name} is {list(file.shapes[name])}, config.json says "
                    f"{list(shape)}; fix config.json or fetch the file again"
                )
        if extra := set(self.files) - set(expected):
            raise UserError(
                f"{self.files[min(extra)].path}: tensor {min(extra)}{_more(extra)} has no place in "
                "this architecture; is config.json of another model?"
            )

    @property
    def notes(self) -> list[str]:
        """What is unusual: files that are not read, and tensors of several dtypes."""
        notes = []
        read = {file.path.name for file in self.files.values()}
        weights = {p.name for pattern in ("*.safetensors", "pytorch_model*.bin")
                   for p in self.folder.glob(pattern)}  # fmt: skip
        if unread := sorted(weights - read):
            notes.append(f"{', '.join(unread)}: not read, because {min(read)} has the weights")
        counts = collections.Counter(file.dtypes[name].name for name, file in self.files.items())
        if len(counts) > 1:
            found = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(counts.items()))
            notes.append(f"tensors are of several dtypes: {found}; all are written in one")
        return notes

    @property
    def num_bytes(self) -> int:
        """The size of all tensors on disk."""
        return sum(
            math.prod(file.shapes[name]) * file.dtypes[name].itemsize
            for name, file in self.files.items()
        )

    @property
    def dtype(self) -> np.dtype:
        """The dtype that holds the values of all tensors."""
        dtypes = {file.dtypes[name] for name, file in self.files.items()}
        widest = {d for d in dtypes if d.itemsize == max(each.itemsize for each in dtypes)}
        # float16 and bfloat16 do not hold each other's values.
        return widest.pop() if len(widest) == 1 else DTYPES["F32"]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads rows `start` to `stop` of a tensor, in its own dtype."""
        return self.files[name].read(name, start, stop)


def _more(names: set[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


class TensorsWriter:
    """Writes a folder of safetensors files: creates each at its full size, then fills in rows."""

    def __init__(
        self,
        folder: pathlib.Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: np.dtype,
        shard_bytes: int,
    ):
        """Creates the files.

        Args:
          folder: an existing folder.
          shapes: shape of each tensor by name, in file order.
          dtype: dtype of all tensors.
          shard_bytes: a new file is started if the next tensor would make one larger than this.
        """
        self._dtype, self._shapes = dtype, shapes
        shards: list[dict[str, int]] = [{}]  # tensor -> its offset in the data, in bytes
        size = 0
        for name, shape in shapes.items():
            need = math.prod(shape) * dtype.itemsize
            if shards[-1] and size + need > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = size
            size += need
        count = len(shards)
        stem = pathlib.PurePath(WEIGHTS).stem
        self._place: dict[str, tuple[pathlib.Path, int]] = {}
        for i, shard in enumerate(shards):
            file = WEIGHTS if count == 1 else f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
            start = self._lay_out(folder / file, shard)
            self._place |= {name: (folder / file, start + at) for name, at in shard.items()}
        if count > 1:
            index = {
                "metadata": {"total_size": self.num_bytes},
                "weight_map": {name: path.name for name, (path, _) in self._place.items()},
            }
            text = json.dumps(index, indent=2) + "\n"
            (folder / f"{WEIGHTS}.index.json").write_text(text, encoding="utf-8")

    @property
    def num_bytes(self) -> int:
        """The size of all tensors."""
        return sum(math.prod(shape) for shape in self._shapes.values()) * self._dtype.itemsize

    def _lay_out(self, path: pathlib.Path, shard: Mapping[str, int]) -> int:
        """Creates a file and writes its header; returns the offset of its data in bytes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
        end = 0
        for name, start in shard.items():
            shape = self._shapes[name]
            end = start + math.prod(shape) * self._dtype.itemsize
            code = _CODES[self._dtype]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data is aligned
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        return 8 + len(text)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor, in the files' dtype, from row `start` on."""
        path, begin = self._place[name]
        row_bytes = math.prod(self._shapes[name][1:]) * self._dtype.itemsize
        data = np.ascontiguousarray(rows)
        with open(path, "r+b", buffering=0) as file:
            file.seek(begin + start * row_bytes)
            view = data.reshape(-1).view(np.uint8).data
            while view:
                view = view[file.write(view) :]

    def sync(self) -> None:
        """Waits until all bytes are on the disk."""
        for path in {path for path, _ in self._place.values()}:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
