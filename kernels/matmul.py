"""Matrix multiplication on packed operands: activations [M, K] times weights [N, K], plus a bias.

Every output element is one chain of additions over k = 0 .. K-1 that starts from its bias, whatever tile it
falls into, so its bits depend neither on M nor on its neighbours nor on who computes it (batch invariance).
In the integer formats the chain goes block by block: a block's sum is an exact int32, then scaled and added.
Only M and N are ever split; a tile keeps all of its accumulators in registers.
"""

from functools import partial
from typing import Any

from pagellm.kernels.jit import by_height, kernel
from pagellm.kernels.packing import (
    BFLOAT16,
    CHUNK,
    FLOAT32,
    GROUP,
    INT4,
    INT4_MIN,
    INT8,
    INT_CHUNK,
    PANEL,
    SCALE,
    SCALED_SUM,
    START_INT4,
    START_INT8,
    START_ZERO,
    activation_place,
    activation_words,
    block_words,
    num_blocks,
    padded,
    padded_rows,
    panel_block_words,
)
from pagellm.kernels.simd import (
    INT8_OFFSET,
    LANES,
    PAIR_WORDS,
    add_scaled,
    dot_bfloat16,
    dot_int4,
    dot_int8,
    int4_sums,
    outer_product,
    outer_product_float16,
    prefetch,
    start_int_tile,
    start_tile,
    write_tile,
)
from pagellm.kernels.threads import next_item

