"""Levels of a byte or four bits as the floats that they stand for, times a scale of each column."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pagellm.kernels.simd.llvm import (
    HALF_VECTOR,
    I64,
    INT_VECTOR,
    LANES,
    SHORT_PAIRS,
    SHORT_VECTOR,
    VECTOR,
    element_pointer,
    float_splat,
    host_has,
    int_splat,
    load_at,
    store_at,
)
from pagellm.kernels.simd.tiles import add_product, float_row, literal
from pagellm.kernels.simd.vectors import from_float16

_BLOCK_WORDS = 8  # of four inputs


def _values(builder: Any, convert: Callable[..., Any], source: Any, scales: list[Any], num_bits: int) -> Any:
    """Emits a block: of each of its words of four inputs in turn, (word, vector of columns, four floats).

    source: the rows of its plane; scales: of each vector of columns. `convert(builder, words, field, scale)`
    makes of the `field`-th levels from below of each word's bytes, from the lowest byte on, the floats.
    """
    num_vectors = len(scales)
    for word in range(_BLOCK_WORDS):
        for v, scale in enumerate(scales):
            words = load_at(builder, source, INT_VECTOR, (word % num_bits * num_vectors + v) * LANES)
            yield word, v, convert(builder, words, word // num_bits, scale)


def _load_scales(builder: Any, pointer: Any, num_vectors: int) -> list[Any]:
    return [load_at(builder, pointer, VECTOR, v * LANES) for v in range(num_vectors)]


def _expand_floats(num_bits: int, convert: Callable[..., Any]) -> Any:
    """The body of an intrinsic `(vectors, w, w_at, scales, out, out_at)` for a block of levels of these bits.

    w: the rows of the block's plane, from word `w_at` on, as kernels.packing has them, and the columns'
    scales, from word `scales` on; out: a row of floats for each of the 32 inputs. convert: of `_values`.
    """

    def intrinsic_of(
        _typing: Any, vectors: Any, w: Any, w_at: Any, scales: Any, out: Any, out_at: Any
    ) -> Any:
        num_vectors = literal(vectors)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, w_value, w_index, scales_index, out_value, out_index = arguments
            size = num_vectors * LANES
            source = element_pointer(
                context, builder, signature.args[1], w_value, w_index, count=num_bits * size
            )
            factors = element_pointer(context, builder, signature.args[1], w_value, scales_index, count=size)
            target = element_pointer(
                context, builder, signature.args[4], out_value, out_index, count=32 * size
            )
            loaded = _load_scales(builder, factors, num_vectors)
            for word, v, values in _values(builder, convert, source, loaded, num_bits):
                for byte, value in enumerate(values):
                    store_at(builder, target, value, ((4 * word + byte) * num_vectors + v) * LANES)
            return context.get_dummy_value()

        return types.void(vectors, w, types.intp, types.intp, out, types.intp), emit

    return intrinsic_of


def _dot_floats(num_bits: int, convert: Callable[..., Any]) -> Any:
    """The body of an intrinsic `(tile, x, x_at, stride, w, w_at, scales)`: a row times a block of levels.

    Adds to the row's sums its 32 inputs times the floats that `_expand_floats` would write, one after the
    other. x: 16 of the inputs begin at word `x_at`, the others `stride` further, a compile-time constant.
    """

    def intrinsic_of(
        _typing: Any, tile: Any, x: Any, x_at: Any, stride: Any, w: Any, w_at: Any, scales: Any
    ) -> Any:
        num_vectors, distance = tile.count, literal(stride)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            tile_value, x_value, x_index, _, w_value, w_index, scales_index = arguments
            size = num_vectors * LANES
            inputs = element_pointer(
                context, builder, signature.args[1], x_value, x_index, count=distance + 16
            )
            source = element_pointer(
                context, builder, signature.args[4], w_value, w_index, count=num_bits * size
            )
            factors = element_pointer(context, builder, signature.args[4], w_value, scales_index, count=size)
            sums = [builder.extract_value(tile_value, v) for v in range(num_vectors)]
            loaded = _load_scales(builder, factors, num_vectors)
            for word, v, values in _values(builder, convert, source, loaded, num_bits):
                for byte, value in enumerate(values):
                    place = 4 * word + byte
                    pointer = builder.gep(inputs, [I64(place // 16 * distance + place % 16)])
                    sums[v] = add_product(builder, float_row(builder, pointer), value, sums[v])
            return context.make_tuple(builder, signature.return_type, sums)

        return tile(tile, x, types.intp, stride, w, types.intp, types.intp), emit

    return intrinsic_of


def _from_e4m3(builder: Any, words: Any, _field: int, scale: Any) -> list[Any]:
    # Its sign, and its exponent and mantissa one bit lower, are a float16 of 2^-8 times the value. Bytes 0
    # and 2 of a word become a pair of these, and bytes 1 and 3.
    scale = builder.fmul(scale, float_splat(256.0))
    pairs = builder.bitcast(words, SHORT_PAIRS)
    values = []
    for tops in (builder.shl(pairs, _shorts(8)), pairs):
        halves = builder.and_(builder.ashr(tops, _shorts(1)), _shorts(0xBF80 - (1 << 16)))
        halves = builder.bitcast(halves, INT_VECTOR)
        for both in (halves, builder.lshr(halves, int_splat(16))):
            one = builder.bitcast(builder.trunc(both, SHORT_VECTOR), HALF_VECTOR)
            values.append(builder.fmul(from_float16(builder, one), scale))
    first, third, second, fourth = values
    return [first, second, third, fourth]


def _shorts(value: int) -> Any:
    return ir.Constant(SHORT_PAIRS, [value] * SHORT_PAIRS.count)


def _from_int8(step: float) -> Callable[..., Any]:
    def convert(builder: Any, words: Any, _field: int, scale: Any) -> list[Any]:
        values = []
        for byte in range(4):
            top = builder.shl(words, int_splat(24 - 8 * byte)) if byte < 3 else words
            value = builder.sitofp(builder.ashr(top, int_splat(24)), VECTOR)
            values.append(builder.fmul(builder.fmul(value, scale), float_splat(step)))
        return values

    return convert


def _from_table(values: tuple[float, ...]) -> Callable[..., Any]:
    def convert(builder: Any, words: Any, field: int, scale: Any) -> list[Any]:
        found = []
        for shift in range(4 * field, 32, 8):
            index = builder.and_(builder.lshr(words, int_splat(shift)), int_splat(15))
            found.append(builder.fmul(_look_up(builder, values, index), scale))
        return found

    return convert


def _look_up(builder: Any, values: tuple[float, ...], indices: Any) -> Any:
    """The float of a table of 16 for each lane."""
    if host_has("avx512f") and LANES == 16:
        kind = ir.FunctionType(VECTOR, [VECTOR, INT_VECTOR])
        name = "llvm.x86.avx512.permvar.sf.512"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, [ir.Constant(VECTOR, list(values)), indices])
    # By halves: each bit of the index chooses one of two.
    choices: list[Any] = [float_splat(value) for value in values]
    for bit in range(4):
        chosen = builder.and_(indices, int_splat(1 << bit))
        chosen = builder.icmp_unsigned("!=", chosen, int_splat(0))
        choices = [
            builder.select(chosen, upper, lower)
            for lower, upper in zip(choices[::2], choices[1::2], strict=True)
        ]
    return choices[0]


def _intrinsics(num_bits: int, convert: Callable[..., Any]) -> tuple[Any, Any]:
    expand_body, dot_body = _expand_floats(num_bits, convert), _dot_floats(num_bits, convert)

    @intrinsic(prefer_literal=True)
    def expand(typing: Any, vectors: Any, w: Any, w_at: Any, scales: Any, out: Any, out_at: Any) -> Any:
        return expand_body(typing, vectors, w, w_at, scales, out, out_at)

    @intrinsic(prefer_literal=True)
    def dot(typing: Any, tile: Any, x: Any, x_at: Any, stride: Any, w: Any, w_at: Any, scales: Any) -> Any:
        return dot_body(typing, tile, x, x_at, stride, w, w_at, scales)

    return expand, dot


def e4m3_intrinsics() -> tuple[Any, Any]:
    """Intrinsics of `_expand_floats` and `_dot_floats` for E4M3 (Micikevicius et al. 2022), numbers alone."""
    return _intrinsics(8, _from_e4m3)


def int8_intrinsics(step: float) -> tuple[Any, Any]:
    """The same for signed bytes, multiplied by a number after their scale."""
    return _intrinsics(8, _from_int8(step))


def float_table_intrinsics(values: tuple[float, ...]) -> tuple[Any, Any]:
    """The same for levels of four bits that stand for these 16 floats."""
    return _intrinsics(4, _from_table(values))
