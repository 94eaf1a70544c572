"""What every checkpoint format gives: a configuration and named tensors whose rows are read on demand.

A tensor is one contiguous range of a file. Rows are read with plain file reads and not through a memory
map, because mapped pages count as the process's memory until the whole map is closed, and loading must not
hold a second copy of the weights. Knows the element types; does not know how a format finds its tensors.
"""

import math
import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.files import open_plain

# (elements, bytes) of the smallest piece that can be read alone: numbers, and the blocks of GGUF files whose
# values the gguf library knows.
BLOCK_SIZES = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F64": (1, 8),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}
SUPPORTED_DTYPES = ", ".join(BLOCK_SIZES)

# Pieces of 512 KiB in float32 keep the library's temporary arrays in cache and out of the peak memory.
DEQUANTIZE_ELEMENTS = 1 << 17


class WeightFile:
    """An open file that any thread may read ranges of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = open_plain(path)
            self.num_bytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error

    def read(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The bytes `[offset, offset + num_bytes)` as a fresh uint8 array."""
        data = np.empty(num_bytes, dtype=np.uint8)
        view = data.data
        done = 0
        with self._lock:
            try:
                self._file.seek(offset)
                while done < num_bytes:
                    count = self._file.readinto(view[done:])
                    if not count:
                        break
                    done += count
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        if done < num_bytes:
            raise CheckpointError(
                f"{self.path}: ended at byte {offset + done}, expected at least {offset + num_bytes};"
                " the file was cut while it was open"
            )
        return data

    def map(self) -> mmap.mmap:
        """A read-only map of the whole file, to parse a header of unknown length and then close."""
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        """Closes the file; nothing can be read afterwards."""
        self._file.close()


@dataclass(frozen=True)
class Tensor:
    """One named tensor of a checkpoint, row-major: `[out, in]` for a linear layer's weight.

    dtype: the name of its element type, supported or not. num_bytes: in the file; 0 for a type of GGUF whose
    size nobody here knows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: WeightFile = field(repr=False, compare=False)
    offset: int = field(repr=False, compare=False)
    num_bytes: int = field(repr=False, compare=False)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows `[start, stop)` as a fresh float32 array `[stop - start, *shape[1:]]`, read from disk now.

        The rows of a 1-D tensor are its elements. Raises `CheckpointError` if the element type is not
        supported, and `IndexError` if the rows are not all inside the tensor.
        """
        self._check_rows(start, stop)
        row_size = math.prod(self.shape[1:])
        block, block_bytes = BLOCK_SIZES[self.dtype]
        first = start * row_size // block
        last = -(-stop * row_size // block)
        raw = self.file.read(self.offset + first * block_bytes, (last - first) * block_bytes)
        values = to_float32(raw, self.dtype)
        # Only a quantized 1-D tensor can begin or end inside a block.
        skipped = start * row_size - first * block
        values = values[skipped : skipped + (stop - start) * row_size]
        return values.reshape(stop - start, *self.shape[1:])

    def quantized_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows `[start, stop)` of a matrix in quantized blocks as they are: [rows, blocks, bytes of a block].

        Raises as `rows` does.
        """
        self._check_rows(start, stop)
        block, block_bytes = BLOCK_SIZES[self.dtype]
        blocks = self.shape[1] // block
        raw = self.file.read(
            self.offset + start * blocks * block_bytes, (stop - start) * blocks * block_bytes
        )
        return raw.reshape(stop - start, blocks, block_bytes)

    def part(self, shape: tuple[int, ...], index: int = 0) -> "Tensor":
        """One of the tensors of a shape that this one is made of, one after the other.

        Raises `CheckpointError` for one that a quantizer wrote, which is not one range of the file.
        """
        if type(self) is not Tensor:
            raise CheckpointError(
                f"{self.file.path}: tensor {found(self.name)} is {self.dtype} of shape {list(self.shape)}, "
                f"expected {list(shape)}"
            )
        num_bytes = self.num_bytes * math.prod(shape) // math.prod(self.shape)
        return replace(self, shape=shape, offset=self.offset + index * num_bytes, num_bytes=num_bytes)

    def _check_rows(self, start: int, stop: int) -> None:
        if self.dtype not in BLOCK_SIZES:
            raise CheckpointError(
                f"{self.file.path}: tensor {found(self.name)} has type {self.dtype},"
                f" expected one of {SUPPORTED_DTYPES}"
            )
        if not self.shape or 0 in self.shape:
            raise CheckpointError(
                f"{self.file.path}: tensor {found(self.name)} has shape {list(self.shape)}, expected rows"
            )
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows [{start}, {stop}) of {found(self.name)}, which has {self.shape[0]}")


def bits_per_weight(tensor: Tensor) -> float:
    """What a number of a tensor takes in its file, scales included."""
    return 8 * tensor.num_bytes / max(1, math.prod(tensor.shape))


@dataclass(frozen=True)
class Checkpoint:
    """An open model: its configuration and its tensors by name.

    `config` is the parsed config.json of a Hugging Face directory, or the metadata of a GGUF file, where
    arrays of strings are lists and arrays of numbers are NumPy arrays. `headers_only`: no weights are to be
    read, and what only their values could tell is taken for granted. `config_only`: there are no tensors
    either, and those that the configuration asks for are taken for granted. `quantization`: what method the
    matrices among the tensors were quantized by; empty where none was.
    """

    path: Path
    format: Literal["safetensors", "gguf"]
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[WeightFile, ...] = field(repr=False, default=())
    headers_only: bool = False
    config_only: bool = False
    quantization: str = ""

    def close(self) -> None:
        """Closes the files; no tensor can be read afterwards."""
        for file in self.files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def to_float32(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Whole blocks of a supported type as flat float32 values, exactly or as the format defines them."""
    if dtype == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    if dtype == "F64":
        with np.errstate(over="ignore"):
            return raw.view("<f8").astype(np.float32)
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        bits = raw.view("<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return _dequantize(raw, dtype)


def _dequantize(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    block, block_bytes = BLOCK_SIZES[dtype]
    num_blocks = len(raw) // block_bytes
    values = np.empty(num_blocks * block, dtype=np.float32)
    step = DEQUANTIZE_ELEMENTS // block
    for begin in range(0, num_blocks, step):
        end = min(begin + step, num_blocks)
        piece = raw[begin * block_bytes : end * block_bytes].reshape(1, -1)
        with np.errstate(all="ignore"):  # a scale may be infinite or NaN, in files of random bytes
            values[begin * block : end * block] = dequantize(piece, GGMLQuantizationType[dtype])[0]
    return values
