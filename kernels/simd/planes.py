"""Levels of few bits, in planes, as the bytes that `dot_int8` multiplies; short scales as floats."""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pagellm.kernels.simd.byte_tiles import (
    INT8_OFFSET,
    add_int8_products,
    first_known,
    int8_weights,
    split_call,
)
from pagellm.kernels.simd.llvm import (
    HALF_VECTOR,
    I8,
    I32,
    INT_VECTOR,
    LANES,
    VECTOR,
    element_pointer,
    int_splat,
    load_at,
    require_float32,
    splat,
    store_at,
)
from pagellm.kernels.simd.tiles import literal
from pagellm.kernels.simd.vectors import from_float16, vector

_BYTES = ir.VectorType(I8, 4 * LANES)
_BLOCK_WORDS = 8  # of a block of 32 bytes


@intrinsic
def load_float16(_typing: Any, array: Any, index: Any) -> Any:
    """`LANES` float16 from word `index` on, as floats."""
    require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments, count=LANES // 2)
        return from_float16(builder, load_at(builder, pointer, HALF_VECTOR))

    return vector(array, types.intp), emit


def _load_bytes(convert: Any) -> Any:
    """The body of an intrinsic that reads `LANES` bytes, widened to int32 by `convert`, as floats."""

    def intrinsic_of(_typing: Any, array: Any, index: Any) -> Any:
        require_float32(array)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = element_pointer(context, builder, signature.args[0], *arguments, count=LANES // 4)
            bytes = load_at(builder, pointer, ir.VectorType(I8, LANES))
            return builder.sitofp(convert(builder, bytes), VECTOR)

        return vector(array, types.intp), emit

    return intrinsic_of


@intrinsic
def load_int8(typing: Any, array: Any, index: Any) -> Any:
    """`LANES` int8 from word `index` on, as floats."""
    return _load_bytes(lambda builder, bytes: builder.sext(bytes, INT_VECTOR))(typing, array, index)


@intrinsic
def load_low_nibbles(typing: Any, array: Any, index: Any) -> Any:
    """The lower four bits of `LANES` bytes from word `index` on, as floats."""

    def convert(builder: Any, bytes: Any) -> Any:
        return builder.and_(builder.zext(bytes, INT_VECTOR), int_splat(15))

    return _load_bytes(convert)(typing, array, index)


@intrinsic
def load_high_nibbles(typing: Any, array: Any, index: Any) -> Any:
    """The upper four bits of `LANES` bytes from word `index` on, as floats."""

    def convert(builder: Any, bytes: Any) -> Any:
        return builder.lshr(builder.zext(bytes, INT_VECTOR), int_splat(4))

    return _load_bytes(convert)(typing, array, index)


@intrinsic
def load_powers(_typing: Any, array: Any, index: Any) -> Any:
    """2 to the power of (e - 128) for `LANES` bytes e from word `index` on; the least two are subnormal."""
    require_float32(array)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments, count=LANES // 4)
        exponent = builder.zext(load_at(builder, pointer, ir.VectorType(I8, LANES)), INT_VECTOR)
        is_subnormal = builder.icmp_signed("<", exponent, int_splat(2))
        normal = builder.shl(builder.sub(exponent, int_splat(1)), int_splat(23))
        subnormal = builder.add(builder.shl(exponent, int_splat(21)), int_splat(1 << 21))
        return builder.bitcast(builder.select(is_subnormal, subnormal, normal), VECTOR)

    return vector(array, types.intp), emit


def _plane_bits(builder: Any, words: list[Any], num_bits: int, word: int, position: int) -> Any:
    """What a plane of `num_bits` bits has for input word `word`, moved up to bit `position` of each byte."""
    mask = ((1 << num_bits) - 1 << position) * 0x01010101
    distance = word // num_bits * num_bits - position
    value = words[word % num_bits]
    if distance > 0:
        value = builder.lshr(value, int_splat(distance))
    elif distance < 0:
        value = builder.shl(value, int_splat(-distance))
    return builder.and_(value, int_splat(mask))


def _load_planes(builder: Any, source: Any, num_planes: int, num_vectors: int, v: int) -> list[Any]:
    """The rows of a block's planes, for the v-th vector of columns."""
    return [
        load_at(builder, source, INT_VECTOR, (row * num_vectors + v) * LANES) for row in range(num_planes)
    ]


def _levels(builder: Any, planes: list[Any], low_bits: int, high_bits: int, word: int) -> Any:
    """The levels of input word `word`, a byte each."""
    levels = _plane_bits(builder, planes[:low_bits], low_bits, word, 0)
    if high_bits:
        levels = builder.or_(levels, _plane_bits(builder, planes[low_bits:], high_bits, word, low_bits))
    return levels


def _less(builder: Any, zero: Any) -> Any:
    """What makes of levels the bytes that `dot_int8` multiplies, less the int64 `zero` each."""
    added = builder.and_(builder.sub(I32(INT8_OFFSET), builder.trunc(zero, I32)), I32(0xFF))
    added = builder.bitcast(splat(builder, builder.mul(added, I32(0x01010101))), _BYTES)

    def convert(builder: Any, levels: Any, _v: int) -> Any:
        return builder.bitcast(builder.add(builder.bitcast(levels, _BYTES), added), INT_VECTOR)

    return convert


def _less_zeros(builder: Any, zeros: Any, num_vectors: int) -> Any:
    """Like `_less`, where each column has its own zero: bytes, one after the other, from `zeros` on."""
    added = []
    for v in range(num_vectors):
        bytes = load_at(builder, zeros, ir.VectorType(I8, LANES), v * LANES // 4)
        less = builder.sub(int_splat(INT8_OFFSET), builder.zext(bytes, INT_VECTOR))
        less = builder.mul(builder.and_(less, int_splat(0xFF)), int_splat(0x01010101))
        added.append(builder.bitcast(less, _BYTES))

    def convert(builder: Any, levels: Any, v: int) -> Any:
        return builder.bitcast(builder.add(builder.bitcast(levels, _BYTES), added[v]), INT_VECTOR)

    return convert


def _expand(low_bits: int, high_bits: int, num_vectors: int, convert: Any) -> Any:
    """Emits a block of `num_vectors` vectors of columns: `convert(builder, levels, v)` of each word."""

    def emit(builder: Any, source: Any, target: Any) -> None:
        for v in range(num_vectors):
            planes = _load_planes(builder, source, low_bits + high_bits, num_vectors, v)
            for word in range(_BLOCK_WORDS):
                levels = _levels(builder, planes, low_bits, high_bits, word)
                store_at(builder, target, convert(builder, levels, v), (word * num_vectors + v) * LANES)

    return emit


def _dot(low_bits: int, high_bits: int, convert: Any, tile: Any, literals: tuple[Any, ...]) -> Any:
    """Emits the products of some words of a block: `convert(builder, levels, v)` of each, times those of `x`.

    literals: the rows of the tile, the words between rows of `x`, the first word and their number.
    """
    num_rows, stride, first_word, num_words = (literal(value) for value in literals)
    num_vectors, num_planes = tile.count // num_rows, low_bits + high_bits

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_value, x_value, x_at, w_value, w_at = arguments
        x_words = (num_rows - 1) * stride + first_word + num_words
        x_pointer = element_pointer(context, builder, signature.args[2], x_value, x_at, count=x_words)
        w_words = num_planes * num_vectors * LANES
        source = element_pointer(context, builder, signature.args[5], w_value, w_at, count=w_words)
        planes = [_load_planes(builder, source, num_planes, num_vectors, v) for v in range(num_vectors)]
        sums = [builder.extract_value(tile_value, i) for i in range(tile.count)]
        for word in range(first_word, first_word + num_words):
            weights = []
            for v in range(num_vectors):
                levels = _levels(builder, planes[v], low_bits, high_bits, word)
                weights.append(int8_weights(builder, convert(builder, levels, v)))
            for row in range(num_rows):
                inputs = splat(builder, load_at(builder, x_pointer, I32, row * stride + word))
                for v in range(num_vectors):
                    i = row * num_vectors + v
                    sums[i] = add_int8_products(builder, inputs, weights[v], sums[i])
        return context.make_tuple(builder, signature.return_type, sums)

    return emit


@intrinsic(prefer_literal=True)
def dot_levels(
    _typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any,
    low_bits: Any, high_bits: Any, zero: Any, first: Any, words: Any
) -> Any:  # fmt: skip
    """Like `dot_int8` for `words` of the eight words of a block, from word `first` on, in planes.

    x: the block's words begin at `x_index`; w: its planes begin at `w_index`, as kernels.packing has them,
    levels which all hold `zero` too much; low_bits, high_bits (or 0), first and words are compile-time
    constants, as `rows` and `x_stride` are.
    """
    low, high = literal(low_bits), literal(high_bits)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        convert = _less(builder, arguments[9])
        emit_dot = _dot(low, high, convert, tile, (rows, x_stride, first, words))
        return emit_dot(context, builder, signature, (arguments[0], *arguments[2:4], *arguments[5:7]))

    signature = tile(
        tile, rows, x, types.intp, x_stride, w, types.intp, low_bits, high_bits, types.int64, first, words
    )  # fmt: skip
    return signature, emit


@intrinsic(prefer_literal=True)
def expand_levels(
    _typing: Any, low_bits: Any, high_bits: Any, vectors: Any, w: Any, w_at: Any, zero: Any, out: Any,
    out_at: Any
) -> Any:  # fmt: skip
    """Writes a block of levels, less `zero` each, as 8 rows of `vectors` vectors of bytes for `dot_int8`.

    w: the rows of the planes, from word `w_at` on, as kernels.packing has them; low_bits, high_bits (or 0)
    and vectors are compile-time constants.
    """
    low, high, num_vectors = literal(low_bits), literal(high_bits), literal(vectors)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w_value, w_index, zero_value, out_value, out_index = arguments[3:]
        convert = _less(builder, zero_value)
        words = (low + high) * num_vectors * LANES
        source = element_pointer(context, builder, signature.args[3], w_value, w_index, count=words)
        words = _BLOCK_WORDS * num_vectors * LANES
        target = element_pointer(context, builder, signature.args[6], out_value, out_index, count=words)
        _expand(low, high, num_vectors, convert)(builder, source, target)
        return context.get_dummy_value()

    signature = types.void(low_bits, high_bits, vectors, w, types.intp, types.int64, out, types.intp)
    return signature, emit


@intrinsic(prefer_literal=True)
def dot_nibbles(
    _typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any, zeros: Any
) -> Any:
    """Like `dot_levels` for all words of a block of levels of four bits, less the zero of each column.

    zeros: the word of `w` from which on the columns' zeros are, a byte each.
    """
    all_words = types.IntegerLiteral(0), types.IntegerLiteral(_BLOCK_WORDS)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        num_vectors = tile.count // literal(rows)
        place = element_pointer(
            context, builder, signature.args[5], arguments[5], arguments[7], count=num_vectors * LANES // 4
        )
        convert = _less_zeros(builder, place, num_vectors)
        emit_dot = _dot(4, 0, convert, tile, (rows, x_stride, *all_words))
        return emit_dot(context, builder, signature, (arguments[0], *arguments[2:4], *arguments[5:7]))

    return tile(tile, rows, x, types.intp, x_stride, w, types.intp, types.intp), emit


@intrinsic(prefer_literal=True)
def expand_nibbles(_typing: Any, vectors: Any, w: Any, w_at: Any, zeros: Any, out: Any, out_at: Any) -> Any:
    """Like `expand_levels` for levels of four bits, less the zero of each column: see `dot_nibbles`."""
    num_vectors = literal(vectors)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, w_value, w_index, zeros_index, out_value, out_index = arguments
        place = element_pointer(
            context, builder, signature.args[1], w_value, zeros_index, count=num_vectors * LANES // 4
        )
        convert = _less_zeros(builder, place, num_vectors)
        words = 4 * num_vectors * LANES
        source = element_pointer(context, builder, signature.args[1], w_value, w_index, count=words)
        target = element_pointer(context, builder, signature.args[4], out_value, out_index, count=2 * words)
        _expand(4, 0, num_vectors, convert)(builder, source, target)
        return context.get_dummy_value()

    return types.void(vectors, w, types.intp, types.intp, out, types.intp), emit


_SHUFFLE_BYTES = first_known(
    ("avx512bw", "llvm.x86.avx512.pshuf.b.512", 1),
    ("avx2", "llvm.x86.avx2.pshuf.b", 2),
    ("ssse3", "llvm.x86.ssse3.pshuf.b.128", 4),
)
_IS_ARM = binding.get_process_triple().startswith(("aarch64", "arm64"))


def _look_up(builder: Any, table: list[int], nibbles: Any) -> Any:
    """The byte of a table of 16 for each byte from 0 to 15, in the lanes of a vector."""
    indices = builder.bitcast(nibbles, _BYTES)
    if _SHUFFLE_BYTES is not None:
        name, parts = _SHUFFLE_BYTES
        constant = ir.Constant(_BYTES, table * (4 * LANES // 16))
        return builder.bitcast(split_call(builder, name, parts, _BYTES, [constant, indices]), INT_VECTOR)
    if _IS_ARM:
        return builder.bitcast(_look_up_by_sixteen(builder, table, indices), INT_VECTOR)
    # By halves: each bit of the index chooses one of two.
    choices: list[Any] = [ir.Constant(_BYTES, [value] * 4 * LANES) for value in table]
    for bit in range(4):
        chosen = builder.and_(indices, ir.Constant(_BYTES, [1 << bit] * 4 * LANES))
        chosen = builder.icmp_unsigned("!=", chosen, ir.Constant(_BYTES, [0] * 4 * LANES))
        choices = [
            builder.select(chosen, upper, lower)
            for lower, upper in zip(choices[::2], choices[1::2], strict=True)
        ]
    return builder.bitcast(choices[0], INT_VECTOR)


def _look_up_by_sixteen(builder: Any, table: list[int], indices: Any) -> Any:
    """`_look_up` by the instruction of 64-bit Arm, which takes 16 bytes."""
    kind = ir.VectorType(I8, 16)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind, kind]), "llvm.aarch64.neon.tbl1.v16i8"
    )
    undefined = ir.Constant(_BYTES, ir.Undefined)
    pieces = []
    for first in range(0, 4 * LANES, 16):
        mask = ir.Constant(ir.VectorType(I32, 16), list(range(first, first + 16)))
        taken = builder.shuffle_vector(indices, undefined, mask)
        pieces.append(builder.call(function, [ir.Constant(kind, table), taken]))
    while len(pieces) > 1:
        width = 2 * pieces[0].type.count
        mask = ir.Constant(ir.VectorType(I32, width), list(range(width)))
        pieces = [
            builder.shuffle_vector(low, high, mask)
            for low, high in zip(pieces[::2], pieces[1::2], strict=True)
        ]
    return pieces[0]


def table_intrinsics(values: tuple[int, ...]) -> tuple[Any, Any]:
    """Intrinsics like `expand_levels` and `dot_levels` for levels that stand for a table's values.

    values: 16 of them, from -127 to 127. The first is `(vectors, w, w_at, out, out_at)`, the second `(tile,
    rows, x, x_index, x_stride, w, w_index)` for all words of a block; w: the rows of one plane of four bits.
    """
    table = [(value + INT8_OFFSET) % 256 for value in values]

    def convert(builder: Any, levels: Any, _v: int) -> Any:
        return _look_up(builder, table, levels)

    @intrinsic(prefer_literal=True)
    def expand(_typing: Any, vectors: Any, w: Any, w_at: Any, out: Any, out_at: Any) -> Any:
        num_vectors = literal(vectors)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, w_value, w_index, out_value, out_index = arguments
            words = 4 * num_vectors * LANES
            source = element_pointer(context, builder, signature.args[1], w_value, w_index, count=words)
            target = element_pointer(
                context, builder, signature.args[3], out_value, out_index, count=2 * words
            )
            _expand(4, 0, num_vectors, convert)(builder, source, target)
            return context.get_dummy_value()

        return types.void(vectors, w, types.intp, out, types.intp), emit

    @intrinsic(prefer_literal=True)
    def dot(
        _typing: Any, tile: Any, rows: Any, x: Any, x_index: Any, x_stride: Any, w: Any, w_index: Any
    ) -> Any:
        all_words = types.IntegerLiteral(0), types.IntegerLiteral(_BLOCK_WORDS)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit_dot = _dot(4, 0, convert, tile, (rows, x_stride, *all_words))
            return emit_dot(context, builder, signature, (arguments[0], *arguments[2:4], *arguments[5:7]))

        return tile(tile, rows, x, types.intp, x_stride, w, types.intp), emit

    return expand, dot
