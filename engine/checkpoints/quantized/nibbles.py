"""GPTQ, AWQ and compressed-tensors' packed weights: four bits a level, eight levels to a word.

What the methods have in common is a matrix of words, a scale and perhaps a zero point for each group of
inputs, and perhaps the group of each input. AutoGPTQ: words [inputs / 8, outputs], the first level lowest;
zero points [groups, outputs / 8], one too small in its first version. AutoAWQ: words [inputs, outputs / 8],
in which level i stands at place 0, 4, 1, 5, 2, 6, 3, 7; zero points alike. compressed-tensors: words
[outputs, inputs / 8]; zero points [outputs / 8, groups].
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints.base import Tensor
from pagellm.engine.checkpoints.quantized.matrix import Bytes, Floats, Pieces, QuantizedTensor
from pagellm.engine.errors import CheckpointError, named

# Where AutoAWQ's kernels want the level of each of eight neighbours.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_LEVELS = 8  # in a word


@dataclass
class Words:
    """The tensors of one matrix [outputs, inputs], and how its words are laid out.

    zeros: None where all zero points are 8. zero_offset: what a stored zero point lacks. groups: the group of
    each input. symmetric: zero points that are there must be 8, and are not kept.
    """

    name: str
    shape: tuple[int, int]
    layout: Literal["gptq", "awq", "rows"]
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    zero_offset: int = 0
    groups: NDArray[np.int64] | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        self._held: tuple[NDArray[np.uint32], Floats, Bytes | None] | None = None

    def tensor(self) -> QuantizedTensor:
        """The matrix; raises `CheckpointError` if its tensors do not fit each other."""
        outputs, inputs = self.shape
        groups = 1 if self.group_size == -1 else -(-inputs // self.group_size)
        size = inputs if self.group_size == -1 else self.group_size
        packed = -(-outputs // _LEVELS)
        expected = {
            "gptq": ((inputs // _LEVELS, outputs), (groups, outputs), (groups, packed)),
            "awq": ((inputs, packed), (groups, outputs), (groups, packed)),
            "rows": ((outputs, -(-inputs // _LEVELS)), (outputs, groups), (packed, groups)),
        }[self.layout]
        for tensor, shape in zip((self.words, self.scales, self.zeros), expected, strict=True):
            if tensor is not None and tensor.shape != shape:
                raise CheckpointError(
                    f"{tensor.file.path}: tensor {named(tensor.name)} has shape {tensor.shape}, expected "
                    f"{shape} for a matrix of {outputs} outputs and {inputs} inputs in groups of {size}"
                )
        return QuantizedTensor(
            self.name,
            self.shape,
            self._dtype,
            self.words.file,
            self.words.offset,
            sum(tensor.num_bytes for tensor in (self.words, self.scales, self.zeros) if tensor is not None),
            size,
            self.read,
            self._checked_groups(groups, size),
            self._is_kept(size),
            self.layout != "rows",
        )

    def _checked_groups(self, groups: int, size: int) -> NDArray[np.int32] | None:
        """The group of each input; None where they follow each other."""
        if self.groups is None or (self.groups == np.arange(self.shape[1]) // size).all():
            return None
        wrong = self.groups[(self.groups < 0) | (self.groups >= groups)]
        if len(wrong):
            raise CheckpointError(
                f"{self.words.file.path}: {named(self.name)}: found group {wrong[0]} of an input, expected "
                f"one from 0 to {groups - 1}"
            )
        return self.groups.astype(np.int32)

    def _is_kept(self, size: int) -> bool:
        """Whether groups are runs of whole blocks once inputs are sorted by group."""
        if self.group_size != -1 and size % 32:
            return False
        if self.groups is None:
            return True
        counts = np.bincount(self.groups, minlength=-(-self.shape[1] // size))
        return bool((counts[:-1] == size).all())

    def read(self, start: int, stop: int) -> Pieces:
        """The rows as `QuantizedTensor.read` gives them."""
        if self.layout == "rows":
            words = _words(self.words, start, stop)
            levels = _fields(words).reshape(stop - start, -1)[:, : self.shape[1]]
            scales = self.scales.rows(start, stop)
            zeros = None
            if self.zeros is not None:
                first, last = start // _LEVELS, -(-stop // _LEVELS)
                packed = _fields(_words(self.zeros, first, last).T)  # [groups, words, 8]
                zeros = packed.reshape(self.zeros.shape[1], -1)
                zeros = zeros[:, start - first * _LEVELS : stop - first * _LEVELS].T
        else:
            levels, scales, zeros = self._columns(start, stop)
        if zeros is not None and self.symmetric:
            if (zeros != 8).any():
                raise CheckpointError(
                    f"{self.words.file.path}: {named(self.name)}: found zero point {zeros[zeros != 8][0]}, "
                    "expected 8 for all, as the configuration says that the weights are symmetric"
                )
            zeros = None
        if zeros is None and self._dtype == "INT4_ZERO":
            zeros = np.full(scales.shape, 8, np.uint8)
        return Pieces(np.ascontiguousarray(levels), scales, zeros)

    @property
    def _dtype(self) -> str:
        """What `QuantizedTensor` calls the levels."""
        own = self.zeros is not None and not self.symmetric
        return "INT4" if self.scales.dtype == "F16" and not own else "INT4_ZERO"

    def _columns(self, start: int, stop: int) -> tuple[Bytes, Floats, Bytes | None]:
        """Outputs that are columns: the whole tensors are read for the first ones and held for the others."""
        held = self._held  # which another thread may let go meanwhile
        if held is None:
            zeros = None
            if self.zeros is not None:
                zeros = self._of_outputs(_fields(_words(self.zeros, 0, self.zeros.shape[0])))
                zeros = (zeros + np.uint8(self.zero_offset)) & np.uint8(15)
            words = _words(self.words, 0, self.words.shape[0])
            held = words, self.scales.rows(0, self.scales.shape[0]), zeros
        words, scales, zeros = held
        if self.layout == "gptq":
            levels = _fields(words[:, start:stop])  # [inputs / 8, outputs, 8]
            levels = levels.transpose(1, 0, 2).reshape(stop - start, -1)
        else:
            first, last = start // _LEVELS, -(-stop // _LEVELS)
            levels = self._of_outputs(_fields(words[:, first:last]))
            levels = levels[:, start - first * _LEVELS : stop - first * _LEVELS].T
        self._held = None if stop == self.shape[0] else held
        return levels, scales[:, start:stop].T, None if zeros is None else zeros[:, start:stop].T

    def _of_outputs(self, fields: Bytes) -> Bytes:
        """Words of outputs [rows, words, 8] in the order of the outputs [rows, outputs]."""
        if self.layout == "awq":
            fields = fields[..., _AWQ_PLACES]
        return fields.reshape(len(fields), -1)[:, : self.shape[0]]


def _words(tensor: Tensor, start: int, stop: int) -> NDArray[np.uint32]:
    """Rows of a tensor of 32-bit integers."""
    width = prod(tensor.shape[1:])
    raw = tensor.file.read(tensor.offset + 4 * start * width, 4 * (stop - start) * width)
    return raw.view("<u4").reshape(stop - start, *tensor.shape[1:])


def _fields(words: NDArray[np.uint32]) -> Bytes:
    """The eight levels of each word, the lowest first, in a new last axis."""
    bytes = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    fields = np.empty((*words.shape, _LEVELS), np.uint8)
    fields[..., ::2], fields[..., 1::2] = bytes & 15, bytes >> 4
    return fields


def described_groups(group_size: int) -> str:
    """How a report says which weights share a scale."""
    return "a scale for each column" if group_size == -1 else f"groups of {group_size}"


def integers(tensor: Tensor) -> NDArray[np.int64]:
    """All of a small tensor of integers."""
    raw = tensor.file.read(tensor.offset, tensor.num_bytes)
    return raw.view({"I32": "<i4", "I64": "<i8"}[tensor.dtype]).astype(np.int64)
