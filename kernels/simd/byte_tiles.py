"""Register tiles of int32: products of int8 and int4, by the host's own instruction or a portable form."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pagellm.kernels.simd.llvm import (
    HALF_VECTOR,
    I8,
    I32,
    I64,
    INT_VECTOR,
    LANES,
    SHORT_PAIRS,
    VECTOR,
    element_pointer,
    host_has,
    int_splat,
    load_at,
    splat,
)
from pagellm.kernels.simd.tiles import Step, add_product, float_row, literal, tile_update
from pagellm.kernels.simd.vectors import from_float16, int_vector


@intrinsic(prefer_literal=True)
def zero_int_tile(_typing: Any, rows: Any, vectors: Any) -> Any:
    """A register tile of int32 zeros."""
    size = literal(rows) * literal(vectors)

    def emit(context: Any, builder: Any, signature: Any, _arguments: Any) -> Any:
        return context.make_tuple(builder, signature.return_type, [int_splat(0)] * size)

    return types.UniTuple(int_vector, size)(rows, vectors), emit


@intrinsic(prefer_literal=True)
def start_int_tile(_typing: Any, rows: Any, vectors: Any, x: Any, index: Any, stride: Any) -> Any:
    """A register tile of int32: all lanes of a row start as the int32 in word `x[index + row * stride]`."""
    num_rows, num_vectors, row_stride = literal(rows), literal(vectors), literal(stride)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        read = (num_rows - 1) * row_stride + 1
        pointer = element_pointer(context, builder, signature.args[2], *arguments[2:4], count=read)
        values = []
        for row in range(num_rows):
            values += [splat(builder, load_at(builder, pointer, I32, row * row_stride))] * num_vectors
        return context.make_tuple(builder, signature.return_type, values)

    tile = types.UniTuple(int_vector, num_rows * num_vectors)
    return tile(rows, vectors, x, types.intp, stride), emit


def split_call(builder: Any, name: str, parts: int, result: Any, arguments: list[Any]) -> Any:
    """Calls an intrinsic of a machine whose registers hold 1 / `parts` of a vector, part by part."""
    pieces = []
    for part in range(parts):
        taken = []
        for argument in arguments:
            width = argument.type.count // parts
            mask = ir.Constant(ir.VectorType(I32, width), list(range(part * width, (part + 1) * width)))
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
                builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, width), list(range(width))))
            )
        pieces = joined
    return pieces[0]


def first_known(*instructions: tuple[str, str, int]) -> tuple[str, int] | None:
    """Of (feature, intrinsic, parts of a vector) the intrinsic and parts of the first that the host has."""
    return next(((name, parts) for feature, name, parts in instructions if host_has(feature)), None)


_MULTIPLY_PAIRS = first_known(
    ("avx512bw", "llvm.x86.avx512.pmaddw.d.512", 1),
    ("avx2", "llvm.x86.avx2.pmadd.wd", 2),
    ("sse2", "llvm.x86.sse2.pmadd.wd", 4),
)


def _multiply_pairs(builder: Any, a: Any, b: Any) -> Any:
    """a[2i] * b[2i] + a[2i + 1] * b[2i + 1] of int16 lanes, as int32 lanes."""
    if _MULTIPLY_PAIRS is not None:
        name, parts = _MULTIPLY_PAIRS
        operands = [builder.bitcast(a, SHORT_PAIRS), builder.bitcast(b, SHORT_PAIRS)]
        return split_call(builder, name, parts, INT_VECTOR, operands)
    sixteen = int_splat(16)
    low, high = (
        builder.mul(*(builder.ashr(half(value), sixteen) for value in (a, b)))
        for half in (lambda value: builder.shl(value, sixteen), lambda value: value)
    )
    return builder.add(low, high)


_DOT_BYTES = first_known(
    ("avx512vnni", "llvm.x86.avx512.vpdpbusd.512", 1), ("avxvnni", "llvm.x86.avx512.vpdpbusd.256", 2)
)
_ADD_BYTE_PAIRS = first_known(
    ("avx512bw", "llvm.x86.avx512.pmaddubs.w.512", 1),
    ("avx2", "llvm.x86.avx2.pmadd.ub.sw", 2),
    ("ssse3", "llvm.x86.ssse3.pmadd.ub.sw.128", 4),
)
# There is none for 512 bits.
_MOVE_SIGNS = (
    None
    if host_has("avx512bw")
    else first_known(("avx2", "llvm.x86.avx2.psign.b", 2), ("ssse3", "llvm.x86.ssse3.psign.b.128", 4))
)
_MULTIPLIES_MAGNITUDES = _DOT_BYTES is None and _MOVE_SIGNS is not None
# What the weights of `dot_int8` hold too much: most instructions take one of their operands unsigned.
INT8_OFFSET = 0 if _MULTIPLIES_MAGNITUDES else 128


def _byte_instruction(builder: Any, instruction: tuple[str, int], kind: Any, a: Any, b: Any) -> Any:
    name, parts = instruction
    bytes = ir.VectorType(I8, 4 * LANES)
    return split_call(builder, name, parts, kind, [builder.bitcast(a, bytes), builder.bitcast(b, bytes)])


def _add_byte_pairs(builder: Any, unsigned: Any, signed: Any) -> Any:
    """The products of unsigned and signed bytes, two neighbours added in an int16 that must hold them."""
    assert _ADD_BYTE_PAIRS is not None
    return _byte_instruction(builder, _ADD_BYTE_PAIRS, SHORT_PAIRS, unsigned, signed)


def _add_short_pairs(builder: Any, accumulator: Any, shorts: Any) -> Any:
    """accumulator + the two int16 of each lane."""
    ones = ir.Constant(shorts.type, [1] * shorts.type.count)
    return builder.add(accumulator, _multiply_pairs(builder, shorts, ones))


def _dot_bytes(builder: Any, unsigned: Any, signed: Any, accumulator: Any) -> Any:
    """accumulator + the four products of each lane's bytes, exact in int32."""
    if _DOT_BYTES is not None:
        name, parts = _DOT_BYTES
        return split_call(builder, name, parts, INT_VECTOR, [accumulator, unsigned, signed])
    eight = ir.Constant(SHORT_PAIRS, [8] * 2 * LANES)
    even, odd = (
        builder.and_(value, int_splat(0x00FF00FF))
        for value in (unsigned, builder.lshr(unsigned, int_splat(8)))
    )
    signed = builder.bitcast(signed, SHORT_PAIRS)
    signed_even = builder.ashr(builder.shl(signed, eight), eight)
    signed_odd = builder.ashr(signed, eight)
    for a, b in ((even, signed_even), (odd, signed_odd)):
        products = _multiply_pairs(builder, a, builder.bitcast(b, INT_VECTOR))
        accumulator = builder.add(accumulator, products)
    return accumulator


