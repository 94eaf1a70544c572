"""What emitting LLVM IR needs: its types, the addresses of elements, reads, writes, the host's features."""

import os
import re
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.errors import TypingError

LANES = 16

F32 = ir.FloatType()
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
BYTE_POINTER = I8.as_pointer()
VECTOR = ir.VectorType(F32, LANES)
INT_VECTOR = ir.VectorType(I32, LANES)
SHORT_VECTOR = ir.VectorType(I16, LANES)
SHORT_PAIRS = ir.VectorType(I16, 2 * LANES)
HALF_VECTOR = ir.VectorType(ir.HalfType(), LANES)


class _BFloat16(ir.types.Type):  # type: ignore[misc]
    """LLVM's `bfloat`, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


BFLOAT_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


def host_has(feature: str) -> bool:
    """Whether the processor that kernels are compiled for has an LLVM target feature such as "avx512f".

    Numba's own override (`NUMBA_CPU_FEATURES`) wins, so a test can compile for a lesser machine.
    """
    config: Any = numba.config
    features = config.CPU_FEATURES
    if features is None:
        features = get_host_cpu_features()  # without what Numba itself does without
    return f"+{feature}" in features.split(",")


# Vector registers, and how many of them hold a vector.
REGISTERS = 32 if host_has("avx512f") or host_has("neon") else 16
REGISTERS_PER_VECTOR = 1 if host_has("avx512f") else 2 if host_has("avx") else 4


# Whether every access is checked against its array's size; a wrong one aborts the process with its numbers.
CHECKED = os.environ.get("PAGELLM_CHECK", "0") not in ("", "0")


def element_pointer(
    context: Any, builder: Any, array_type: Any, array: Any, index: Any, *, count: Any
) -> Any:
    """The address of `array[index]`, its elements counted one after the other.

    count: how many from there on are read or written, a number or a value of the code; 0 if none is.
    """
    array = context.make_array(array_type)(context, builder, array)
    if CHECKED and count != 0:
        end = builder.add(index, I64(count) if isinstance(count, int) else count)
        _abort_if_outside(builder, index, end, array.nitems)
    return builder.gep(array.data, [index])


def _abort_if_outside(builder: Any, start: Any, end: Any, size: Any) -> None:
    """Ends the process with one line on standard error unless `0 <= start` and `end <= size`."""
    outside = builder.or_(builder.icmp_signed("<", start, start.type(0)), builder.icmp_signed(">", end, size))
    with builder.if_then(outside, likely=False):
        message = f"pagellm: elements %lld to %lld of an array of %lld, in {_name_of(builder.function)}\n"
        text = builder.bitcast(
            cgutils.global_constant(builder, "outside", cgutils.make_bytearray(message.encode() + b"\0")),
            BYTE_POINTER,
        )
        kind = ir.FunctionType(I32, [I32, BYTE_POINTER], var_arg=True)
        dprintf = cgutils.get_or_insert_function(builder.module, kind, "dprintf")
        builder.call(dprintf, [I32(2), text, start, builder.sub(end, end.type(1)), size])
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "abort"), [])


def _name_of(function: Any) -> str:
    """The dotted name of a kernel, from its mangled one: _ZN3abc2de... is abc.de."""
    parts, rest = [], function.name.removeprefix("_ZN")
    while match := re.match(r"\d+", rest):
        length, rest = int(match[0]), rest[match.end() :]
        parts.append(rest[:length])
        rest = rest[length:]
    return ".".join(parts) or str(function.name)


def _check_plain_index(_context: Any, builder: Any, index: Any, size: Any, axis: Any = None) -> None:
    _abort_if_outside(builder, index, builder.add(index, index.type(1)), size)


if CHECKED:  # Numba's own check of `array[i]` raises an error, which leaves a team's other threads waiting
    cgutils.do_boundscheck = _check_plain_index


def load_at(builder: Any, pointer: Any, kind: Any, word: int = 0) -> Any:
    """Reads a value of any type from `word` words after a float32 pointer."""
    pointer = builder.bitcast(builder.gep(pointer, [I64(word)]), kind.as_pointer())
    return builder.load(pointer, align=4)


def store_at(builder: Any, pointer: Any, value: Any, word: int = 0) -> None:
    """Writes a value of any type to `word` words after a float32 pointer."""
    pointer = builder.bitcast(builder.gep(pointer, [I64(word)]), value.type.as_pointer())
    builder.store(value, pointer, align=4)


def splat(builder: Any, value: Any) -> Any:
    """A vector whose lanes all hold a value of 32 bits."""
    kind = ir.VectorType(value.type, LANES)
    one_lane = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(
        one_lane, ir.Constant(kind, ir.Undefined), ir.Constant(INT_VECTOR, [0] * LANES)
    )


def float_splat(value: float) -> Any:
    """A constant vector of float32."""
    return ir.Constant(VECTOR, [float(value)] * LANES)


def int_splat(value: int) -> Any:
    """A constant vector of int32."""
    return ir.Constant(INT_VECTOR, [value] * LANES)


def call_intrinsic(builder: Any, name: str, arguments: list[Any]) -> Any:
    """Calls an LLVM intrinsic on vectors, overloaded on the first argument's type."""
    operand = arguments[0].type
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(operand, [a.type for a in arguments]), f"llvm.{name}.v{LANES}f32"
    )
    return builder.call(function, arguments)


def require_float32(array: Any) -> None:
    """Raises Numba's `TypingError` for an array of any other type or layout."""
    if not (isinstance(array, types.Array) and array.dtype == types.float32 and array.layout == "C"):
        raise TypingError(f"expected a C-contiguous float32 array, found {array}")
