"""Directories of bitsandbytes' weights: 4 bits of a table (NF4, FP4), or the int8 of `LLM.int8()`.

In 4 bits the matrix is one row of levels, the first of two in the upper half of a byte, with a scale for
each block of 64 or so, which may be levels of another table themselves ("double quantization"). `LLM.int8()`
(Dettmers et al. 2022) has a scale for each output and quantizes activations but for outliers; here they all
stay floats, so none needs to be told from the others.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pagellm.engine.checkpoints.base import Tensor
from pagellm.engine.checkpoints.quantized.bytes import ByteMatrix, floats
from pagellm.engine.checkpoints.quantized.matrix import TABLES, Bytes, Floats, Pieces, QuantizedTensor
from pagellm.engine.checkpoints.quantized.modules import Modules, misshapen
from pagellm.engine.checkpoints.quantized.section import Section, by_parts
from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.errors import CheckpointError, found, named

_HARMLESS = frozenset(
    {
        *("quant_method", "bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload"),
    }
)
_STATES = tuple(f"weight.quant_state.bitsandbytes__{name}" for name in ("nf4", "fp4"))
_MAX_STATE_BYTES = 1 << 12
_EXPERT = ".experts."


def read_bitsandbytes(section: Section, modules: Modules) -> str:
    """Joins the tensors of each matrix; what the method is called in reports."""
    in_4_bits = section.only("load_in_4bit", True, False, default=section.get("_load_in_4bit", False))
    in_8_bits = section.only("load_in_8bit", True, False, default=section.get("_load_in_8bit", False))
    if in_4_bits == in_8_bits:
        raise section.error("load_in_4bit", in_4_bits, "one of load_in_4bit and load_in_8bit")
    for name, value in (("_load_in_4bit", in_4_bits), ("_load_in_8bit", in_8_bits)):
        section.only(name, value, default=value)
    section.only("llm_int8_has_fp16_weight", False, default=False)
    section.only("bnb_4bit_quant_storage", "uint8", default="uint8")
    kind = section.only("bnb_4bit_quant_type", "nf4", "fp4", default="fp4")
    double = section.only("bnb_4bit_use_double_quant", True, False, default=False)
    names = section.names("llm_int8_skip_modules")
    excluded = by_parts(names, section, "llm_int8_skip_modules")
    section.refuse_others(_HARMLESS)

    def maybe_excluded(module: str) -> bool:
        """transformers 5 has the experts of a layer in one tensor, and leaves those as they are."""
        if module.endswith(tuple(names)):
            return True
        return _EXPERT in module and not any(_EXPERT in one for one in modules.quantized)

    if in_8_bits:
        for module in modules.with_tensor("SCB"):
            _read_int8(module, modules)
        modules.check(section, "llm_int8_skip_modules", excluded, maybe_excluded)
        return "LLM.int8(), activations stay floats"
    for suffix in _STATES:
        for module in modules.with_tensor(suffix):
            _read_table(module, suffix, kind, modules)
    modules.check(section, "llm_int8_skip_modules", excluded, maybe_excluded)
    return f"bitsandbytes, 4 bits ({kind.upper()}{', double quantization' * double})"


def _read_int8(module: str, modules: Modules) -> None:
    weight, scales = modules.take(module, "weight", ("I8",)), modules.take(module, "SCB", ("F32",))
    layout = modules.take_any(module, ("weight_format",), ("U8",))
    if layout is not None and (layout.num_bytes != 1 or layout.file.read(layout.offset, 1)[0] != 0):
        raise CheckpointError(
            f"{layout.file.path}: tensor {named(layout.name)}: found another layout, expected 0, that of rows"
        )
    modules.put(module, ByteMatrix(weight, scales, "INT8_127").tensor())


def _read_table(module: str, suffix: str, kind: str, modules: Modules) -> None:
    state_tensor = modules.take(module, suffix, ("U8",))
    state = _State.of(state_tensor)
    if state.kind != kind or not suffix.endswith(kind):
        raise CheckpointError(
            f"{state_tensor.file.path}: tensor {named(state_tensor.name)}: found quant_type "
            f"{found(state.kind)}, expected {found(kind)}, as bnb_4bit_quant_type of the configuration says"
        )
    weight = modules.take(module, "weight", ("U8",))
    nested = modules.take_any(module, ("weight.nested_absmax",), ("F32",))
    absmax = modules.take(module, "weight.absmax", ("U8",) if nested else ("F32",))
    table = modules.take(module, "weight.quant_map", ("F32",))
    nested_table = modules.take_any(module, ("weight.nested_quant_map",), ("F32",))
    if not np.array_equal(floats(table), TABLES[kind.upper()]):
        raise CheckpointError(
            f"{table.file.path}: tensor {named(table.name)}: found another table than that of {kind.upper()}"
        )
    matrix = TableMatrix(f"{module}.weight", state, weight, absmax, nested, nested_table)
    modules.put(module, matrix.tensor())


@dataclass(frozen=True)
class _State:
    """What bitsandbytes writes of a matrix as JSON, in a tensor of bytes."""

    shape: tuple[int, int]
    blocksize: int
    kind: str
    nested_blocksize: int
    nested_offset: float

    @classmethod
    def of(cls, tensor: Tensor) -> "_State":
        place = f"{tensor.file.path}: tensor {named(tensor.name)}"
        if tensor.num_bytes > _MAX_STATE_BYTES:
            raise CheckpointError(
                f"{place} has {tensor.num_bytes} bytes, expected at most {_MAX_STATE_BYTES}"
            )
        try:
            values: Any = parse_json(tensor.file.read(tensor.offset, tensor.num_bytes).tobytes())
        except JsonError as error:
            raise CheckpointError(f"{place}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{place}: found {found(values)}, expected an object")
        shape: Any = values.get("shape")
        size: Any = values.get("blocksize")
        nested_size, offset = values.get("nested_blocksize", 1), values.get("nested_offset", 0.0)
        if not isinstance(shape, list) or len(shape) != 2 or not all(_is_count(one) for one in shape):
            raise CheckpointError(f"{place}: shape: found {found(shape)}, expected two positive integers")
        for name, value in (("blocksize", size), ("nested_blocksize", nested_size)):
            if not _is_count(value):
                raise CheckpointError(f"{place}: {name}: found {found(value)}, expected a positive integer")
        if type(offset) not in (int, float) or not abs(offset) < 1e30:
            raise CheckpointError(f"{place}: nested_offset: found {found(offset)}, expected a number")
        kind = str(values.get("quant_type"))
        return cls((shape[0], shape[1]), size, kind, nested_size, float(offset))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 40


@dataclass
class TableMatrix:
    """The tensors of one matrix in 4 bits."""

    name: str
    state: _State
    weight: Tensor
    absmax: Tensor
    nested: Tensor | None
    nested_table: Tensor | None

    def tensor(self) -> QuantizedTensor:
        """The matrix; raises `CheckpointError` if its tensors do not fit each other."""
        (outputs, inputs), size = self.state.shape, self.state.blocksize
        count = outputs * inputs
        if self.weight.shape != (-(-count // 2), 1):
            raise misshapen(self.weight, (-(-count // 2), 1))
        if self.absmax.shape != (-(-count // size),):
            raise misshapen(self.absmax, (-(-count // size),))
        if self.nested is not None:
            expected = (-(-self.absmax.shape[0] // self.state.nested_blocksize),)
            if self.nested.shape != expected:
                raise misshapen(self.nested, expected)
            if self.nested_table is None or self.nested_table.shape != (256,):
                table = self.nested_table
                raise misshapen(table, (256,)) if table else misshapen(self.nested, expected)
        kept = inputs % size == 0 and size % 32 == 0
        return QuantizedTensor(
            self.name,
            self.state.shape,
            self.state.kind.upper(),
            self.weight.file,
            self.weight.offset,
            self.weight.num_bytes + self.absmax.num_bytes,
            size if inputs % size == 0 else 1,
            self.read,
            None,
            kept,
        )

    def read(self, start: int, stop: int) -> Pieces:
        """The rows as `QuantizedTensor.read` gives them; a scale for each weight where blocks cross rows."""
        inputs, size = self.state.shape[1], self.state.blocksize
        first, end = start * inputs, stop * inputs
        raw = self.weight.file.read(self.weight.offset + first // 2, -(-end // 2) - first // 2)
        fields = np.empty(2 * len(raw), np.uint8)
        fields[::2], fields[1::2] = raw >> 4, raw & 15
        levels: Bytes = fields[first % 2 :][: end - first].reshape(stop - start, inputs)
        if inputs % size == 0:
            return Pieces(levels, self._scales(first // size, end // size).reshape(stop - start, -1))
        blocks = self._scales(first // size, -(-end // size))
        each = blocks[np.arange(first, end) // size - first // size]
        return Pieces(levels, each.reshape(stop - start, inputs))

    def _scales(self, first: int, end: int) -> Floats:
        """The scales of some blocks, [end - first]."""
        if self.nested is None or self.nested_table is None:
            return self.absmax.rows(first, end)
        levels = self.absmax.file.read(self.absmax.offset + first, end - first)
        nested = floats(self.nested)[np.arange(first, end) // self.state.nested_blocksize]
        return floats(self.nested_table)[levels] * nested + np.float32(self.state.nested_offset)
