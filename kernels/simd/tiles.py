"""Register tiles: accumulators that stay in registers while products of float formats are added to them."""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from pagellm.kernels.simd.llvm import (
    BFLOAT_PAIRS,
    F32,
    HALF_VECTOR,
    I32,
    I64,
    INT_VECTOR,
    LANES,
    REGISTERS,
    REGISTERS_PER_VECTOR,
    SHORT_VECTOR,
    VECTOR,
    call_intrinsic,
    element_pointer,
    host_has,
    int_splat,
    load_at,
    splat,
    store_at,
)
from pagellm.kernels.simd.vectors import from_bfloat16, from_float16, int_vector, vector


def literal(value: Any) -> int:
    """The number that an argument's type stands for; raises Numba's `TypingError` if it is no constant."""
    if not isinstance(value, types.IntegerLiteral):
        raise TypingError(f"expected a compile-time constant, found {value}")
    return int(value.literal_value)


@intrinsic(prefer_literal=True)
def start_tile(_typing: Any, rows: Any, vectors: Any, first_row: Any, index: Any) -> Any:
    """A register tile: a tuple of rows * vectors accumulators, row-major, both counts compile-time constants.

    Every row starts as the `vectors` vectors of `first_row` from `index` on (a bias, say).
    """
    num_rows, num_vectors = literal(rows), literal(vectors)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row_words = num_vectors * LANES
        pointer = element_pointer(context, builder, signature.args[2], *arguments[2:4], count=row_words)
        row = [load_at(builder, pointer, VECTOR, v * LANES) for v in range(num_vectors)]
        return context.make_tuple(builder, signature.return_type, row * num_rows)

    tile = types.UniTuple(vector, num_rows * num_vectors)
    return tile(rows, vectors, first_row, types.intp), emit


@intrinsic(prefer_literal=True)
def load_tile(_typing: Any, rows: Any, vectors: Any, array: Any, index: Any, stride: Any) -> Any:
    """Like `start_tile`, where each row has its own start: rows from `index` on, `stride` floats apart."""
    num_rows, num_vectors = literal(rows), literal(vectors)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, array_value, index_value, stride_value = arguments
        read = builder.add(builder.mul(stride_value, I64(num_rows - 1)), I64(num_vectors * LANES))
        pointer = element_pointer(context, builder, signature.args[2], array_value, index_value, count=read)
        values = []
        for _row in range(num_rows):
            values += [load_at(builder, pointer, VECTOR, v * LANES) for v in range(num_vectors)]
            pointer = builder.gep(pointer, [stride_value])
        return context.make_tuple(builder, signature.return_type, values)

    tile = types.UniTuple(vector, num_rows * num_vectors)
    return tile(rows, vectors, array, types.intp, types.intp), emit


@intrinsic(prefer_literal=True)
def write_tile(_typing: Any, tile: Any, rows: Any, out: Any, index: Any, stride: Any, accumulate: Any) -> Any:
    """Writes a register tile's rows to `out` from `index` on, `stride` floats apart, or adds them there."""
    num_rows = literal(rows)
    num_vectors = tile.count // num_rows

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_value, _, out_value, index_value, stride_value, accumulates = arguments
        last_row = builder.mul(stride_value, I64(num_rows - 1))
        written = builder.add(last_row, I64(num_vectors * LANES))
        start = element_pointer(context, builder, signature.args[2], out_value, index_value, count=written)

        def write(adds: bool) -> None:
            pointer = start
            for row in range(num_rows):
                for v in range(num_vectors):
                    value = builder.extract_value(tile_value, row * num_vectors + v)
                    if adds:
                        value = builder.fadd(load_at(builder, pointer, VECTOR, v * LANES), value)
                    store_at(builder, pointer, value, v * LANES)
                pointer = builder.gep(pointer, [stride_value])

        with builder.if_else(accumulates) as (add, replace):
            with add:
                write(adds=True)
            with replace:
                write(adds=False)
        return context.get_dummy_value()

    return types.void(tile, rows, out, types.intp, types.intp, types.boolean), emit


