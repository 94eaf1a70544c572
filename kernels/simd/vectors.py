"""Vectors of `LANES` lanes: read and written in every short format, arithmetic by lane, reductions, exp."""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from pagellm.kernels.simd.llvm import (
    BYTE_POINTER,
    I8,
    I32,
    I64,
    INT_VECTOR,
    LANES,
    SHORT_VECTOR,
    VECTOR,
    call_intrinsic,
    element_pointer,
    float_splat,
    host_has,
    int_splat,
    load_at,
    require_float32,
    splat,
    store_at,
)


class Vector(types.Type):
    """Numba's type of a vector of `LANES` lanes, float32 or int32."""

    def __init__(self, lane: str) -> None:
        self.lane = lane
        super().__init__(name=f"{lane}x{LANES}")


vector = Vector("float32")
int_vector = Vector("int32")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, data_model_manager: Any, fe_type: Any) -> None:
        llvm_type = VECTOR if fe_type.lane == "float32" else INT_VECTOR
        super().__init__(data_model_manager, fe_type, llvm_type)


@intrinsic
def load(_typing: Any, array: Any, index: Any) -> Any:
    """`LANES` floats of a C-contiguous float32 array from flat position `index` on, aligned or not."""
    require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments, count=LANES)
        return load_at(builder, pointer, VECTOR)

    return vector(array, types.intp), emit


@intrinsic
def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes `LANES` floats to a C-contiguous float32 array from flat position `index` on."""
    require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments[:2], count=LANES)
        store_at(builder, pointer, arguments[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), emit


@intrinsic
def prefetch(_typing: Any, array: Any, index: Any) -> Any:
    """Asks for the cache line of `array[index]` ahead of its use; any index is harmless."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.bitcast(
            element_pointer(context, builder, signature.args[0], *arguments, count=0), BYTE_POINTER
        )
        kind = ir.FunctionType(ir.VoidType(), [BYTE_POINTER, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, I32(0), I32(3), I32(1)])  # to read, into the first level, data
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


@intrinsic
def broadcast(_typing: Any, value: Any) -> Any:
    """A vector whose lanes all hold the float32 `value`."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return splat(builder, arguments[0])

    return vector(types.float32), emit


@intrinsic
def first_lane(_typing: Any, value: Any) -> Any:
    """The float32 in lane 0."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.extract_element(arguments[0], I32(0))

    return types.float32(vector), emit


