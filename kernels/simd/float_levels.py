"""Levels of a byte or four bits as the floats that they stand for, times a scale of each column."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pagellm.kernels.simd.llvm import (
    HALF_VECTOR,
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
from pagellm.kernels.simd.tiles import literal
from pagellm.kernels.simd.vectors import from_float16

_BLOCK_WORDS = 8  # of four inputs


def _expand_floats(num_bits: int, convert: Callable[..., Any]) -> Any:
    """The body of an intrinsic `(vectors, w, w_at, scales, out, out_at)` for a block of levels of these bits.

    w: the rows of the block's plane, from word `w_at` on, as kernels.packing has them, and the columns'
    scales, from word `scales` on; out: a row of floats for each of the 32 inputs. `convert(builder, words,
    scale)` makes of each word's levels, from its lowest byte on and of each byte the lower half first, the
    floats, times the scale.
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
            for v in range(num_vectors):
                scale = load_at(builder, factors, VECTOR, v * LANES)
                for row in range(num_bits):
                    words = load_at(builder, source, INT_VECTOR, (row * num_vectors + v) * LANES)
                    values = convert(builder, words, scale)
                    fields = len(values) // 4  # of a byte
                    for i, value in enumerate(values):
                        word = row + i % fields * num_bits
                        store_at(builder, target, value, ((4 * word + i // fields) * num_vectors + v) * LANES)
            return context.get_dummy_value()

        return types.void(vectors, w, types.intp, types.intp, out, types.intp), emit

    return intrinsic_of


def _from_e4m3(builder: Any, words: Any, scale: Any) -> list[Any]:
    # Its sign, and its exponent and mantissa one bit lower, are a float16 of 2^-8 times the value. Bytes 0 and 2
    # of a word become a pair of these, and bytes 1 and 3.
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
    def convert(builder: Any, words: Any, scale: Any) -> list[Any]:
        values = []
        for byte in range(4):
            top = builder.shl(words, int_splat(24 - 8 * byte)) if byte < 3 else words
            value = builder.sitofp(builder.ashr(top, int_splat(24)), VECTOR)
            values.append(builder.fmul(builder.fmul(value, scale), float_splat(step)))
        return values

    return convert


def _from_table(values: tuple[float, ...]) -> Callable[..., Any]:
    def convert(builder: Any, words: Any, scale: Any) -> list[Any]:
        indices = [
            builder.and_(builder.lshr(words, int_splat(shift)), int_splat(15)) for shift in range(0, 32, 4)
        ]
        return [builder.fmul(_look_up(builder, values, index), scale) for index in indices]

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


@intrinsic(prefer_literal=True)
def expand_e4m3(typing: Any, vectors: Any, w: Any, w_at: Any, scales: Any, out: Any, out_at: Any) -> Any:
    """Writes a block of E4M3 floats (Micikevicius et al. 2022), which are numbers: see `_expand_floats`."""
    return _expand_floats(8, _from_e4m3)(typing, vectors, w, w_at, scales, out, out_at)


def expand_int8(step: float) -> Any:
    """An intrinsic like `expand_e4m3` for signed bytes, multiplied by a number after their scale."""

    @intrinsic(prefer_literal=True)
    def expand(typing: Any, vectors: Any, w: Any, w_at: Any, scales: Any, out: Any, out_at: Any) -> Any:
        return _expand_floats(8, _from_int8(step))(typing, vectors, w, w_at, scales, out, out_at)

    return expand


def expand_table(values: tuple[float, ...]) -> Any:
    """An intrinsic like `expand_e4m3` for levels of four bits that stand for these 16 floats."""

    @intrinsic(prefer_literal=True)
    def expand(typing: Any, vectors: Any, w: Any, w_at: Any, scales: Any, out: Any, out_at: Any) -> Any:
        return _expand_floats(4, _from_table(values))(typing, vectors, w, w_at, scales, out, out_at)

    return expand
