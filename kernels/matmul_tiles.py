"""Tiles of a matrix multiplication: a few rows of activations times a panel of weights, in each format.

A tile keeps all of its accumulators in registers. What its height is, and which rows it meets, changes no bit
of an element: see `kernels.matmul`.
"""

from functools import partial
from typing import Any

from pagellm.kernels.expansion import (
    MINIMA,
    PREPARED_WORDS,
    SCALES,
    dot_e4m3,
    dot_float4,
    dot_fp4,
    dot_int8_127,
    dot_nf4,
    dot_table,
    has_halves_apart,
    prepare_scales,
)
from pagellm.kernels.jit import by_height, kernel, plain
from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    CHUNK,
    FLOAT4,
    FLOAT8,
    FLOAT32,
    FP4,
    GROUP,
    INT2,
    INT3_K,
    INT4,
    INT4_K,
    INT4_MIN,
    INT4_ZERO,
    INT4_ZERO_32,
    INT5,
    INT5_K,
    INT6_K,
    INT8,
    INT8_127,
    INT8_ROW,
    INT_CHUNK,
    PANEL,
    SCALE,
    SCALED_FIRST,
    SCALED_SECOND,
    SCALED_SUM,
    START_FIRST,
    START_INT4,
    START_INT8,
    START_SECOND,
    TABLE4,
    TABLE4_K,
    activation_place,
    activation_words,
    block_place,
    block_words,
    halves_place,
    has_minima,
    level_of_zero,
    num_blocks,
    panel_block_words,
    panel_words,
)
from pagellm.kernels.simd import (
    LANES,
    PAIR_WORDS,
    add_scaled,
    add_scaled_float16,
    dot_bfloat16,
    dot_int4,
    dot_int8,
    dot_levels,
    dot_nibbles,
    int4_sums,
    load_tile,
    outer_product,
    outer_product_float16,
    prefetch,
    start_int_tile,
    start_tile,
    write_tile,
    zero_int_tile,
)