_VECTORS = PANEL // LANES
# Rows of a tile of 32-bit sums; the integer formats keep two sums an element, so theirs has half as many.
_HEIGHTS = tuple(height for height in (1, 2, 3, 4, 6, 8, 12) if height <= GROUP)
_INT_HEIGHTS = tuple(height for height in (1, 2, 3, 4, 6) if height <= max(1, GROUP // 2))
_START_INT8 = START_INT8 if INT8_OFFSET else START_ZERO
# Rows that meet a panel while it is in the nearest cache.
_ROWS_PER_ITEM = 8 * GROUP
# Words of weights of a work item at least where there is little to compute.
_WORDS_PER_ITEM = 16384
# How far ahead of a product the weights are asked for: the processor's own prefetching ends at each page.
_PREFETCH_WORDS = 2048


@kernel
def _prefetch_weights(w, at):
    """Asks for a panel's row of words."""
    for v in range(0, PANEL, LANES):
        prefetch(w, at + v)


def _float_tile(product: Any, x_words: int, height: int) -> Any:
    """For formats whose words are inputs: `product` adds what a word of weights and `x_words` of `x` give.

    A kernel for `height` rows [height, K] of each group and a panel [PANEL, K]: see `_multiply_panel`.
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
        block_size = panel_block_words(INT8)
        for _ in range(groups):
            tile = start_tile(height, _VECTORS, bias, bias_at)
            for block in range(blocks):
                at, column = x_at + block * (GROUP * INT_CHUNK), w_at + block * block_size
                ints = start_int_tile(height, _VECTORS, x, at + _START_INT8, INT_CHUNK)
                for word in range(words):
                    _prefetch_weights(w, ahead + column)
                    ints = dot_int8(ints, height, x, at + word, INT_CHUNK, w, column)
                    column += PANEL
                tile = add_scaled(tile, ints, height, x, at + SCALE, INT_CHUNK, w, column)
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
        start = START_ZERO if minima else START_INT4
        block_size = panel_block_words(INT4_MIN if minima else INT4)
        for _ in range(groups):
            tile = start_tile(height, _VECTORS, bias, bias_at)
            for block in range(blocks):
                at, column = x_at + block * (GROUP * INT_CHUNK), w_at + block * block_size
                ints = start_int_tile(height, _VECTORS, x, at + start, INT_CHUNK)
                for word in range(words):
                    _prefetch_weights(w, ahead + column)
                    ints = dot_int4(ints, height, x, at + word, INT_CHUNK, w, column)
                    column += PANEL
                ints = int4_sums(ints)
                tile = add_scaled(tile, ints, height, x, at + SCALE, INT_CHUNK, w, column)
                if minima:
                    column += PANEL // 2
                    tile = outer_product_float16(tile, height, x, at + SCALED_SUM, INT_CHUNK, w, column)
            write_tile(tile, height, out, out_at, out_stride, accumulate)
            x_at += group_words
            out_at += GROUP * out_stride
            ahead = 0

    return multiply


_multiply_float32 = by_height(_HEIGHTS, partial(_float_tile, outer_product, 1))
_multiply_bfloat16 = by_height(_HEIGHTS, partial(_float_tile, dot_bfloat16, PAIR_WORDS))
_multiply_int8 = by_height(_INT_HEIGHTS, _int8_tile)
_multiply_int4 = by_height(_INT_HEIGHTS, _int4_tile)


@kernel
def _multiply_panel(
    format, rows, groups, x, x_start, K, w, w_start, ahead, step, bias, bias_start, out, out_start,
    out_stride, accumulate
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
        for first in range(0, rows, _INT_HEIGHTS[-1]):
            x_at, out_at = x_start + first * INT_CHUNK, out_start + first * out_stride
            if format == INT8:
                _multiply_int8(
                    rows - first, groups, group_words, x, x_at, w, w_start, ahead, blocks, words, bias,
                    bias_start, out, out_at, out_stride, accumulate,
                )  # fmt: skip
            else:
                _multiply_int4(
                    rows - first, groups, group_words, x, x_at, w, w_start, ahead, blocks, words, bias,
                    bias_start, out, out_at, out_stride, accumulate, format == INT4_MIN,
                )  # fmt: skip


@kernel
def _run_of_panels(item, num_panels, num_threads, shortest):
    """The panels of a work item where weights are read once: (first, end), with first >= end for no more.

    Every round of items shares out half of what is left ("factoring", Hummel et al. 1992): memory is read in
    long runs, of which 256 KiB bring 1.1 times as much a second as 64 KiB, and yet the threads end together.
    """
    first, length = 0, max(num_panels // (2 * num_threads), shortest)
    while item >= num_threads and length > shortest:
        first += num_threads * length
        item -= num_threads
        length = max((num_panels - first) // (2 * num_threads), shortest)
    first += item * length
    return first, min(first + length, num_panels)


@kernel
def matmul(counters, num_threads, format, x, M, K, weights, w_start, bias_start, N, out, accumulate):
    """One thread's share of `out[m, n] (+)= bias[n] + sum over k of x[m, k] * w[n, k]`.

    x: packed activations of M rows for this format; weights: the buffer that holds the panels at word
    `w_start` and the bias (floats, padded to whole panels) at `bias_start`; out: flat, its rows `padded(N)`
    apart, `padded_rows(M)` of them. All threads of the team call it; a barrier must follow.
    """
    num_panels = padded(N) // PANEL
    out_stride, row_words = num_panels * PANEL, activation_words(format, K)
    panel_words = num_blocks(K) * panel_block_words(format)
    few_rows = M <= _ROWS_PER_ITEM
    shortest = max(1, min(_WORDS_PER_ITEM // panel_words, num_panels // (4 * num_threads)))
    # The words ahead are asked for by the first group. But where it would wait for them while the memory has
    # nothing to do for the others, as in float formats, all groups ask for an equal part of the next panel.
    distance, step = _PREFETCH_WORDS if few_rows else 0, PANEL
    if format <= BFLOAT16 and M > GROUP:
        distance, step = (panel_words, -(-PANEL * GROUP // padded_rows(M))) if few_rows else (0, 0)
    while True:
        item = next_item(counters)
        if few_rows:
            first_row = 0
            first_panel, end_panel = _run_of_panels(item, num_panels, num_threads, shortest)
        else:
            first_row = item // num_panels * _ROWS_PER_ITEM
            first_panel, end_panel = item % num_panels, item % num_panels + 1
        if first_row >= M or first_panel >= num_panels:
            return
        end_row = min(first_row + _ROWS_PER_ITEM, M)
        for panel in range(first_panel, end_panel):
            row, ahead = first_row, distance
            while row < end_row:  # whole groups, then the rest
                groups = max((end_row - row) // GROUP, 1)
                _multiply_panel(
                    format, min(GROUP, end_row - row), groups, x, row * row_words, K, weights,
                    w_start + panel * panel_words, ahead, step, weights,
                    bias_start + panel * PANEL, out, row * out_stride + panel * PANEL, out_stride, accumulate,
                )  # fmt: skip
                ahead = ahead + groups * panel_words // PANEL * step if format <= BFLOAT16 else 0
                row += groups * GROUP
