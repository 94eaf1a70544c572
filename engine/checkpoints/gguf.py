"""GGUF files: a strict reader of the header, metadata and tensor table.

The gguf library's own reader builds an object for every element of every array, seconds for a vocabulary,
and trusts the lengths that it reads. This one checks each count and length against the bytes that are left
before it allocates or loops, and takes the numbers of the tensor types from the library.
Knows the container; does not know what any key means, but for alignment.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from pagellm.engine.checkpoints.base import Checkpoint, Tensor, WeightFile
from pagellm.engine.errors import CheckpointError, found

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

# The smallest metadata entry is a key length, a type and one byte; the smallest tensor entry a name length,
# a dimension count, one dimension, a type and an offset.
MIN_METADATA_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

# More than any published file has, and few enough to be read in a second or two: the bytes of the metadata
# and of the table of tensors together, and their entries.
MAX_HEADER_BYTES = 64 << 20
MAX_METADATA = 1 << 16
MAX_TENSORS = 1 << 16

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64 = 4, 5, 6, 7, 8, 9, 10, 11
NUMBER_TYPES = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    UINT32: "<u4",
    INT32: "<i4",
    FLOAT32: "<f4",
    BOOL: "<u1",
    UINT64: "<u8",
    INT64: "<i8",
    12: "<f8",
}

_unpack_u64 = struct.Struct("<Q").unpack_from


def read_gguf(path: Path) -> Checkpoint:
    """Opens one GGUF file, whole or a part of a model: its metadata and its table of tensors, checked."""
    file = WeightFile(path)
    try:
        if file.num_bytes < len(MAGIC) + 4 + 8 + 8:
            raise CheckpointError(f"{path}: {file.num_bytes} bytes, too short for a GGUF file")
        with file.map() as data:
            metadata, tensors = _Header(file, data).read()
    except BaseException:
        file.close()
        raise
    return Checkpoint(path, "gguf", metadata, tensors, (file,))


def read_metadata_bytes(path: Path) -> dict[str, bytes]:
    """The metadata of a GGUF file, each value with its type as the file has it, to be copied."""
    file = WeightFile(path)
    try:
        with file.map() as data:
            header = _Header(file, data)
            header.read()
            return {key: data[start:end] for key, (start, end) in header.places.items()}
    finally:
        file.close()


class _Header:
    """A cursor over the header that never moves past the end of the file."""

    def __init__(self, file: WeightFile, data: mmap.mmap) -> None:
        self.file = file
        self.data = data
        self.pos = 0
        self.places: dict[str, tuple[int, int]] = {}  # of the metadata's values, from their types on
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.ends = "the file ends" if self.end == len(data) else "the longest header that is read ends"

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {message}")

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        magic = self.take(4, "the magic number")
        if magic != MAGIC:
            raise self.error(
                f"begins with {magic!r}, expected {MAGIC!r}; only safetensors and GGUF are supported"
            )
        version = self.number("<u4", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = f"big-endian GGUF version {swapped}" if swapped in VERSIONS else f"GGUF version {version}"
            raise self.error(f"{kind}, expected little-endian version 2 or 3")
        num_tensors = self.count(MIN_TENSOR_BYTES, "tensors", MAX_TENSORS)
        num_entries = self.count(MIN_METADATA_BYTES, "metadata entries", MAX_METADATA)
        metadata: dict[str, Any] = {}
        for index in range(num_entries):
            key = self.string(f"the key of metadata entry {index}")
            if key in metadata:
                raise self.error(f"metadata key {found(key)} is there twice")
            start = self.pos
            value_type = self.number("<u4", f"the type of {found(key)}")
            metadata[key] = self.value(value_type, key)
            self.places[key] = start, self.pos
            if key == "general.alignment" and value_type != UINT32:
                raise self.error(f"general.alignment has value type {value_type}, expected {UINT32} (uint32)")
        return metadata, self.tensors(num_tensors, metadata.get("general.alignment", DEFAULT_ALIGNMENT))

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.end - self.pos:
            raise self.error(
                f"{what} needs {num_bytes} bytes at byte {self.pos}, but {self.ends} at {self.end}"
            )
        taken = self.data[self.pos : self.pos + num_bytes]
        self.pos += num_bytes
        return taken

    def number(self, dtype: str, what: str) -> Any:
        return np.frombuffer(self.take(int(dtype[2]), what), dtype=dtype)[0].item()

    def count(self, min_bytes: int, what: str, maximum: int | None = None) -> int:
        """A number of things that follow, each of at least `min_bytes`."""
        count: int = self.number("<u8", f"the number of {what}")
        left = self.end - self.pos
        if count * min_bytes > left:
            raise self.error(f"{count} {what} cannot fit in the {left} bytes left before {self.ends}")
        if maximum is not None and count > maximum:
            raise self.error(f"{count} {what}, expected at most {maximum}")
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.count(1, f"bytes of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is {raw[:40]!r}, expected UTF-8") from error

    def value(self, value_type: int, key: str) -> Any:
        if value_type == STRING:
            return self.string(f"metadata {found(key)}")
        if value_type == ARRAY:
            element_type = self.number("<u4", f"the element type of {found(key)}")
            if element_type == STRING:
                return self.strings(key)
            return self.numbers(element_type, key)
        if value_type not in NUMBER_TYPES:
            raise self.error(f"metadata {found(key)} has value type {value_type}, expected 0 to 12")
        value = self.number(NUMBER_TYPES[value_type], f"metadata {found(key)}")
        return self.boolean(value, key) if value_type == BOOL else value

    def boolean(self, value: int, key: str) -> bool:
        if value > 1:
            raise self.error(f"metadata {found(key)} is the boolean {value}, expected 0 or 1")
        return bool(value)

    def numbers(self, element_type: int, key: str) -> "np.ndarray[Any, Any]":
        if element_type == ARRAY:
            raise self.error(f"metadata {found(key)} is an array of arrays, expected numbers or strings")
        if element_type not in NUMBER_TYPES:
            raise self.error(f"metadata {found(key)} has element type {element_type}, expected 0 to 12")
        dtype = np.dtype(NUMBER_TYPES[element_type])
        count = self.count(dtype.itemsize, f"elements of {found(key)}")
        values = np.frombuffer(self.take(count * dtype.itemsize, f"metadata {found(key)}"), dtype=dtype)
        if element_type != BOOL:
            return values
        self.boolean(int(values.max(initial=0)), key)
        return values.astype(bool)

    def strings(self, key: str) -> list[str]:
        """An array of strings; the one loop here that runs a hundred thousand times."""
        count = self.count(8, f"strings of {found(key)}")
        data, pos, end = self.data, self.pos, self.end
        values = []
        for index in range(count):
            start = pos + 8
            pos = start + _unpack_u64(data, pos)[0] if start <= end else start
            if pos > end:
                raise self.error(
                    f"string {index} of {found(key)} runs to byte {pos}, but {self.ends} at {end}"
                )
            raw = data[start:pos]
            try:
                values.append(raw.decode())
            except UnicodeDecodeError as error:
                raise self.error(f"string {index} of {found(key)} is {raw[:40]!r}, expected UTF-8") from error
        self.pos = pos
        return values

    def tensors(self, num_tensors: int, alignment: int) -> dict[str, Tensor]:
        if alignment <= 0 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment}, expected a power of two")
        table: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
        ranges: list[tuple[int, int, str]] = []
        for index in range(num_tensors):
            name = self.string(f"the name of tensor {index}")
            if name in table:
                raise self.error(f"tensor {found(name)} is there twice")
            label = f"tensor {found(name)}"
            shape = self.shape(label)
            dtype, num_bytes = self.storage(label, shape)
            offset: int = self.number("<u8", f"the offset of {label}")
            if offset % alignment:
                raise self.error(f"{label} is at offset {offset}, expected a multiple of {alignment}")
            table[name] = shape, dtype, offset, num_bytes
            ranges.append((offset, offset + num_bytes, name))
        data_start = -(-self.pos // alignment) * alignment
        self.check_ranges(ranges, len(self.data) - data_start)
        return {
            name: Tensor(name, shape, dtype, self.file, data_start + offset, num_bytes)
            for name, (shape, dtype, offset, num_bytes) in table.items()
        }

    def shape(self, label: str) -> tuple[int, ...]:
        num_dims = self.number("<u4", f"the dimensions of {label}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.error(f"{label} has {num_dims} dimensions, expected 1 to {MAX_DIMS}")
        dims = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims, f"the shape of {label}"))
        # The file lists the innermost dimension first.
        shape: tuple[int, ...] = dims[::-1]
        if 0 in shape:
            raise self.error(f"{label} has shape {list(shape)}, expected positive dimensions")
        return shape

    def storage(self, label: str, shape: tuple[int, ...]) -> tuple[str, int]:
        """A tensor's element type and its size in bytes; whether the type is supported is not asked here.

        A type that the library does not know has its number for a name, and no size.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        number = self.number("<u4", f"the type of {label}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            return str(number), 0
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self.error(
                f"{label} is {kind.name} with rows of {shape[-1]}, expected a multiple of {block}"
            )
        return kind.name, math.prod(shape) // block * block_bytes

    def check_ranges(self, ranges: list[tuple[int, int, str]], data_bytes: int) -> None:
        previous_end, previous_name = 0, ""
        for begin, end, name in sorted(ranges):
            if end > data_bytes:
                raise self.error(
                    f"tensor {found(name)} ends at byte {end} of the data,"
                    f" expected at most {max(data_bytes, 0)}; the file may be cut short"
                )
            if begin < previous_end:
                raise self.error(
                    f"tensor {found(name)} begins at byte {begin} of the data,"
                    f" inside tensor {found(previous_name)} that ends at byte {previous_end}"
                )
            previous_end, previous_name = end, name
