"""Directories whose experts are floats of 4 bits in blocks of 32 with a power of two each, as GPT-OSS's.

Format: OCP Microscaling Formats 1.0 (Rouhani et al. 2023). What two tensors hold, `*_blocks` [experts, rows,
blocks, 16] and `*_scales` [experts, rows, blocks], becomes one of the type that GGUF files call MXFP4.
"""

from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import numpy.typing as npt

from pagellm.engine.checkpoints.base import Tensor, to_float32
from pagellm.engine.checkpoints.quantized.modules import Modules, misshapen
from pagellm.engine.checkpoints.quantized.section import Section
from pagellm.engine.errors import CheckpointError, named

_BLOCK, _BYTES = 32, 16


@dataclass(frozen=True)
class Mxfp4Tensor(Tensor):
    """A tensor whose last dimension is in blocks; file, offset and bytes are those of the levels."""

    scales: Tensor = field(repr=False, compare=False)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """As `Tensor.rows`."""
        raw = self.quantized_rows(start, stop)
        return to_float32(raw.reshape(-1), self.dtype).reshape(stop - start, *self.shape[1:])

    def quantized_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """As `Tensor.quantized_rows`: in GGUF's order, the scale and then bytes of inputs 16 apart.

        In the file a byte has two inputs that follow each other.
        """
        self._check_rows(start, stop)
        blocks = prod(self.shape[1:]) // _BLOCK
        count = (stop - start) * blocks
        levels = self.file.read(self.offset + start * blocks * _BYTES, count * _BYTES).reshape(-1, _BYTES)
        scales = self.scales.file.read(self.scales.offset + start * blocks, count).reshape(-1, 1)
        inputs = np.stack([levels & 15, levels >> 4], axis=-1).reshape(-1, _BLOCK)
        bytes = inputs[:, :_BYTES] | (inputs[:, _BYTES:] << np.uint8(4))
        return np.concatenate([scales, bytes], axis=1).reshape(stop - start, blocks, 1 + _BYTES)

    def part(self, shape: tuple[int, ...], index: int = 0) -> Tensor:
        """As `Tensor.part`."""
        num_levels = prod(shape) // _BLOCK
        return replace(
            self,
            shape=shape,
            offset=self.offset + index * num_levels * _BYTES,
            num_bytes=num_levels * (1 + _BYTES),
            scales=replace(self.scales, offset=self.scales.offset + index * num_levels),
        )


def read_mxfp4(section: Section, modules: Modules) -> str:
    """Joins the tensors of all experts of a layer; what the method is called in reports."""
    section.names("modules_to_not_convert")
    section.refuse_others(frozenset({"quant_method", "modules_to_not_convert", "dequantize"}))
    tensors = modules.tensors
    names = [name for name in tensors if name.endswith("_blocks")]
    if not names:
        raise CheckpointError(f"{section.path}: {section.prefix}quant_method: found 'mxfp4', expected blocks")
    for name in names:
        whole = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), tensors.pop(f"{whole}_scales", None)
        if scales is None:
            raise CheckpointError(f"{modules.directory}: tensor {named(f'{whole}_scales')} is missing")
        for tensor in (blocks, scales):
            if tensor.dtype != "U8":
                raise CheckpointError(
                    f"{tensor.file.path}: tensor {named(tensor.name)} has type {tensor.dtype}, expected U8"
                )
        if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES or whole in tensors:
            raise misshapen(blocks, (0, 0, 0, _BYTES))
        if scales.shape != blocks.shape[:-1]:
            raise misshapen(scales, blocks.shape[:-1])
        shape = (*blocks.shape[:2], blocks.shape[2] * _BLOCK)
        tensors[whole] = Mxfp4Tensor(
            whole, shape, "MXFP4", blocks.file, blocks.offset, blocks.num_bytes + scales.num_bytes, scales
        )
    return "MXFP4, experts alone"
