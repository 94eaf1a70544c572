"""The few LLVM operations that every kernel is built from: vectors, register tiles, atomics and calls.

This is the only module that emits LLVM IR. A vector has `LANES` lanes of 32 bits on every machine; LLVM
splits it into as many registers as the host's instruction set needs, so the same kernels run on AVX-512,
AVX2, plain x86-64 and 64-bit Arm. Lane arithmetic is written with the ordinary operators (`a * b + c` rounds
twice, `fma(a, b, c)` once where the machine can). The dot products of short types use the host's own
instruction where it has one and a portable form with the same exact integers elsewhere.

Arrays are float32 throughout: a "word" is one of their elements, which may hold a float, two bfloat16, four
int8, eight int4 or an int32. Nothing here checks bounds: an index is a promise of the kernel that gives it.
"""

import operator
import sys
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

_F32 = ir.FloatType()
_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_BYTE_POINTER = _I8.as_pointer()
_VECTOR = ir.VectorType(_F32, LANES)
_INT_VECTOR = ir.VectorType(_I32, LANES)
_SHORT_VECTOR = ir.VectorType(_I16, LANES)
_SHORT_PAIRS = ir.VectorType(_I16, 2 * LANES)
_HALF_VECTOR = ir.VectorType(ir.HalfType(), LANES)


class _BFloat16(ir.types.Type):  # type: ignore[misc]
    """LLVM's `bfloat`, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_BFLOAT_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


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
        llvm_type = _VECTOR if fe_type.lane == "float32" else _INT_VECTOR
        super().__init__(data_model_manager, fe_type, llvm_type)


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
_REGISTERS = 32 if host_has("avx512f") or host_has("neon") else 16
REGISTERS_PER_VECTOR = 1 if host_has("avx512f") else 2 if host_has("avx") else 4


def _element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _load(builder: Any, pointer: Any, kind: Any, word: int = 0) -> Any:
    """Reads a value of any type from `word` words after a float32 pointer."""
    pointer = builder.bitcast(builder.gep(pointer, [_I64(word)]), kind.as_pointer())
    return builder.load(pointer, align=4)


def _store(builder: Any, pointer: Any, value: Any, word: int = 0) -> None:
    pointer = builder.bitcast(builder.gep(pointer, [_I64(word)]), value.type.as_pointer())
    builder.store(value, pointer, align=4)


def _splat(builder: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, LANES)
    one_lane = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(
        one_lane, ir.Constant(kind, ir.Undefined), ir.Constant(_INT_VECTOR, [0] * LANES)
    )


def _constant_splat(value: float) -> Any:
    return ir.Constant(_VECTOR, [float(value)] * LANES)


def _int_splat(value: int) -> Any:
    return ir.Constant(_INT_VECTOR, [value] * LANES)


def _call(builder: Any, name: str, arguments: list[Any]) -> Any:
    """Calls an LLVM intrinsic on vectors, overloaded on the first argument's type."""
    operand = arguments[0].type
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(operand, [a.type for a in arguments]), f"llvm.{name}.v{LANES}f32"
    )
    return builder.call(function, arguments)


def _require_float32(array: Any) -> None:
    if not (isinstance(array, types.Array) and array.dtype == types.float32 and array.layout == "C"):
        raise TypingError(f"expected a C-contiguous float32 array, found {array}")


@intrinsic
def load(_typing: Any, array: Any, index: Any) -> Any:
    """`LANES` floats of a C-contiguous float32 array from flat position `index` on, aligned or not."""
    _require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], *arguments)
        return _load(builder, pointer, _VECTOR)

    return vector(array, types.intp), emit


@intrinsic
def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes `LANES` floats to a C-contiguous float32 array from flat position `index` on."""
    _require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], *arguments[:2])
        _store(builder, pointer, arguments[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), emit


@intrinsic
def prefetch(_typing: Any, array: Any, index: Any) -> Any:
    """Asks for the cache line of `array[index]` ahead of its use; any index is harmless."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.bitcast(
            _element_pointer(context, builder, signature.args[0], *arguments), _BYTE_POINTER
        )
        kind = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])  # to read, into the first level, data
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


@intrinsic
def broadcast(_typing: Any, value: Any) -> Any:
    """A vector whose lanes all hold the float32 `value`."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[0])

    return vector(types.float32), emit


@intrinsic
def first_lane(_typing: Any, value: Any) -> Any:
    """The float32 in lane 0."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.extract_element(arguments[0], _I32(0))

    return types.float32(vector), emit