def _int_row(builder: Any, pointer: Any) -> Any:
    return splat(builder, load_at(builder, pointer, I32))


def int8_weights(builder: Any, words: Any) -> Any:
    """Words of weights as `add_int8_products` takes them: uint8, or int8 if `INT8_OFFSET` is 0."""
    if not _MULTIPLIES_MAGNITUDES:
        return words
    bytes = builder.bitcast(words, ir.VectorType(I8, 4 * LANES))
    negative = builder.icmp_signed("<", bytes, ir.Constant(bytes.type, [0] * 4 * LANES))
    return builder.select(negative, builder.neg(bytes), bytes), bytes


def add_int8_products(builder: Any, row: Any, weights: Any, accumulator: Any) -> Any:
    """accumulator + the four products of each lane's int8 of `row`, never -128, and of `int8_weights`."""
    if not _MULTIPLIES_MAGNITUDES:
        return _dot_bytes(builder, weights, row, accumulator)
    # |w| * (x with the sign of w): at most 2 * 128 * 127 for two neighbours, which an int16 holds.
    magnitudes, bytes = weights
    assert _MOVE_SIGNS is not None
    signed = _byte_instruction(builder, _MOVE_SIGNS, bytes.type, row, bytes)
    return _add_short_pairs(builder, accumulator, _add_byte_pairs(builder, magnitudes, signed))


