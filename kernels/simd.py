"""The few LLVM operations that every kernel is built from: 16-lane float32 vectors and atomics.

This is the only module that emits LLVM IR. A vector has `LANES` float32 lanes on every machine; LLVM
splits it into as many registers as the host's instruction set needs, so the same kernels run on AVX-512,
AVX2, plain x86-64 and 64-bit Arm. Lane arithmetic is written with the ordinary operators (`a * b + c` rounds
twice, `fma(a, b, c)` once where the machine can).

Nothing here checks bounds: an index is a promise of the kernel that gives it.
"""

import operator
import sys
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_BYTE_POINTER = ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_F32, LANES)
_INT_VECTOR = ir.VectorType(_I32, LANES)


class Float32Vector(types.Type):
    """Numba's type of a vector of `LANES` float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = Float32Vector()


@register_model(Float32Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, data_model_manager: Any, fe_type: Any) -> None:
        super().__init__(data_model_manager, fe_type, _VECTOR)


def host_has(feature: str) -> bool:
    """Whether the processor that kernels are compiled for has an LLVM target feature such as "avx512f".

    Numba's own override (`NUMBA_CPU_FEATURES`) wins, so a test can compile for a lesser machine.
    """
    config: Any = numba.config
    override = config.CPU_FEATURES
    if override is not None:
        return f"+{feature}" in override.split(",")
    return bool(binding.get_host_cpu_features().get(feature, False))


def _element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _vector_pointer(builder: Any, pointer: Any, offset: int) -> Any:
    return builder.bitcast(builder.gep(pointer, [_I64(offset * LANES)]), _VECTOR.as_pointer())


def _load_vector(builder: Any, pointer: Any, offset: int) -> Any:
    return builder.load(_vector_pointer(builder, pointer, offset), align=4)


def _splat(builder: Any, value: Any) -> Any:
    one_lane = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(
        one_lane, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_INT_VECTOR, [0] * LANES)
    )


def _constant_splat(value: float) -> Any:
    return ir.Constant(_VECTOR, [float(value)] * LANES)


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
        return _load_vector(builder, pointer, 0)

    return vector(array, types.intp), emit


@intrinsic
def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes `LANES` floats to a C-contiguous float32 array from flat position `index` on."""
    _require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], _vector_pointer(builder, pointer, 0), align=4)
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
        builder.call(function, [pointer, _I32(0), _I32(2), _I32(1)])  # to read, into the second level, data
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
        exponent = builder.add(builder.fptosi(n, _INT_VECTOR), ir.Constant(_INT_VECTOR, [127] * LANES))
        power = builder.bitcast(builder.shl(exponent, ir.Constant(_INT_VECTOR, [23] * LANES)), _VECTOR)
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
        row = [_load_vector(builder, pointer, v) for v in range(num_vectors)]
        return context.make_tuple(builder, signature.return_type, row * num_rows)

    tile = types.UniTuple(vector, num_rows * num_vectors)
    return tile(rows, vectors, first_row, types.intp), emit


@intrinsic(prefer_literal=True)
def load_tile(_typing: Any, rows: Any, source: Any, index: Any, stride: Any) -> Any:
    """A register tile of `rows` rows of one vector each, read from `source`, `stride` floats apart."""
    num_rows = _literal(rows)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[1], arguments[1], arguments[2])
        vectors = []
        for _ in range(num_rows):
            vectors.append(_load_vector(builder, pointer, 0))
            pointer = builder.gep(pointer, [arguments[3]])
        return context.make_tuple(builder, signature.return_type, vectors)

    return types.UniTuple(vector, num_rows)(rows, source, types.intp, types.intp), emit


def _store_tile(accumulate: bool) -> Any:
    def intrinsic_of(_typing: Any, tile: Any, rows: Any, out: Any, index: Any, stride: Any) -> Any:
        num_rows = _literal(rows)
        num_vectors = tile.count // num_rows

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            tile_value, _, out_value, index_value, stride_value = arguments
            pointer = _element_pointer(context, builder, signature.args[2], out_value, index_value)
            for row in range(num_rows):
                for v in range(num_vectors):
                    value = builder.extract_value(tile_value, row * num_vectors + v)
                    if accumulate:
                        value = builder.fadd(_load_vector(builder, pointer, v), value)
                    builder.store(value, _vector_pointer(builder, pointer, v), align=4)
                pointer = builder.gep(pointer, [stride_value])
            return context.get_dummy_value()

        return types.void(tile, rows, out, types.intp, types.intp), emit

    return intrinsic_of


@intrinsic(prefer_literal=True)
def store_tile(typing: Any, tile: Any, rows: Any, out: Any, index: Any, stride: Any) -> Any:
    """Writes a register tile's rows to `out` from `index` on, `stride` floats apart."""
    return _store_tile(accumulate=False)(typing, tile, rows, out, index, stride)


@intrinsic(prefer_literal=True)
def add_tile(typing: Any, tile: Any, rows: Any, out: Any, index: Any, stride: Any) -> Any:
    """Adds a register tile's rows to `out` from `index` on, `stride` floats apart."""
    return _store_tile(accumulate=True)(typing, tile, rows, out, index, stride)


@intrinsic(prefer_literal=True)
def outer_product(
    _typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """`tile[r][v] + x[x_index + r * x_stride] * w[w_index + v * LANES ...]`: one rank-1 update.

    `tile` is a tuple of rows * V vectors, row-major. `rows` and `x_stride` are compile-time constants, so the
    broadcasts need a single address register; with a stride known only at run time the accumulators spill.
    """
    num_rows, stride = _literal(rows), _literal(x_stride)
    num_vectors = tile.count // num_rows

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        accumulators, _, x_value, x_at, _, w_value, w_at = arguments
        x_pointer = _element_pointer(context, builder, signature.args[2], x_value, x_at)
        w_pointer = _element_pointer(context, builder, signature.args[5], w_value, w_at)
        columns = [_load_vector(builder, w_pointer, v) for v in range(num_vectors)]
        updated = []
        for row in range(num_rows):
            factor = _splat(builder, builder.load(builder.gep(x_pointer, [_I64(row * stride)])))
            for v in range(num_vectors):
                accumulator = builder.extract_value(accumulators, row * num_vectors + v)
                updated.append(_call(builder, "fmuladd", [factor, columns[v], accumulator]))
        return context.make_tuple(builder, signature.return_type, updated)

    return tile(tile, rows, x, types.intp, x_stride, w, types.intp), emit


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
        return builder.load_atomic(pointer, "acquire", align=8)

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
def yield_thread(_typing: Any) -> Any:
    """Offers the processor to another thread: what a spinning thread does when its wait gets long."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"

    def emit(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), name)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), emit
