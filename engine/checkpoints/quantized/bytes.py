"""Matrices of a byte a weight, FP8 or int8: [outputs, inputs] as they are, and a scale for each block."""

from dataclasses import dataclass

import numpy as np

from pagellm.engine.checkpoints.base import Tensor, to_float32
from pagellm.engine.checkpoints.quantized.matrix import Floats, Pieces, QuantizedTensor
from pagellm.engine.checkpoints.quantized.modules import misshapen

SCALES = ("F32", "BF16", "F16", "F8_E8M0")
# Inputs of a block whose scale a format keeps.
_KEPT_INPUTS = 128


@dataclass
class ByteMatrix:
    """A matrix with a scale for all of it, for each output, or for blocks of [outputs, inputs]."""

    weight: Tensor
    scales: Tensor
    dtype: str
    block: tuple[int, int] | None = None

    def tensor(self) -> QuantizedTensor:
        """The matrix; raises `CheckpointError` if its tensors do not fit each other."""
        if len(self.weight.shape) != 2:
            raise misshapen(self.weight, (1, 1))
        outputs, inputs = self.weight.shape
        shape, of_blocks = self.scales.shape, None
        if self.block is not None:
            of_blocks = (-(-outputs // self.block[0]), -(-inputs // self.block[1]))
        if shape == of_blocks:
            rows, columns = self.block or (1, 1)
        elif self.block is None and shape in ((), (1,), (1, 1)):
            rows, columns = outputs, inputs
        elif self.block is None and shape in ((outputs,), (outputs, 1)):
            rows, columns = 1, inputs
        else:
            raise misshapen(self.scales, *([of_blocks] if of_blocks else [(1,), (outputs, 1)]))
        self._size = (rows, -(-inputs // columns))
        return QuantizedTensor(
            self.weight.name,
            self.weight.shape,
            self.dtype,
            self.weight.file,
            self.weight.offset,
            self.weight.num_bytes + self.scales.num_bytes,
            columns,
            self.read,
            None,
            columns == inputs or columns % _KEPT_INPUTS == 0,
        )

    def read(self, start: int, stop: int) -> Pieces:
        """The rows as `QuantizedTensor.read` gives them."""
        inputs, (rows, groups) = self.weight.shape[1], self._size
        raw = self.weight.file.read(self.weight.offset + start * inputs, (stop - start) * inputs)
        scales = floats(self.scales).reshape(-1, groups)
        return Pieces(raw.reshape(stop - start, inputs), scales[np.arange(start, stop) // rows])


def floats(tensor: Tensor) -> Floats:
    """All of a small tensor, flat; bytes that are exponents become powers of two."""
    raw = tensor.file.read(tensor.offset, tensor.num_bytes)
    if tensor.dtype == "F8_E8M0":
        return np.ldexp(np.float32(1), raw.astype(np.int32) - 127)
    return to_float32(raw, tensor.dtype)