@intrinsic(prefer_literal=True)
def dot_int8(
    typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """Adds to each int32 lane the four products of a word of `x` and one of `w`.

    `x` is int8 and never -128; `w` is uint8, or int8 if `INT8_OFFSET` is 0.
    """

    def load_weights(builder: Any, pointer: Any, v: int) -> Any:
        return int8_weights(builder, load_at(builder, pointer, INT_VECTOR, v * LANES))

    update = tile_update(Step(_int_row, load_weights, add_int8_products))
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
        return builder.and_(load_at(builder, pointer, INT_VECTOR, v * LANES), int_splat(0x0F0F0F0F))

    def high_nibbles(builder: Any, pointer: Any, v: int) -> Any:
        words = load_at(builder, pointer, INT_VECTOR, v * LANES)
        return builder.and_(builder.lshr(words, int_splat(4)), int_splat(0x0F0F0F0F))

    def fourth_word(builder: Any, pointer: Any) -> Any:
        return splat(builder, load_at(builder, pointer, I32, 4))

    def add_products(builder: Any, row: Any, column: Any, accumulator: Any) -> Any:
        if INT4_PAIRS:
            pairs = builder.bitcast(accumulator, SHORT_PAIRS)
            return builder.bitcast(builder.add(pairs, _add_byte_pairs(builder, column, row)), INT_VECTOR)
        return _dot_bytes(builder, column, row, accumulator)

    update = tile_update(
        Step(_int_row, low_nibbles, add_products),
        Step(fourth_word, high_nibbles, add_products, row_words=5),
    )
    return update(typing, tile, rows, x, x_index, x_stride, w, w_index)


@intrinsic
def int4_sums(_typing: Any, tile: Any) -> Any:
    """The int32 sums of a tile that `dot_int4` has added up."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not INT4_PAIRS:
            return arguments[0]
        ones = ir.Constant(SHORT_PAIRS, [1] * 2 * LANES)
        lanes = [builder.extract_value(arguments[0], i) for i in range(tile.count)]
        sums = [_multiply_pairs(builder, lane, ones) for lane in lanes]
        return context.make_tuple(builder, signature.return_type, sums)

    return tile(tile), emit


def _scaled_update(load_scales: Any, scale_words: int) -> Any:
    """The body of an intrinsic that adds scaled integers to a tile; a vector of scales has so many words."""

    def intrinsic_of(
        _typing: Any, tile: Any, ints: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any,
        w_index: Any
    ) -> Any:  # fmt: skip
        num_rows, stride = literal(rows), literal(x_stride)
        num_vectors = tile.count // num_rows

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            accumulators, int_values, _, x_value, x_at, _, w_value, w_at = arguments
            x_words, w_words = (num_rows - 1) * stride + 1, num_vectors * scale_words
            x_pointer = element_pointer(context, builder, signature.args[3], x_value, x_at, count=x_words)
            w_pointer = element_pointer(context, builder, signature.args[6], w_value, w_at, count=w_words)
            scales = [load_scales(builder, w_pointer, v * scale_words) for v in range(num_vectors)]
            updated = []
            for row in range(num_rows):
                factor = float_row(builder, builder.gep(x_pointer, [I64(row * stride)]))
                for v in range(num_vectors):
                    position = row * num_vectors + v
                    value = builder.sitofp(builder.extract_value(int_values, position), VECTOR)
                    accumulator = builder.extract_value(accumulators, position)
                    updated.append(add_product(builder, value, builder.fmul(factor, scales[v]), accumulator))
            return context.make_tuple(builder, signature.return_type, updated)

        return tile(tile, ints, rows, x, types.intp, x_stride, w, types.intp), emit

    return intrinsic_of


@intrinsic(prefer_literal=True)
def add_scaled(
    typing: Any, tile: Any, ints: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """`tile[r][v] + float(ints[r][v]) * (x[x_index + r * x_stride] * w[w_index + v * LANES ...])`."""
    update = _scaled_update(lambda builder, w, word: load_at(builder, w, VECTOR, word), LANES)
    return update(typing, tile, ints, rows, x, x_index, x_stride, w, w_index)


@intrinsic(prefer_literal=True)
def add_scaled_float16(
    typing: Any, tile: Any, ints: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
) -> Any:
    """Like `add_scaled`, where the words of `w` hold two float16 each."""

    def load_scales(builder: Any, pointer: Any, word: int) -> Any:
        return from_float16(builder, load_at(builder, pointer, HALF_VECTOR, word))

    update = _scaled_update(load_scales, LANES // 2)
    return update(typing, tile, ints, rows, x, x_index, x_stride, w, w_index)