@intrinsic
def transposed(_typing: Any, tile: Any) -> Any:
    """A tile of `LANES` rows of one vector with lane i of row j as lane j of row i."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = [builder.extract_value(arguments[0], i) for i in range(LANES)]
        # Each round moves the highest bit of a lane's (row, column) to the lowest place.
        for _ in range(LANES.bit_length() - 1):
            pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
            rows = [
                builder.shuffle_vector(first, second, _zip_mask(half))
                for first, second in pairs
                for half in (0, 1)
            ]
        return context.make_tuple(builder, signature.return_type, rows)

    return tile(tile), emit


def _zip_mask(half: int) -> Any:
    """The lower or the upper lanes of two vectors in turns."""
    first = half * LANES // 2
    lanes = [first + lane // 2 + lane % 2 * LANES for lane in range(LANES)]
    return ir.Constant(ir.VectorType(I32, LANES), lanes)


class Step(NamedTuple):
    """One of the products that `tile_update` adds to every accumulator."""

    load_row: Any  # (builder, pointer): what a row has in common
    load_column: Any  # (builder, pointer, v): what the v-th vector of columns has in common
    multiply_add: Any  # (builder, row, column, accumulator): joins them
    row_words: int = 1  # how many words from a row's pointer on the step reads up to
    column_words: int = LANES  # of each vector of columns


def tile_update(*steps: Step) -> Any:
    """The body of an intrinsic `(tile, rows, x, x_index, x_stride, w, w_index)` that updates a register tile.

    A tile that leaves too few registers for all columns of all steps meets them one by one. `w_index` is
    where the first vector of columns begins, with the others behind it, or a tuple of where each begins.
    `rows` and `x_stride` are compile-time constants, so the reads of all rows need a single address register;
    with a stride known only at run time the accumulators spill.
    """

    def intrinsic_of(
        _typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
    ) -> Any:
        num_rows, stride = literal(rows), literal(x_stride)
        num_vectors = tile.count // num_rows
        apart = isinstance(w_index, types.UniTuple)
        place = types.UniTuple(types.intp, num_vectors) if apart else types.intp
        accumulators = tile.count * (2 if tile.dtype == int_vector else 1)  # the scaled sums are floats
        registers = (accumulators + num_vectors * len(steps)) * REGISTERS_PER_VECTOR + 1
        at_once = num_vectors if registers <= REGISTERS else 1

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            tile_value, _, x_value, x_at, _, w_value, w_at = arguments
            x_words = (num_rows - 1) * stride + max(step.row_words for step in steps)
            x_pointer = element_pointer(context, builder, signature.args[2], x_value, x_at, count=x_words)
            w_words = max(step.column_words for step in steps) * (1 if apart else num_vectors)
            indices = [builder.extract_value(w_at, v) if apart else w_at for v in range(num_vectors)]
            w_pointers = [
                element_pointer(context, builder, signature.args[5], w_value, index, count=w_words)
                for index in indices
            ]
            accumulators = [builder.extract_value(tile_value, i) for i in range(tile.count)]
            parts = [(step, first) for step in steps for first in range(0, num_vectors, at_once)]
            for part, (step, first) in enumerate(parts):
                if part > 0 and registers > REGISTERS:  # what is behind this is not read before it
                    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
                columns = {
                    v: step.load_column(builder, w_pointers[v], 0 if apart else v)
                    for v in range(first, first + at_once)
                }
                for row in range(num_rows):
                    factor = step.load_row(builder, builder.gep(x_pointer, [I64(row * stride)]))
                    for v, column in columns.items():
                        i = row * num_vectors + v
                        accumulators[i] = step.multiply_add(builder, factor, column, accumulators[i])
            return context.make_tuple(builder, signature.return_type, accumulators)

        return tile(tile, rows, x, types.intp, x_stride, w, place), emit

    return intrinsic_of


def float_row(builder: Any, pointer: Any) -> Any:
    """The `load_row` of a `Step` for floats: one, in all lanes."""
    return splat(builder, builder.load(pointer))


def add_product(builder: Any, row: Any, column: Any, accumulator: Any) -> Any:
    """The `multiply_add` of a `Step` for floats."""
    return call_intrinsic(builder, "fmuladd", [row, column, accumulator])


@intrinsic(prefer_literal=True)
def outer_product(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """`tile[r][v] + x[x_index + r * x_stride] * w[w_index + v * LANES ...]`: one rank-1 update.

    `tile` is a tuple of rows * V vectors, row-major; see `tile_update`.
    """
    update = tile_update(Step(float_row, lambda b, w, v: load_at(b, w, VECTOR, v * LANES), add_product))
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)


@intrinsic(prefer_literal=True)
def outer_product_float16(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """Like `outer_product`, where the words of `w` hold two float16 each."""

    def load_column(builder: Any, pointer: Any, v: int) -> Any:
        return from_float16(builder, load_at(builder, pointer, HALF_VECTOR, v * LANES // 2))

    update = tile_update(Step(float_row, load_column, add_product, column_words=LANES // 2))
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)


@intrinsic(prefer_literal=True)
def outer_product_bfloat16(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """Like `outer_product`, where the words of `w` hold two bfloat16 each."""

    def load_column(builder: Any, pointer: Any, v: int) -> Any:
        return from_bfloat16(builder, load_at(builder, pointer, SHORT_VECTOR, v * LANES // 2))

    update = tile_update(Step(float_row, load_column, add_product, column_words=LANES // 2))
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
            return builder.bitcast(load_at(builder, pointer, INT_VECTOR, v * LANES), BFLOAT_PAIRS)

        def splat_pair(builder: Any, pointer: Any) -> Any:
            return builder.bitcast(splat(builder, load_at(builder, pointer, I32)), BFLOAT_PAIRS)

        def add_products(builder: Any, row: Any, column: Any, accumulator: Any) -> Any:
            kind = ir.FunctionType(VECTOR, [VECTOR, BFLOAT_PAIRS, BFLOAT_PAIRS])
            function = cgutils.get_or_insert_function(
                builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512"
            )
            return builder.call(function, [accumulator, row, column])

        update = tile_update(Step(splat_pair, load_pairs, add_products))
    else:

        def load_low(builder: Any, pointer: Any, v: int) -> Any:
            words = load_at(builder, pointer, INT_VECTOR, v * LANES)
            return builder.bitcast(builder.shl(words, int_splat(16)), VECTOR)

        def load_high(builder: Any, pointer: Any, v: int) -> Any:
            words = load_at(builder, pointer, INT_VECTOR, v * LANES)
            return builder.bitcast(builder.and_(words, int_splat(-65536)), VECTOR)

        def second_row(builder: Any, pointer: Any) -> Any:
            return splat(builder, load_at(builder, pointer, F32, 1))

        update = tile_update(
            Step(float_row, load_low, add_product), Step(second_row, load_high, add_product, row_words=2)
        )
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)