_VECTORS = PANEL // LANES
_NEXT_CHUNK = GROUP * CHUNK  # how far behind a chunk of a row its next one begins
# Rows of a tile of 32-bit sums; the integer formats keep two sums an element, so theirs has half as many.
_HEIGHTS = tuple(height for height in (1, 2, 3, 4, 6, 8, 12) if height <= GROUP)
INT_HEIGHTS = tuple(height for height in (1, 2, 3, 4, 6) if height <= max(1, GROUP // 2))
# Rows for which preparing blocks costs more than making bytes of their levels again for each tile.
LEVEL_ROWS = min(4, INT_HEIGHTS[-1])


def _heights(*heights: int) -> tuple[int, ...]:
    """Those of a few heights that tiles of integers have here, the greatest of these among them."""
    return (*(height for height in heights if height < INT_HEIGHTS[-1]), INT_HEIGHTS[-1])


@kernel
def _prefetch_weights(w, at):
    """Asks for a panel's row of words."""
    for v in range(0, PANEL, LANES):
        prefetch(w, at + v)


def _float_tile(product: Any, x_words: int, height: int) -> Any:
    """For formats whose words are inputs: `product` adds what a word of weights and `x_words` of `x` give.

    A kernel for `height` rows [height, K] of each group and a panel [PANEL, K]: see `multiply_panel`.
    """

    @kernel
    def multiply(
        groups, group_words, x, x_at, w, w_at, ahead, step, blocks, words, bias, bias_at, out, out_at,
        out_stride, accumulate
    ):  # fmt: skip
        for _ in range(groups):
            tile = start_tile(height, _VECTORS, bias, bias_at)
            for k in range(blocks * words):
                at = x_at + activation_place(k * x_words)
                _prefetch_weights(w, ahead)
                ahead += step
                tile = product(tile, height, x, at, CHUNK, w, w_at + k * PANEL)
            write_tile(tile, height, out, out_at, out_stride, accumulate)
            x_at += group_words
            out_at += GROUP * out_stride

    return multiply


def _int8_tile(height: int) -> Any:
    """For INT8: see `_float_tile`; `x_at` and `w_at` are where the rows and the panel begin, in words."""

    @kernel
    def multiply(
        groups, group_words, x, x_at, w, w_at, ahead, blocks, words, bias, bias_at, out, out_at, out_stride,
        accumulate
    ):  # fmt: skip
        block_size = panel_words(INT8, BLOCK)
        for _ in range(groups):
            tile = start_tile(height, _VECTORS, bias, bias_at)
            for block in range(blocks):
                at, column = x_at + block * (GROUP * INT_CHUNK), w_at + block * block_size
                ints = start_int_tile(height, _VECTORS, x, at + START_INT8, INT_CHUNK)
                for word in range(words):
                    _prefetch_weights(w, ahead + column)
                    ints = dot_int8(ints, height, x, at + word, INT_CHUNK, w, column)
                    column += PANEL
                tile = add_scaled_float16(tile, ints, height, x, at + SCALE, INT_CHUNK, w, column)
            write_tile(tile, height, out, out_at, out_stride, accumulate)
            x_at += group_words
            out_at += GROUP * out_stride
            ahead = 0

    return multiply


def _int8_row_tile(height: int) -> Any:
    """For INT8_ROW: see `_float_tile`. The sums are integers up to the end: both scales are of all inputs."""

    @kernel
    def multiply(
        groups, group_words, x, x_at, w, w_at, ahead, blocks, words, bias, bias_at, out, out_at, out_stride,
        accumulate
    ):  # fmt: skip
        scales = w_at + halves_place(INT8_ROW, 0)
        for _ in range(groups):
            ints = start_int_tile(height, _VECTORS, x, x_at + START_INT8, INT_CHUNK)
            for block in range(blocks):
                at, column = x_at + block * (GROUP * INT_CHUNK), w_at + block_place(INT8_ROW, block)
                for word in range(words):
                    _prefetch_weights(w, ahead + column)
                    ints = dot_int8(ints, height, x, at + word, INT_CHUNK, w, column)
                    column += PANEL
            tile = start_tile(height, _VECTORS, bias, bias_at)
            tile = add_scaled(tile, ints, height, x, x_at + SCALE, INT_CHUNK, w, scales)
            write_tile(tile, height, out, out_at, out_stride, accumulate)
            x_at += group_words
            out_at += GROUP * out_stride
            ahead = 0

    return multiply


def _int4_tile(height: int) -> Any:
    """For INT4 and, with `minima`, INT4_MIN: see `_float_tile`."""

    @kernel
    def multiply(
        groups, group_words, x, x_at, w, w_at, ahead, blocks, words, bias, bias_at, out, out_at, out_stride,
        accumulate, minima
    ):  # fmt: skip
        block_size = panel_words(INT4_MIN if minima else INT4, BLOCK)
        for _ in range(groups):
            tile = start_tile(height, _VECTORS, bias, bias_at)
            for block in range(blocks):
                at, column = x_at + block * (GROUP * INT_CHUNK), w_at + block * block_size
                if minima:
                    ints = zero_int_tile(height, _VECTORS)
                else:
                    ints = start_int_tile(height, _VECTORS, x, at + START_INT4, INT_CHUNK)
                for word in range(words):
                    _prefetch_weights(w, ahead + column)
                    ints = dot_int4(ints, height, x, at + word, INT_CHUNK, w, column)
                    column += PANEL
                ints = int4_sums(ints)
                tile = add_scaled_float16(tile, ints, height, x, at + SCALE, INT_CHUNK, w, column)
                if minima:
                    column += PANEL // 2
                    tile = outer_product_float16(tile, height, x, at + SCALED_SUM, INT_CHUNK, w, column)
            write_tile(tile, height, out, out_at, out_stride, accumulate)
            x_at += group_words
            out_at += GROUP * out_stride
            ahead = 0

    return multiply


def _int4_k_tile(height: int) -> Any:
    """For INT4_K: see `_float_tile`. A block's scales and minima are made in `scratch`."""

    @kernel
    def multiply(
        groups, group_words, x, x_at, w, w_at, ahead, blocks, words, bias, bias_at, out, out_at, out_stride,
        accumulate, scratch
    ):  # fmt: skip
        for _ in range(groups):
            tile = start_tile(height, _VECTORS, bias, bias_at)
            for block in range(blocks):
                at, column = x_at + block * (GROUP * INT_CHUNK), w_at + block_place(INT4_K, block)
                prepare_scales(INT4_K, w, column, w_at + halves_place(INT4_K, block), scratch, 0)
                ints = zero_int_tile(height, _VECTORS)
                for word in range(words):
                    _prefetch_weights(w, ahead + column)
                    ints = dot_int4(ints, height, x, at + word, INT_CHUNK, w, column)
                    column += PANEL
                ints = int4_sums(ints)
                tile = add_scaled(tile, ints, height, x, at + SCALE, INT_CHUNK, scratch, SCALES)
                tile = outer_product(tile, height, x, at + SCALED_SUM, INT_CHUNK, scratch, MINIMA)
            write_tile(tile, height, out, out_at, out_stride, accumulate)
            x_at += group_words
            out_at += GROUP * out_stride
            ahead = 0

    return multiply


def _prepared_tile(halves: int, minima: bool, height: int) -> Any:
    """For prepared blocks, which have `halves` scales and as many minima or none.

    Adds a run of them to the sums at `start`, rows `start_stride` apart, and writes these to `out`.
    """
    words = 8 // halves

    @kernel
    def multiply(
        groups, group_words, x, x_at, w, blocks, start, start_at, start_stride, out, out_at,
        out_stride, accumulate
    ):  # fmt: skip
        first_start, first_sum = (START_FIRST, SCALED_FIRST) if halves > 1 else (START_INT8, SCALED_SUM)
        for _ in range(groups):
            tile = load_tile(height, _VECTORS, start, start_at, start_stride)
            for block in range(blocks):
                at, column = x_at + block * (GROUP * INT_CHUNK), block * PREPARED_WORDS
                scale, word_at = column + SCALES, at
                for half in range(halves):
                    ints = start_int_tile(height, _VECTORS, x, at + first_start + half, INT_CHUNK)
                    for _word in range(words):
                        ints = dot_int8(ints, height, x, word_at, INT_CHUNK, w, column)
                        column += PANEL
                        word_at += 1
                    tile = add_scaled(tile, ints, height, x, at + SCALE, INT_CHUNK, w, scale)
                    if minima:
                        row = scale + MINIMA - SCALES
                        tile = outer_product(tile, height, x, at + first_sum + half, INT_CHUNK, w, row)
                    scale += PANEL
            write_tile(tile, height, out, out_at, out_stride, accumulate)
            x_at += group_words
            start_at += GROUP * start_stride
            out_at += GROUP * out_stride

    return multiply


def _level_tile(height: int) -> Any:
    """For few rows of any expanded format, whose levels become bytes in registers: see `_float_tile`."""

    @kernel
    def multiply(
        format, x, x_at, w, w_at, ahead, blocks, bias_at, out, out_at, out_stride, accumulate, scratch
    ):  # fmt: skip
        minima, size = has_minima(format), panel_block_words(format)
        zero = level_of_zero(format)
        tile = start_tile(height, _VECTORS, w, bias_at)
        for block in range(blocks):
            at, column = x_at + block * (GROUP * INT_CHUNK), w_at + block_place(format, block)
            for i in range(0, size, LANES):
                prefetch(w, column + ahead + i)
            halves = w_at + halves_place(format, block)
            # Scales are made in half the time where the format is known when this is compiled.
            if format == INT6_K:
                prepare_scales(INT6_K, w, column, halves, scratch, 0)
            elif format == INT5_K:
                prepare_scales(INT5_K, w, column, halves, scratch, 0)
            elif format in (INT5, TABLE4, INT2):  # they are halves in all of these
                prepare_scales(INT5, w, column, halves, scratch, 0)
            elif format == FLOAT4:
                prepare_scales(FLOAT4, w, column, halves, scratch, 0)
            else:
                prepare_scales(format, w, column, halves, scratch, plain(0))
            if has_halves_apart(format):
                ints = start_int_tile(height, _VECTORS, x, at + START_FIRST, INT_CHUNK)
                more = start_int_tile(height, _VECTORS, x, at + START_SECOND, INT_CHUNK)
                if format == INT6_K:
                    ints = dot_levels(ints, height, x, at, INT_CHUNK, w, column, 4, 2, zero, 0, 4)
                    more = dot_levels(more, height, x, at, INT_CHUNK, w, column, 4, 2, zero, 4, 4)
                elif format == INT3_K:
                    ints = dot_levels(ints, height, x, at, INT_CHUNK, w, column, 2, 1, zero, 0, 4)
                    more = dot_levels(more, height, x, at, INT_CHUNK, w, column, 2, 1, zero, 4, 4)
                else:
                    ints = dot_levels(ints, height, x, at, INT_CHUNK, w, column, 2, 0, zero, 0, 4)
                    more = dot_levels(more, height, x, at, INT_CHUNK, w, column, 2, 0, zero, 4, 4)
                tile = add_scaled(tile, ints, height, x, at + SCALE, INT_CHUNK, scratch, SCALES)
                if minima:
                    tile = outer_product(tile, height, x, at + SCALED_FIRST, INT_CHUNK, scratch, MINIMA)
                tile = add_scaled(tile, more, height, x, at + SCALE, INT_CHUNK, scratch, SCALES + PANEL)
                if minima:
                    row = MINIMA + PANEL
                    tile = outer_product(tile, height, x, at + SCALED_SECOND, INT_CHUNK, scratch, row)
            else:
                ints = start_int_tile(height, _VECTORS, x, at + START_INT8, INT_CHUNK)
                if format in (INT4_ZERO, INT4_ZERO_32):
                    zeros = column + block_words(format) * PANEL
                    ints = dot_nibbles(ints, height, x, at, INT_CHUNK, w, column, zeros)
                elif format in (TABLE4, TABLE4_K):
                    ints = dot_table(ints, height, x, at, INT_CHUNK, w, column)
                elif format == FLOAT4:
                    ints = dot_float4(ints, height, x, at, INT_CHUNK, w, column)
                elif format == INT2:
                    ints = dot_levels(ints, height, x, at, INT_CHUNK, w, column, 2, 0, zero, 0, 8)
                else:
                    ints = dot_levels(ints, height, x, at, INT_CHUNK, w, column, 4, 1, zero, 0, 8)
                tile = add_scaled(tile, ints, height, x, at + SCALE, INT_CHUNK, scratch, SCALES)
                if minima:
                    tile = outer_product(tile, height, x, at + SCALED_SUM, INT_CHUNK, scratch, MINIMA)
        write_tile(tile, height, out, out_at, out_stride, accumulate)

    return multiply


def _decoded_tile(height: int) -> Any:
    """For `inputs` rows of floats at the beginning of `w`: see `_prepared_tile`."""

    @kernel
    def multiply(
        groups, group_words, x, x_at, w, inputs, start, start_at, start_stride, out, out_at, out_stride,
        accumulate
    ):  # fmt: skip
        for _ in range(groups):
            tile = load_tile(height, _VECTORS, start, start_at, start_stride)
            for k in range(inputs):
                tile = outer_product(tile, height, x, x_at + activation_place(k), CHUNK, w, k * PANEL)
            write_tile(tile, height, out, out_at, out_stride, accumulate)
            x_at += group_words
            start_at += GROUP * start_stride
            out_at += GROUP * out_stride

    return multiply


@kernel
def multiply_decoded_row(format, x, x_at, w, w_at, ahead, blocks, bias_at, out, out_at, accumulate):
    """One row of a format whose levels become floats, in registers: the chain of `_decoded_tile`."""
    tile = start_tile(1, _VECTORS, w, bias_at)
    for block in range(blocks):
        at, column = x_at + activation_place(block * BLOCK), w_at + block_place(format, block)
        scales = w_at + halves_place(format, block)
        for i in range(0, panel_block_words(format), LANES):
            prefetch(w, column + ahead + i)
        if format == FLOAT8:
            tile = dot_e4m3(tile, x, at, _NEXT_CHUNK, w, column, scales)
        elif format == INT8_127:
            tile = dot_int8_127(tile, x, at, _NEXT_CHUNK, w, column, scales)
        elif format == FP4:
            tile = dot_fp4(tile, x, at, _NEXT_CHUNK, w, column, scales)
        else:
            tile = dot_nf4(tile, x, at, _NEXT_CHUNK, w, column, scales)
    write_tile(tile, 1, out, out_at, PANEL, accumulate)


_multiply_float32 = by_height(_HEIGHTS, partial(_float_tile, outer_product, 1))
_multiply_bfloat16 = by_height(_HEIGHTS, partial(_float_tile, dot_bfloat16, PAIR_WORDS))
_multiply_int8 = by_height(INT_HEIGHTS, _int8_tile)
_multiply_int8_row = by_height(_heights(1, 4, 6), _int8_row_tile)
multiply_decoded = by_height(tuple(sorted({1, min(4, GROUP), GROUP})), _decoded_tile)
_multiply_int4 = by_height(INT_HEIGHTS, _int4_tile)
_multiply_int4_k = by_height(_heights(1, 4, 6), _int4_k_tile)
multiply_levels = by_height(_heights(1, LEVEL_ROWS), _level_tile)
_multiply_blocks = by_height(_heights(4, 6), partial(_prepared_tile, 1, False))
_multiply_blocks_min = by_height(_heights(4, 6), partial(_prepared_tile, 1, True))
_multiply_halves = by_height(_heights(4, 6), partial(_prepared_tile, 2, False))
_multiply_halves_min = by_height(_heights(6), partial(_prepared_tile, 2, True))


@kernel
def multiply_panel(
    format, rows, groups, x, x_start, K, w, w_start, ahead, step, bias, bias_start, out, out_start,
    out_stride, accumulate, scratch
):  # fmt: skip
    """The first `rows` rows of each of some activation groups times one panel of `K` inputs.

    x: the packed [rows, K] of each group, from word `x_start` on; w: the panel [PANEL, K] at word `w_start`;
    ahead: how far from there the words
    begin that are asked for: as many as are read, by the first group, or for a float format `step` words with
    each; bias: `PANEL` floats at `bias_start` that every row starts from; out: rows `out_stride` apart,
    written or, with `accumulate`, added to. The tiles may be higher than `rows`, up to the whole group. One
    call for all groups: its many arguments cost a tenth of a tile's time.
    """
    blocks, words, group_words = num_blocks(K), block_words(format), GROUP * activation_words(format, K)
    if format == FLOAT32:
        _multiply_float32(
            rows, groups, group_words, x, x_start, w, w_start, w_start + ahead, step, blocks, words, bias,
            bias_start, out, out_start, out_stride, accumulate,
        )  # fmt: skip
    elif format == BFLOAT16:
        _multiply_bfloat16(
            rows, groups, group_words, x, x_start, w, w_start, w_start + ahead, step, blocks, words, bias,
            bias_start, out, out_start, out_stride, accumulate,
        )  # fmt: skip
    else:
        for first in range(0, rows, INT_HEIGHTS[-1]):
            x_at, out_at = x_start + first * INT_CHUNK, out_start + first * out_stride
            if format == INT8:
                _multiply_int8(
                    rows - first, groups, group_words, x, x_at, w, w_start, ahead, blocks, words, bias,
                    bias_start, out, out_at, out_stride, accumulate,
                )  # fmt: skip
            elif format == INT8_ROW:
                _multiply_int8_row(
                    rows - first, groups, group_words, x, x_at, w, w_start, ahead, blocks, words, bias,
                    bias_start, out, out_at, out_stride, accumulate,
                )  # fmt: skip
            elif format == INT4_K:
                _multiply_int4_k(
                    rows - first, groups, group_words, x, x_at, w, w_start, ahead, blocks, words, bias,
                    bias_start, out, out_at, out_stride, accumulate, scratch,
                )  # fmt: skip
            else:
                _multiply_int4(
                    rows - first, groups, group_words, x, x_at, w, w_start, ahead, blocks, words, bias,
                    bias_start, out, out_at, out_stride, accumulate, format == INT4_MIN,
                )  # fmt: skip


@kernel
def multiply_prepared(
    format, rows, groups, group_words, x, x_at, w, blocks, start, start_at, start_stride, out, out_at,
    out_stride, accumulate
):  # fmt: skip
    """The rows of some groups times the blocks that `prepare_blocks` wrote to `w`: see `_prepared_tile`."""
    minima = has_minima(format)
    if has_halves_apart(format) and minima:
        _multiply_halves_min(
            rows, groups, group_words, x, x_at, w, blocks, start, start_at, start_stride, out, out_at,
            out_stride, accumulate,
        )  # fmt: skip
    elif has_halves_apart(format):
        _multiply_halves(
            rows, groups, group_words, x, x_at, w, blocks, start, start_at, start_stride, out, out_at,
            out_stride, accumulate,
        )  # fmt: skip
    elif minima:
        _multiply_blocks_min(
            rows, groups, group_words, x, x_at, w, blocks, start, start_at, start_stride, out, out_at,
            out_stride, accumulate,
        )  # fmt: skip
    else:
        _multiply_blocks(
            rows, groups, group_words, x, x_at, w, blocks, start, start_at, start_stride, out, out_at,
            out_stride, accumulate,
        )  # fmt: skip
