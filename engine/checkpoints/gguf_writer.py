"""Writes a GGUF file tensor by tensor: the header first, then rows of tensors in any order.

Nothing of the weights is held.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""

import io
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType

from pagellm.engine.checkpoints.base import BLOCK_SIZES
from pagellm.engine.checkpoints.gguf import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    FLOAT32,
    INT32,
    INT64,
    MAGIC,
    STRING,
    UINT32,
    UINT64,
    VERSIONS,
)
from pagellm.engine.checkpoints.placed_file import PlacedFile

_ALIGNMENT_KEY = "general.alignment"


class TensorInfo(NamedTuple):
    """A tensor of a file to write: shape as [rows, ..., columns]; dtype: a type of `BLOCK_SIZES`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """What it takes in the file."""
        block, block_bytes = BLOCK_SIZES[self.dtype]
        return prod(self.shape) // block * block_bytes


class GgufWriter:
    """A file under way. metadata: keys to values as `encode_value` gives them, without the alignment.

    Raises `OSError` if the file cannot be written.
    """

    def __init__(self, file: io.FileIO, metadata: Mapping[str, bytes], tensors: Sequence[TensorInfo]) -> None:
        entries = {key: value for key, value in metadata.items() if key != _ALIGNMENT_KEY}
        header = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(entries))]
        header += [part for key, value in entries.items() for part in (_text(key), value)]
        self._places: dict[str, int] = {}
        offset = 0
        for tensor in tensors:
            dims = tensor.shape[::-1]  # the innermost first
            kind = int(GGMLQuantizationType[tensor.dtype])
            header += [_text(tensor.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)]
            self._places[tensor.name] = offset
            offset += _aligned(tensor.num_bytes)
        start = _aligned(sum(map(len, header)))
        self._places = {name: start + place for name, place in self._places.items()}
        self.num_bytes = start + offset
        self._file = PlacedFile(file, self.num_bytes)
        self._file.write(0, b"".join(header))

    def reserve(self) -> None:
        """Asks for the room of the whole file. Raises `OSError` if there is less."""
        self._file.reserve()

    def write(self, name: str, offset: int, data: Any) -> None:
        """Puts bytes into a tensor, `offset` bytes behind its first; any thread may."""
        self._file.write(self._places[name] + offset, data)


def encode_value(value: Any) -> bytes:
    """A value of metadata with its type: a text, a number, a boolean, or a list of one of these."""
    if isinstance(value, list):
        kinds = {_type_of(one) for one in value}
        if kinds == {INT32, FLOAT32}:
            kinds = {FLOAT32}
        [kind] = kinds
        if kind == STRING:
            return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(map(_text, value))
        return struct.pack(f"<IIQ{len(value)}{_CODES[kind]}", ARRAY, kind, len(value), *value)
    kind = _type_of(value)
    if kind == STRING:
        return struct.pack("<I", kind) + _text(value)
    if kind == INT32 and value >= 0:
        kind = UINT32  # as llama.cpp's converter writes sizes and ids
    return struct.pack(f"<I{_CODES[kind]}", kind, value)


_CODES = {BOOL: "?", UINT32: "I", INT32: "i", UINT64: "Q", INT64: "q", FLOAT32: "f"}


def _type_of(value: object) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return INT32 if -(1 << 31) <= value < 1 << 31 else UINT64 if value > 0 else INT64
    return STRING if isinstance(value, str) else FLOAT32


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