@intrinsic
def fma(_typing: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` by lane, rounded once on every machine that has the instruction."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return call_intrinsic(builder, "fmuladd", list(arguments))

    return vector(vector, vector, vector), emit


@intrinsic
def maximum(_typing: Any, a: Any, b: Any) -> Any:
    """The greater of two vectors by lane."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return vector(vector, vector), emit


@intrinsic
def where_at_least(_typing: Any, x: Any, bound: Any, chosen: Any, otherwise: Any) -> Any:
    """By lane `chosen` where `x >= bound`, and `otherwise` elsewhere."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x_value, bound_value, *choices = arguments
        return builder.select(builder.fcmp_ordered(">=", x_value, bound_value), *choices)

    return vector(vector, vector, vector, vector), emit


def _unary(emit_lanes: Any) -> Any:
    """The body of an intrinsic from one vector to another."""

    def intrinsic_of(_typing: Any, value: Any) -> Any:
        def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return emit_lanes(builder, arguments[0])

        return vector(vector), emit

    return intrinsic_of


@intrinsic
def absolute(typing: Any, value: Any) -> Any:
    """The magnitude of each lane."""
    return _unary(lambda builder, x: call_intrinsic(builder, "fabs", [x]))(typing, value)


@intrinsic
def nearest(typing: Any, value: Any) -> Any:
    """Each lane rounded to a whole number, halves to the even one."""
    return _unary(lambda builder, x: call_intrinsic(builder, "rint", [x]))(typing, value)


def _store_as(convert: Any, num_words: int) -> Any:
    """The body of an intrinsic that writes a vector as `num_words` words of another type."""

    def intrinsic_of(_typing: Any, array: Any, index: Any, value: Any) -> Any:
        require_float32(array)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = element_pointer(context, builder, signature.args[0], *arguments[:2], count=num_words)
            store_at(builder, pointer, convert(builder, arguments[2]))
            return context.get_dummy_value()

        return types.void(array, types.intp, vector), emit

    return intrinsic_of


def from_bfloat16(builder: Any, shorts: Any) -> Any:
    """Lanes of bfloat16 as float32: the upper half of the bits."""
    return builder.bitcast(builder.shl(builder.zext(shorts, INT_VECTOR), int_splat(16)), VECTOR)


def to_bfloat16(builder: Any, value: Any) -> Any:
    """Lanes of float32 as bfloat16, rounded to nearest even; any NaN becomes the quiet one."""
    bits = builder.bitcast(value, INT_VECTOR)
    last = builder.and_(builder.lshr(bits, int_splat(16)), int_splat(1))
    rounded = builder.lshr(builder.add(builder.add(bits, int_splat(0x7FFF)), last), int_splat(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, int_splat(0x7FC0), rounded), SHORT_VECTOR)


def from_float16(builder: Any, halves: Any) -> Any:
    """float16 to float32 lanes, exact for finite values."""
    if host_has("f16c") or host_has("avx512f") or host_has("neon"):
        return builder.fpext(halves, VECTOR)
    # Without the instruction LLVM would call a function of the C runtime. The same bits read as a float32 are
    # the value times 2^-112.
    bits = builder.zext(builder.bitcast(halves, SHORT_VECTOR), INT_VECTOR)
    magnitude = builder.shl(builder.and_(bits, int_splat(0x7FFF)), int_splat(13))
    scaled = builder.fmul(builder.bitcast(magnitude, VECTOR), float_splat(2.0**112))
    sign = builder.shl(builder.and_(bits, int_splat(0x8000)), int_splat(16))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, INT_VECTOR), sign), VECTOR)


@intrinsic
def load_bfloat16(_typing: Any, array: Any, index: Any) -> Any:
    """`LANES` bfloat16 from word `index` on, as floats."""
    require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments, count=LANES // 2)
        return from_bfloat16(builder, load_at(builder, pointer, SHORT_VECTOR))

    return vector(array, types.intp), emit


@intrinsic
def store_bfloat16(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes `LANES` floats as bfloat16 to the `LANES / 2` words from `index` on, rounded to nearest even."""
    return _store_as(to_bfloat16, LANES // 2)(typing, array, index, value)


@intrinsic
def store_int8(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes `LANES` whole floats from -128 to 127 as int8 to the `LANES / 4` words from `index` on."""

    def convert(builder: Any, floats: Any) -> Any:
        return builder.trunc(builder.fptosi(floats, INT_VECTOR), ir.VectorType(I8, LANES))

    return _store_as(convert, LANES // 4)(typing, array, index, value)


@intrinsic
def store_int32(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes an int32 to the word at `index`."""
    require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments[:2], count=1)
        store_at(builder, pointer, arguments[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int32), emit


@intrinsic
def load_int32(_typing: Any, array: Any, index: Any) -> Any:
    """The word at `index` as an int32."""
    require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments, count=1)
        return load_at(builder, pointer, I32)

    return types.int32(array, types.intp), emit


@intrinsic
def store_within(_typing: Any, array: Any, index: Any, value: Any, low: Any, high: Any) -> Any:
    """Writes the lanes with `low <= value <= high`, side by side, from flat position `index` on; how many.

    All `LANES` floats from `index` on are written, those behind the kept lanes with anything.
    """
    require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, index_value, lanes, lows, highs = arguments
        inside = builder.and_(
            builder.fcmp_ordered(">=", lanes, lows), builder.fcmp_ordered("<=", lanes, highs)
        )
        compress = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(VECTOR, [VECTOR, inside.type, VECTOR]),
            f"llvm.experimental.vector.compress.v{LANES}f32",
        )
        kept = builder.call(compress, [lanes, inside, ir.Constant(VECTOR, ir.Undefined)])
        pointer = element_pointer(context, builder, signature.args[0], array_value, index_value, count=LANES)
        store_at(builder, pointer, kept)
        return builder.zext(builder.ctpop(builder.bitcast(inside, ir.IntType(LANES))), I64)

    return types.int64(array, types.intp, vector, vector, vector), emit


def _overload_arithmetic(python_operator: Any, emit_name: str) -> None:
    @intrinsic
    def by_lane(_typing: Any, a: Any, b: Any) -> Any:
        def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return getattr(builder, emit_name)(*arguments)

        return vector(vector, vector), emit

    @overload(python_operator)
    def _choose(a, b):
        if a == vector and b == vector:
            return lambda a, b: by_lane(a, b)
        return None


for _operator, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _overload_arithmetic(_operator, _name)


def _reduce(builder: Any, value: Any, combine: Any) -> Any:
    """Folds a vector by halves: an order of operations that no compiler flag can change."""
    undefined = ir.Constant(value.type, ir.Undefined)
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                value, undefined, ir.Constant(ir.VectorType(I32, width), list(range(first, first + width)))
            )
            for first in (0, width)
        ]
        value = combine(*halves)
        undefined = ir.Constant(value.type, ir.Undefined)
    return builder.extract_element(value, I32(0))


@intrinsic
def reduce_add(_typing: Any, value: Any) -> Any:
    """The sum of a vector's lanes, by a fixed tree."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _reduce(builder, arguments[0], builder.fadd)

    return types.float32(vector), emit


@intrinsic
def reduce_max(_typing: Any, value: Any) -> Any:
    """The greatest of a vector's lanes."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _reduce(
            builder, arguments[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b)
        )

    return types.float32(vector), emit


@intrinsic
def exp(_typing: Any, value: Any) -> Any:
    """e to the power of each lane, within 2 units in the last place; 1 at exactly 0; 0 below -87.33.

    exp(x) = 2^n * exp(r) with n = round(x / ln 2), and exp(r) by the Taylor-like minimax polynomial of
    Cephes' `expf` (S. L. Moshier, 1989).
    """

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x = arguments[0]
        low, high = float_splat(-87.33654), float_splat(88.37626)
        underflows = builder.fcmp_ordered("<", x, low)
        x = builder.select(underflows, low, x)
        x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
        n = call_intrinsic(builder, "rint", [builder.fmul(x, float_splat(1.44269504088896341))])
        r = call_intrinsic(builder, "fmuladd", [n, float_splat(-0.693359375), x])
        r = call_intrinsic(builder, "fmuladd", [n, float_splat(2.12194440e-4), r])
        p = float_splat(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
            p = call_intrinsic(builder, "fmuladd", [p, r, float_splat(coefficient)])
        p = call_intrinsic(builder, "fmuladd", [p, builder.fmul(r, r), builder.fadd(r, float_splat(1.0))])
        exponent = builder.add(builder.fptosi(n, INT_VECTOR), int_splat(127))
        power = builder.bitcast(builder.shl(exponent, int_splat(23)), VECTOR)
        return builder.select(underflows, float_splat(0.0), builder.fmul(p, power))

    return vector(vector), emit
