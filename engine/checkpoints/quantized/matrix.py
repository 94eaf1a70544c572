"""Matrices that a quantizer wrote as several tensors, which are read as one: levels, scales and zero points.

Knows what the levels of each kind stand for; does not know where a method keeps them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints.base import Tensor
from pagellm.engine.errors import CheckpointError, named

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# bitsandbytes' tables of levels (Dettmers et al. 2023, appendix E; its own 4-bit float), as float32.
NF4: Floats = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_FP4_TWELFTHS: Floats = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32)  # of a value
FP4: Floats = (np.concatenate([_FP4_TWELFTHS, 0 - _FP4_TWELFTHS]) / 12).astype(np.float32)
# A level of `LLM.int8()` is one of 127 steps; bitsandbytes multiplies by this.
INT8_STEP = np.float32(7.874015718698502e-3)


def _e4m3_values() -> Floats:
    """The values of all bytes (Micikevicius et al. 2022): no infinities, and one NaN of each sign."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    magnitude[(byte & 127) == 127] = np.nan
    return np.where(byte >= 128, -magnitude, magnitude).astype(np.float32)


TABLES: dict[str, Floats] = {"E4M3": _e4m3_values(), "NF4": NF4, "FP4": FP4}


class Pieces(NamedTuple):
    """Rows of a matrix as they are kept."""

    levels: Bytes  # [rows, inputs]
    scales: Floats  # [rows, groups]
    zeros: Bytes | None = None  # [rows, groups], the level of a weight of zero


@dataclass(frozen=True)
class QuantizedTensor(Tensor):
    """A matrix [outputs, inputs] of levels with scales; `dtype` says what the levels stand for.

    The types: INT4 (the level less 8, times a float16), INT4_ZERO (the level less a zero point, times a
    float32), INT8 (signed, beside activations that are quantized, too), INT8_127 (signed, in 127ths), E4M3,
    NF4, FP4. group_size: how many inputs share a scale. read: the rows from one to another. groups: the group
    of each input, if they are not one after the other. is_kept: whether the groups are such that a format can
    hold them. by_columns: whether the file has outputs as columns, of which a few cannot be read without all.
    """

    group_size: int
    read: Callable[[int, int], Pieces] = field(repr=False, compare=False)
    groups: NDArray[np.int32] | None = field(repr=False, compare=False, default=None)
    is_kept: bool = True
    by_columns: bool = False

    def rows(self, start: int, stop: int) -> Floats:
        """As `Tensor.rows`: each value rounded once, from the float32 that the method's own library has."""
        self.check_range(start, stop)
        levels, scales, zeros = self.pieces(start, stop)
        groups: NDArray[Any] = np.arange(self.shape[1]) // self.group_size
        if self.groups is not None:
            groups = self.groups
        each = scales[:, groups]
        with np.errstate(over="ignore", invalid="ignore"):
            if zeros is not None:
                return (levels.astype(np.float32) - zeros[:, groups].astype(np.float32)) * each
            if self.dtype == "INT4":
                return (levels.astype(np.float32) - np.float32(8)) * each
            if self.dtype == "INT8":
                return levels.view(np.int8).astype(np.float32) * each
            if self.dtype == "INT8_127":
                return levels.view(np.int8).astype(np.float32) * each * INT8_STEP
            return TABLES[self.dtype][levels] * each

    def quantized_rows(self, start: int, stop: int) -> Bytes:
        """Levels alone, which two matrices are compared by: not what makes them equal."""
        raise TypeError(f"{self.name}: quantized rows are pieces")

    def pieces(self, start: int, stop: int) -> Pieces:
        """Rows `[start, stop)`, read from disk now; raises `CheckpointError` if a value is no number."""
        pieces = self.read(start, stop)
        where = f"{self.file.path}: {named(self.name)}: rows {start} to {stop - 1}"
        if not np.isfinite(pieces.scales).all():
            raise CheckpointError(f"{where}: found a scale that is no finite number, expected none")
        if self.dtype == "E4M3" and ((pieces.levels & 127) == 127).any():
            raise CheckpointError(f"{where}: found a weight that is not a number, expected none")
        return pieces

    def order(self) -> NDArray[np.int32] | None:
        """The inputs sorted by their groups; None where they are."""
        if self.groups is None:
            return None
        return np.argsort(self.groups, kind="stable").astype(np.int32)

    def check_range(self, start: int, stop: int) -> None:
        """Raises `IndexError` if the rows are not all inside."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows [{start}, {stop}) of {named(self.name)}, which has {self.shape[0]}")


@dataclass(frozen=True)
class StackedTensor(Tensor):
    """Matrices of one kind, one behind the other: [matrices, outputs, inputs], as experts are."""

    matrices: Sequence[QuantizedTensor] = field(repr=False, compare=False)

    def rows(self, start: int, stop: int) -> Floats:
        """As `Tensor.rows`: whole matrices."""
        return np.stack([one.rows(0, one.shape[0]) for one in self.matrices[start:stop]])

    def quantized_rows(self, start: int, stop: int) -> Bytes:
        """As `QuantizedTensor.quantized_rows`."""
        raise TypeError(f"{self.name}: quantized rows are pieces")

    def part(self, shape: tuple[int, ...], index: int = 0) -> Tensor:
        """As `Tensor.part`."""
        if shape != self.matrices[index].shape:
            return super().part(shape, index)  # which refuses it
        return self.matrices[index]