@intrinsic
def fma(_typing: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` by lane, rounded once on every machine that has the instruction."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _call(builder, "fmuladd", list(arguments))

    return vector(vector, vector, vector), emit


@intrinsic
def maximum(_typing: Any, a: Any, b: Any) -> Any:
    """The greater of two vectors by lane."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return vector(vector, vector), emit


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
    return _unary(lambda builder, x: _call(builder, "fabs", [x]))(typing, value)


@intrinsic
def nearest(typing: Any, value: Any) -> Any:
    """Each lane rounded to a whole number, halves to the even one."""
    return _unary(lambda builder, x: _call(builder, "rint", [x]))(typing, value)


def _store_as(convert: Any) -> Any:
    def intrinsic_of(_typing: Any, array: Any, index: Any, value: Any) -> Any:
        _require_float32(array)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _element_pointer(context, builder, signature.args[0], *arguments[:2])
            _store(builder, pointer, convert(builder, arguments[2]))
            return context.get_dummy_value()

        return types.void(array, types.intp, vector), emit

    return intrinsic_of


def _from_bfloat16(builder: Any, shorts: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(shorts, _INT_VECTOR), _int_splat(16)), _VECTOR)


def _to_bfloat16(builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, _INT_VECTOR)
    last = builder.and_(builder.lshr(bits, _int_splat(16)), _int_splat(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _int_splat(0x7FFF)), last), _int_splat(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _int_splat(0x7FC0), rounded), _SHORT_VECTOR)


def _from_float16(builder: Any, halves: Any) -> Any:
    """float16 to float32 lanes, exact for finite values."""
    if host_has("f16c") or host_has("avx512f") or host_has("neon"):
        return builder.fpext(halves, _VECTOR)
    # Without the instruction LLVM would call a function of the C runtime. The same bits read as a float32 are
    # the value times 2^-112.
    bits = builder.zext(builder.bitcast(halves, _SHORT_VECTOR), _INT_VECTOR)
    magnitude = builder.shl(builder.and_(bits, _int_splat(0x7FFF)), _int_splat(13))
    scaled = builder.fmul(builder.bitcast(magnitude, _VECTOR), _constant_splat(2.0**112))
    sign = builder.shl(builder.and_(bits, _int_splat(0x8000)), _int_splat(16))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, _INT_VECTOR), sign), _VECTOR)


@intrinsic
def load_bfloat16(_typing: Any, array: Any, index: Any) -> Any:
    """`LANES` bfloat16 from word `index` on, as floats."""
    _require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], *arguments)
        return _from_bfloat16(builder, _load(builder, pointer, _SHORT_VECTOR))

    return vector(array, types.intp), emit


@intrinsic
def store_bfloat16(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes `LANES` floats as bfloat16 to the `LANES / 2` words from `index` on, rounded to nearest even."""
    return _store_as(_to_bfloat16)(typing, array, index, value)


@intrinsic
def store_int8(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes `LANES` whole floats from -128 to 127 as int8 to the `LANES / 4` words from `index` on."""

    def convert(builder: Any, floats: Any) -> Any:
        return builder.trunc(builder.fptosi(floats, _INT_VECTOR), ir.VectorType(_I8, LANES))

    return _store_as(convert)(typing, array, index, value)


@intrinsic
def store_int32(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes an int32 to the word at `index`."""
    _require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _store(builder, _element_pointer(context, builder, signature.args[0], *arguments[:2]), arguments[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int32), emit


@intrinsic
def load_int32(_typing: Any, array: Any, index: Any) -> Any:
    """The word at `index` as an int32."""
    _require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, _element_pointer(context, builder, signature.args[0], *arguments), _I32)

    return types.int32(array, types.intp), emit


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
                value, undefined, ir.Constant(ir.VectorType(_I32, width), list(range(first, first + width)))
            )
            for first in (0, width)
        ]
        value = combine(*halves)
        undefined = ir.Constant(value.type, ir.Undefined)
    return builder.extract_element(value, _I32(0))


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
        low, high = _constant_splat(-87.33654), _constant_splat(88.37626)
        underflows = builder.fcmp_ordered("<", x, low)
        x = builder.select(underflows, low, x)
        x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
        n = _call(builder, "rint", [builder.fmul(x, _constant_splat(1.44269504088896341))])
        r = _call(builder, "fmuladd", [n, _constant_splat(-0.693359375), x])
        r = _call(builder, "fmuladd", [n, _constant_splat(2.12194440e-4), r])
        p = _constant_splat(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
            p = _call(builder, "fmuladd", [p, r, _constant_splat(coefficient)])
        p = _call(builder, "fmuladd", [p, builder.fmul(r, r), builder.fadd(r, _constant_splat(1.0))])
        exponent = builder.add(builder.fptosi(n, _INT_VECTOR), _int_splat(127))
        power = builder.bitcast(builder.shl(exponent, _int_splat(23)), _VECTOR)
        return builder.select(underflows, _constant_splat(0.0), builder.fmul(p, power))

    return vector(vector), emit


def _literal(value: Any) -> int:
    if not isinstance(value, types.IntegerLiteral):
        raise TypingError(f"expected a compile-time constant, found {value}")
    return int(value.literal_value)


@intrinsic(prefer_literal=True)
def start_tile(_typing: Any, rows: Any, vectors: Any, first_row: Any, index: Any) -> Any:
    """A register tile: a tuple of rows * vectors accumulators, row-major, both counts compile-time constants.

    Every row starts as the `vectors` vectors of `first_row` from `index` on (a bias, say).
    """
    num_rows, num_vectors = _literal(rows), _literal(vectors)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[2], arguments[2], arguments[3])
        row = [_load(builder, pointer, _VECTOR, v * LANES) for v in range(num_vectors)]
        return context.make_tuple(builder, signature.return_type, row * num_rows)

    tile = types.UniTuple(vector, num_rows * num_vectors)
    return tile(rows, vectors, first_row, types.intp), emit


@intrinsic(prefer_literal=True)
def write_tile(_typing: Any, tile: Any, rows: Any, out: Any, index: Any, stride: Any, accumulate: Any) -> Any:
    """Writes a register tile's rows to `out` from `index` on, `stride` floats apart, or adds them there."""
    num_rows = _literal(rows)
    num_vectors = tile.count // num_rows

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_value, _, out_value, index_value, stride_value, accumulates = arguments
        start = _element_pointer(context, builder, signature.args[2], out_value, index_value)

        def write(adds: bool) -> None:
            pointer = start
            for row in range(num_rows):
                for v in range(num_vectors):
                    value = builder.extract_value(tile_value, row * num_vectors + v)
                    if adds:
                        value = builder.fadd(_load(builder, pointer, _VECTOR, v * LANES), value)
                    _store(builder, pointer, value, v * LANES)
                pointer = builder.gep(pointer, [stride_value])

        with builder.if_else(accumulates) as (add, replace):
            with add:
                write(adds=True)
            with replace:
                write(adds=False)
        return context.get_dummy_value()

    return types.void(tile, rows, out, types.intp, types.intp, types.boolean), emit


@intrinsic(prefer_literal=True)
def start_int_tile(_typing: Any, rows: Any, vectors: Any, x: Any, index: Any, stride: Any) -> Any:
    """A register tile of int32: all lanes of a row start as the int32 in word `x[index + row * stride]`."""
    num_rows, num_vectors, row_stride = _literal(rows), _literal(vectors), _literal(stride)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[2], *arguments[2:4])
        values = []
        for row in range(num_rows):
            values += [_splat(builder, _load(builder, pointer, _I32, row * row_stride))] * num_vectors
        return context.make_tuple(builder, signature.return_type, values)

    tile = types.UniTuple(int_vector, num_rows * num_vectors)
    return tile(rows, vectors, x, types.intp, stride), emit


def _tile_update(*steps: tuple[Any, Any, Any]) -> Any:
    """The body of an intrinsic `(tile, rows, x, x_index, x_stride, w, w_index)` that updates a register tile.

    Of a step, `load_row(builder, pointer)` reads what a row has in common, `load_column(builder, pointer, v)`
    what the v-th vector of columns has, and `multiply_add(builder, row, column, accumulator)` joins them. A
    tile that leaves too few registers for all columns of all steps meets them one by one.
    `w_index` is where the first vector of columns begins, with the others behind it, or a tuple of where each
    begins. `rows` and `x_stride` are compile-time constants, so the reads of all rows need a single address
    register; with a stride known only at run time the accumulators spill.
    """

    def intrinsic_of(
        _typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
    ) -> Any:
        num_rows, stride = _literal(rows), _literal(x_stride)
        num_vectors = tile.count // num_rows
        apart = isinstance(w_index, types.UniTuple)
        place = types.UniTuple(types.intp, num_vectors) if apart else types.intp
        accumulators = tile.count * (2 if tile.dtype == int_vector else 1)  # the scaled sums are floats
        registers = (accumulators + num_vectors * len(steps)) * REGISTERS_PER_VECTOR + 1
        at_once = num_vectors if registers <= _REGISTERS else 1

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            tile_value, _, x_value, x_at, _, w_value, w_at = arguments
            x_pointer = _element_pointer(context, builder, signature.args[2], x_value, x_at)
            indices = [builder.extract_value(w_at, v) if apart else w_at for v in range(num_vectors)]
            w_pointers = [
                _element_pointer(context, builder, signature.args[5], w_value, index) for index in indices
            ]
            accumulators = [builder.extract_value(tile_value, i) for i in range(tile.count)]
            parts = [(step, first) for step in steps for first in range(0, num_vectors, at_once)]
            for part, ((load_row, load_column, multiply_add), first) in enumerate(parts):
                if part > 0 and registers > _REGISTERS:  # what is behind this is not read before it
                    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
                columns = {
                    v: load_column(builder, w_pointers[v], 0 if apart else v)
                    for v in range(first, first + at_once)
                }
                for row in range(num_rows):
                    factor = load_row(builder, builder.gep(x_pointer, [_I64(row * stride)]))
                    for v, column in columns.items():
                        i = row * num_vectors + v
                        accumulators[i] = multiply_add(builder, factor, column, accumulators[i])
            return context.make_tuple(builder, signature.return_type, accumulators)

        return tile(tile, rows, x, types.intp, x_stride, w, place), emit

    return intrinsic_of


def _float_row(builder: Any, pointer: Any) -> Any:
    return _splat(builder, builder.load(pointer))


def _multiply_add(builder: Any, row: Any, column: Any, accumulator: Any) -> Any:
    return _call(builder, "fmuladd", [row, column, accumulator])


@intrinsic(prefer_literal=True)
def outer_product(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """`tile[r][v] + x[x_index + r * x_stride] * w[w_index + v * LANES ...]`: one rank-1 update.

    `tile` is a tuple of rows * V vectors, row-major; see `_tile_update`.
    """
    update = _tile_update((_float_row, lambda b, w, v: _load(b, w, _VECTOR, v * LANES), _multiply_add))
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)


@intrinsic(prefer_literal=True)
def outer_product_float16(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """Like `outer_product`, where the words of `w` hold two float16 each."""

    def load_column(builder: Any, pointer: Any, v: int) -> Any:
        return _from_float16(builder, _load(builder, pointer, _HALF_VECTOR, v * LANES // 2))

    update = _tile_update((_float_row, load_column, _multiply_add))
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)


@intrinsic(prefer_literal=True)
def outer_product_bfloat16(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """Like `outer_product`, where the words of `w` hold two bfloat16 each."""

    def load_column(builder: Any, pointer: Any, v: int) -> Any:
        return _from_bfloat16(builder, _load(builder, pointer, _SHORT_VECTOR, v * LANES // 2))

    update = _tile_update((_float_row, load_column, _multiply_add))
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)


# Words of `x` in which `dot_bfloat16` takes a pair of inputs: one, as bfloat16, if the host multiplies these,
# else two, as floats.
PAIR_WORDS = 1 if host_has("avx512bf16") else 2


@intrinsic(prefer_literal=True)
def dot_bfloat16(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """Like `outer_product`, where each word of `w` is a pair of bfloat16: adds both products to each lane.

    The inputs that they meet are in `PAIR_WORDS` words of `x`.
    """
    if PAIR_WORDS == 1:

        def load_pairs(builder: Any, pointer: Any, v: int) -> Any:
            return builder.bitcast(_load(builder, pointer, _INT_VECTOR, v * LANES), _BFLOAT_PAIRS)

        def splat_pair(builder: Any, pointer: Any) -> Any:
            return builder.bitcast(_splat(builder, _load(builder, pointer, _I32)), _BFLOAT_PAIRS)

        def add_products(builder: Any, row: Any, column: Any, accumulator: Any) -> Any:
            kind = ir.FunctionType(_VECTOR, [_VECTOR, _BFLOAT_PAIRS, _BFLOAT_PAIRS])
            function = cgutils.get_or_insert_function(
                builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512"
            )
            return builder.call(function, [accumulator, row, column])

        update = _tile_update((splat_pair, load_pairs, add_products))
    else:

        def load_low(builder: Any, pointer: Any, v: int) -> Any:
            words = _load(builder, pointer, _INT_VECTOR, v * LANES)
            return builder.bitcast(builder.shl(words, _int_splat(16)), _VECTOR)

        def load_high(builder: Any, pointer: Any, v: int) -> Any:
            words = _load(builder, pointer, _INT_VECTOR, v * LANES)
            return builder.bitcast(builder.and_(words, _int_splat(-65536)), _VECTOR)

        def second_row(builder: Any, pointer: Any) -> Any:
            return _splat(builder, _load(builder, pointer, _F32, 1))

        update = _tile_update((_float_row, load_low, _multiply_add), (second_row, load_high, _multiply_add))
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)


def _split_call(builder: Any, name: str, parts: int, result: Any, arguments: list[Any]) -> Any:
    """Calls an intrinsic of a machine whose registers hold 1 / `parts` of a vector, part by part."""
    pieces = []
    for part in range(parts):
        taken = []
        for argument in arguments:
            width = argument.type.count // parts
            mask = ir.Constant(ir.VectorType(_I32, width), list(range(part * width, (part + 1) * width)))
            taken.append(
                builder.shuffle_vector(argument, ir.Constant(argument.type, ir.Undefined), mask)
                if parts > 1
                else argument
            )
        piece_type = ir.VectorType(result.element, result.count // parts)
        kind = ir.FunctionType(piece_type, [value.type for value in taken])
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        pieces.append(builder.call(function, taken))
    while len(pieces) > 1:
        joined = []
        for low, high in zip(pieces[::2], pieces[1::2], strict=True):
            width = 2 * low.type.count
            joined.append(
                builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, width), list(range(width))))
            )
        pieces = joined
    return pieces[0]


def _first_known(*instructions: tuple[str, str, int]) -> tuple[str, int] | None:
    """Of (feature, intrinsic, parts of a vector) the intrinsic and parts of the first that the host has."""
    return next(((name, parts) for feature, name, parts in instructions if host_has(feature)), None)


_MULTIPLY_PAIRS = _first_known(
    ("avx512bw", "llvm.x86.avx512.pmaddw.d.512", 1),
    ("avx2", "llvm.x86.avx2.pmadd.wd", 2),
    ("sse2", "llvm.x86.sse2.pmadd.wd", 4),
)


def _multiply_pairs(builder: Any, a: Any, b: Any) -> Any:
    """a[2i] * b[2i] + a[2i + 1] * b[2i + 1] of int16 lanes, as int32 lanes."""
    if _MULTIPLY_PAIRS is not None:
        name, parts = _MULTIPLY_PAIRS
        operands = [builder.bitcast(a, _SHORT_PAIRS), builder.bitcast(b, _SHORT_PAIRS)]
        return _split_call(builder, name, parts, _INT_VECTOR, operands)
    sixteen = _int_splat(16)
    low, high = (
        builder.mul(*(builder.ashr(half(value), sixteen) for value in (a, b)))
        for half in (lambda value: builder.shl(value, sixteen), lambda value: value)
    )
    return builder.add(low, high)


_DOT_BYTES = _first_known(
    ("avx512vnni", "llvm.x86.avx512.vpdpbusd.512", 1), ("avxvnni", "llvm.x86.avx512.vpdpbusd.256", 2)
)
_ADD_BYTE_PAIRS = _first_known(
    ("avx512bw", "llvm.x86.avx512.pmaddubs.w.512", 1),
    ("avx2", "llvm.x86.avx2.pmadd.ub.sw", 2),
    ("ssse3", "llvm.x86.ssse3.pmadd.ub.sw.128", 4),
)
# There is none for 512 bits.
_MOVE_SIGNS = (
    None
    if host_has("avx512bw")
    else _first_known(("avx2", "llvm.x86.avx2.psign.b", 2), ("ssse3", "llvm.x86.ssse3.psign.b.128", 4))
)
_MULTIPLIES_MAGNITUDES = _DOT_BYTES is None and _MOVE_SIGNS is not None
# What the weights of `dot_int8` hold too much: most instructions take one of their operands unsigned.
INT8_OFFSET = 0 if _MULTIPLIES_MAGNITUDES else 128


def _byte_instruction(builder: Any, instruction: tuple[str, int], kind: Any, a: Any, b: Any) -> Any:
    name, parts = instruction
    bytes = ir.VectorType(_I8, 4 * LANES)
    return _split_call(builder, name, parts, kind, [builder.bitcast(a, bytes), builder.bitcast(b, bytes)])


def _add_byte_pairs(builder: Any, unsigned: Any, signed: Any) -> Any:
    """The products of unsigned and signed bytes, two neighbours added in an int16 that must hold them."""
    assert _ADD_BYTE_PAIRS is not None
    return _byte_instruction(builder, _ADD_BYTE_PAIRS, _SHORT_PAIRS, unsigned, signed)


def _add_short_pairs(builder: Any, accumulator: Any, shorts: Any) -> Any:
    """accumulator + the two int16 of each lane."""
    ones = ir.Constant(shorts.type, [1] * shorts.type.count)
    return builder.add(accumulator, _multiply_pairs(builder, shorts, ones))


def _dot_bytes(builder: Any, unsigned: Any, signed: Any, accumulator: Any) -> Any:
    """accumulator + the four products of each lane's bytes, exact in int32."""
    if _DOT_BYTES is not None:
        name, parts = _DOT_BYTES
        return _split_call(builder, name, parts, _INT_VECTOR, [accumulator, unsigned, signed])
    eight = ir.Constant(_SHORT_PAIRS, [8] * 2 * LANES)
    even, odd = (
        builder.and_(value, _int_splat(0x00FF00FF))
        for value in (unsigned, builder.lshr(unsigned, _int_splat(8)))
    )
    signed = builder.bitcast(signed, _SHORT_PAIRS)
    signed_even = builder.ashr(builder.shl(signed, eight), eight)
    signed_odd = builder.ashr(signed, eight)
    for a, b in ((even, signed_even), (odd, signed_odd)):
        products = _multiply_pairs(builder, a, builder.bitcast(b, _INT_VECTOR))
        accumulator = builder.add(accumulator, products)
    return accumulator


def _int_row(builder: Any, pointer: Any) -> Any:
    return _splat(builder, _load(builder, pointer, _I32))


@intrinsic(prefer_literal=True)
def dot_int8(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """Adds to each int32 lane the four products of a word of `x` and one of `w`.

    `x` is int8 and never -128; `w` is uint8, or int8 if `INT8_OFFSET` is 0.
    """

    def load_words(builder: Any, pointer: Any, v: int) -> Any:
        return _load(builder, pointer, _INT_VECTOR, v * LANES)

    def load_magnitudes(builder: Any, pointer: Any, v: int) -> Any:
        bytes = builder.bitcast(load_words(builder, pointer, v), ir.VectorType(_I8, 4 * LANES))
        negative = builder.icmp_signed("<", bytes, ir.Constant(bytes.type, [0] * 4 * LANES))
        return builder.select(negative, builder.neg(bytes), bytes), bytes

    def add_products(builder: Any, row: Any, column: Any, accumulator: Any) -> Any:
        # |w| * (x with the sign of w): at most 2 * 128 * 127 for two neighbours, which an int16 holds.
        magnitudes, weights = column
        assert _MOVE_SIGNS is not None
        signed = _byte_instruction(builder, _MOVE_SIGNS, weights.type, row, weights)
        return _add_short_pairs(builder, accumulator, _add_byte_pairs(builder, magnitudes, signed))

    if _MULTIPLIES_MAGNITUDES:
        update = _tile_update((_int_row, load_magnitudes, add_products))
    else:
        update = _tile_update(
            (
                _int_row,
                load_words,
                lambda b, row, column, accumulator: _dot_bytes(b, column, row, accumulator),
            )
        )
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)


# Whether a lane of `dot_int4` is two int16, to be added at the end: one operation in five less.
INT4_PAIRS = _DOT_BYTES is None and _ADD_BYTE_PAIRS is not None


@intrinsic(prefer_literal=True)
def dot_int4(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """Adds to each lane the products of eight int8 `x` and the eight unsigned nibbles of a word of `w`.

    The low nibbles meet the word of `x`, the high nibbles the word four further. A lane is an int32 or, with
    `INT4_PAIRS`, two int16: they hold the 30,720 that four words can add up to, and hardly more.
    """

    def low_nibbles(builder: Any, pointer: Any, v: int) -> Any:
        return builder.and_(_load(builder, pointer, _INT_VECTOR, v * LANES), _int_splat(0x0F0F0F0F))

    def high_nibbles(builder: Any, pointer: Any, v: int) -> Any:
        words = _load(builder, pointer, _INT_VECTOR, v * LANES)
        return builder.and_(builder.lshr(words, _int_splat(4)), _int_splat(0x0F0F0F0F))

    def fourth_word(builder: Any, pointer: Any) -> Any:
        return _splat(builder, _load(builder, pointer, _I32, 4))

    def add_products(builder: Any, row: Any, column: Any, accumulator: Any) -> Any:
        if INT4_PAIRS:
            pairs = builder.bitcast(accumulator, _SHORT_PAIRS)
            return builder.bitcast(builder.add(pairs, _add_byte_pairs(builder, column, row)), _INT_VECTOR)
        return _dot_bytes(builder, column, row, accumulator)

    update = _tile_update((_int_row, low_nibbles, add_products), (fourth_word, high_nibbles, add_products))
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)


@intrinsic
def int4_sums(_typing: Any, tile: Any) -> Any:
    """The int32 sums of a tile that `dot_int4` has added up."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not INT4_PAIRS:
            return arguments[0]
        ones = ir.Constant(_SHORT_PAIRS, [1] * 2 * LANES)
        lanes = [builder.extract_value(arguments[0], i) for i in range(tile.count)]
        sums = [_multiply_pairs(builder, lane, ones) for lane in lanes]
        return context.make_tuple(builder, signature.return_type, sums)

    return tile(tile), emit


@intrinsic(prefer_literal=True)
def add_scaled(
    _typing: Any, tile: Any, ints: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """`tile[r][v] + float(ints[r][v]) * (x[x_index + r * x_stride] * w[w_index + ...])`, `w` in float16."""
    num_rows, stride = _literal(rows), _literal(x_stride)
    num_vectors = tile.count // num_rows

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        accumulators, int_values, _, x_value, x_at, _, w_value, w_at = arguments
        x_pointer = _element_pointer(context, builder, signature.args[3], x_value, x_at)
        w_pointer = _element_pointer(context, builder, signature.args[6], w_value, w_at)
        scales = [
            _from_float16(builder, _load(builder, w_pointer, _HALF_VECTOR, v * LANES // 2))
            for v in range(num_vectors)
        ]
        updated = []
        for row in range(num_rows):
            factor = _float_row(builder, builder.gep(x_pointer, [_I64(row * stride)]))
            for v in range(num_vectors):
                position = row * num_vectors + v
                value = builder.sitofp(builder.extract_value(int_values, position), _VECTOR)
                accumulator = builder.extract_value(accumulators, position)
                updated.append(_multiply_add(builder, value, builder.fmul(factor, scales[v]), accumulator))
        return context.make_tuple(builder, signature.return_type, updated)

    return tile(tile, ints, rows, x, types.intp, x_stride, w, types.intp), emit


def _counter_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return _element_pointer(context, builder, signature.args[0], *arguments[:2])


@intrinsic
def atomic_add(_typing: Any, counters: Any, index: Any, amount: Any) -> Any:
    """Adds to an int64 counter that threads share; returns what it held before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _counter_pointer(context, builder, signature, arguments)
        return builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), emit


@intrinsic
def atomic_load(_typing: Any, counters: Any, index: Any) -> Any:
    """Reads an int64 counter; what other threads wrote before they stored to it is visible after."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _counter_pointer(context, builder, signature, arguments)
        return builder.load_atomic(pointer, "seq_cst", align=8)

    return types.int64(counters, types.intp), emit


@intrinsic
def atomic_store(_typing: Any, counters: Any, index: Any, value: Any) -> Any:
    """Writes an int64 counter after everything that this thread wrote before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _counter_pointer(context, builder, signature, arguments)
        builder.store_atomic(arguments[2], pointer, "release", align=8)
        return context.get_dummy_value()

    return types.void(counters, types.intp, types.int64), emit


@intrinsic
def atomic_exchange(_typing: Any, counters: Any, index: Any, value: Any) -> Any:
    """Writes an int64 counter that threads share; returns what it held before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _counter_pointer(context, builder, signature, arguments)
        return builder.atomic_rmw("xchg", pointer, arguments[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), emit


@intrinsic
def yield_thread(_typing: Any) -> Any:
    """Offers the processor to another thread: what a spinning thread does when its wait gets long."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"

    def emit(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), name)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), emit


def _call_lock(name: str, builder: Any, address: Any, *arguments: Any) -> None:
    lock = builder.inttoptr(address, _BYTE_POINTER)
    kind = ir.FunctionType(_I32, [_BYTE_POINTER, *(a.type for a in arguments)])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [lock, *arguments])


@intrinsic
def acquire_lock(_typing: Any, address: Any) -> Any:
    """Sleeps until one of Python's own thread locks, at an address, is free, and takes it."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _call_lock("PyThread_acquire_lock", builder, arguments[0], _I32(1))
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def release_lock(_typing: Any, address: Any) -> Any:
    """Frees one of Python's own thread locks, whoever took it."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _call_lock("PyThread_release_lock", builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), emit


_CALL = ir.FunctionType(ir.VoidType(), [_I64, _I64])  # the first argument, the address of the others


@intrinsic
def this_call(_typing: Any) -> Any:
    """The call under way of the function that this is written in: two addresses for `call_again`.

    They are those of the code and of a copy of the arguments on the stack, which lasts as long as the call.
    """

    def emit(context: Any, builder: Any, signature: Any, _arguments: Any) -> Any:
        function = builder.function
        result, error, _, *arguments = function.args
        copy = cgutils.alloca_once(builder, ir.LiteralStructType([a.type for a in arguments]))
        for i, argument in enumerate(arguments):
            builder.store(argument, builder.gep(copy, [_I32(0), _I32(i)]))
        again = ir.Function(builder.module, _CALL, builder.module.get_unique_name("call_again"))
        again.linkage = "internal"
        again.attributes.add("noinline")
        body = ir.IRBuilder(again.append_basic_block())
        copied = body.inttoptr(again.args[1], copy.type)
        values = [body.load(body.gep(copied, [_I32(0), _I32(i)])) for i in range(len(arguments))]
        own = [body.alloca(pointer.type.pointee) for pointer in (result, error)]
        body.call(function, [*own, again.args[0], *values])
        body.ret_void()
        addresses = [builder.ptrtoint(pointer, _I64) for pointer in (again, copy)]
        return context.make_tuple(builder, signature.return_type, addresses)

    return types.UniTuple(types.int64, 2)(), emit


@intrinsic
def call_again(_typing: Any, code: Any, arguments: Any, first: Any) -> Any:
    """Makes the same call as `this_call` with another int64 as the first argument."""

    def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        function = builder.inttoptr(values[0], _CALL.as_pointer())
        builder.call(function, [values[2], values[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def where_at_least(_typing: Any, x: Any, bound: Any, chosen: Any, otherwise: Any) -> Any:
    """By lane `chosen` where `x >= bound`, and `otherwise` elsewhere."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x_value, bound_value, *choices = arguments
        return builder.select(builder.fcmp_ordered(">=", x_value, bound_value), *choices)

    return vector(vector, vector, vector, vector), emit


@intrinsic
def store_within(_typing: Any, array: Any, index: Any, value: Any, low: Any, high: Any) -> Any:
    """Writes the lanes with `low <= value <= high`, side by side, from flat position `index` on; how many.

    All `LANES` floats from `index` on are written, those behind the kept lanes with anything.
    """
    _require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, index_value, lanes, lows, highs = arguments
        inside = builder.and_(
            builder.fcmp_ordered(">=", lanes, lows), builder.fcmp_ordered("<=", lanes, highs)
        )
        compress = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_VECTOR, [_VECTOR, inside.type, _VECTOR]),
            f"llvm.experimental.vector.compress.v{LANES}f32",
        )
        kept = builder.call(compress, [lanes, inside, ir.Constant(_VECTOR, ir.Undefined)])
        _store(builder, _element_pointer(context, builder, signature.args[0], array_value, index_value), kept)
        return builder.zext(builder.ctpop(builder.bitcast(inside, ir.IntType(LANES))), _I64)

    return types.int64(array, types.intp, vector, vector, vector), emit
