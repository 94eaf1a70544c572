"""Matrix multiplication on packed operands: activations [M, K] times weights [N, K], plus a bias.

Every output element is one chain of additions over k = 0 .. K-1 that starts from its bias, whatever tile it
falls into, so its bits depend neither on M nor on its neighbours nor on who computes it (batch invariance).
In the integer formats the chain goes block by block, or half by half where the halves have scales of their
own: the sum of the products is an exact int32 and becomes a float32, times the product of both scales in
one multiply-add; then, where the format has minima, the minimum times the scaled sum of the activations in
another.
Only M and N are ever split; a tile keeps all of its accumulators in registers.
"""

from functools import partial
from typing import Any

from pagellm.kernels.expansion import (
    MINIMA,
    PREPARED_WORDS,
    SCALES,
    dot_table,
    has_halves_apart,
    is_expanded,
    prepare_blocks,
    prepare_scales,
)
from pagellm.kernels.jit import by_height, kernel, plain, shared
from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    CHUNK,
    FLOAT32,
    GROUP,
    INT2,
    INT3_K,
    INT4,
    INT4_K,
    INT4_MIN,
    INT5,
    INT5_K,
    INT6_K,
    INT8,
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
    padded,
    padded_rows,
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
from pagellm.kernels.threads import next_item

_VECTORS = PANEL // LANES
# Rows of a tile of 32-bit sums; the integer formats keep two sums an element, so theirs has half as many.
_HEIGHTS = tuple(height for height in (1, 2, 3, 4, 6, 8, 12) if height <= GROUP)
_INT_HEIGHTS = tuple(height for height in (1, 2, 3, 4, 6) if height <= max(1, GROUP // 2))
# Rows for which preparing blocks costs more than making bytes of their levels again for each tile.
_LEVEL_ROWS = min(4, _INT_HEIGHTS[-1])
# Rows that meet a panel: at least so many, and at most as many as have so many words, which the second cache
# holds, or so many where prepared blocks wait for them in the nearest one.
_LEAST_ROWS = 8 * GROUP
_WORDS_OF_ROWS = 150_000
_MOST_ROWS = 43 * GROUP
# Fewer items than so many for each thread are made more by cutting the rows.
_ITEMS_PER_THREAD = 32
# Words of weights of a work item at least where there is little to compute.
_WORDS_PER_ITEM = 16384
# Blocks of a panel that are prepared at a time: together with what they are made of they fit into the nearest
# cache. Behind them in the scratch memory are the sums of the rows of an item.
_RUN_BLOCKS = 18
_SUMS = _RUN_BLOCKS * PREPARED_WORDS
# How far ahead of a product the weights are asked for: the processor's own prefetching ends at each page.
_PREFETCH_WORDS = 2048


def _heights(*heights: int) -> tuple[int, ...]:
    """Those of a few heights that tiles of integers have here, the greatest of these among them."""
    return (*(height for height in heights if height < _INT_HEIGHTS[-1]), _INT_HEIGHTS[-1])


@shared
def scratch_size() -> int:
    """Words of scratch memory that a thread needs."""
    return _SUMS + _MOST_ROWS * PANEL


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
            else:
                prepare_scales(format, w, column, halves, scratch, 0)
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
                if format in (TABLE4, TABLE4_K):
                    ints = dot_table(ints, height, x, at, INT_CHUNK, w, column)
                elif format == INT2:
                    ints = dot_levels(ints, height, x, at, INT_CHUNK, w, column, 2, 0, zero, 0, 8)
                else:
                    ints = dot_levels(ints, height, x, at, INT_CHUNK, w, column, 4, 1, zero, 0, 8)
                tile = add_scaled(tile, ints, height, x, at + SCALE, INT_CHUNK, scratch, SCALES)
                if minima:
                    tile = outer_product(tile, height, x, at + SCALED_SUM, INT_CHUNK, scratch, MINIMA)
        write_tile(tile, height, out, out_at, out_stride, accumulate)

    return multiply


_multiply_float32 = by_height(_HEIGHTS, partial(_float_tile, outer_product, 1))
_multiply_bfloat16 = by_height(_HEIGHTS, partial(_float_tile, dot_bfloat16, PAIR_WORDS))
_multiply_int8 = by_height(_INT_HEIGHTS, _int8_tile)
_multiply_int4 = by_height(_INT_HEIGHTS, _int4_tile)
_multiply_int4_k = by_height(_heights(1, 4, 6), _int4_k_tile)
_multiply_levels = by_height(_heights(1, _LEVEL_ROWS), _level_tile)
_multiply_blocks = by_height(_heights(4, 6), partial(_prepared_tile, 1, False))
_multiply_blocks_min = by_height(_heights(4, 6), partial(_prepared_tile, 1, True))
_multiply_halves = by_height(_heights(4, 6), partial(_prepared_tile, 2, False))
_multiply_halves_min = by_height(_heights(6), partial(_prepared_tile, 2, True))


@kernel
def _multiply_panel(
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
        for first in range(0, rows, _INT_HEIGHTS[-1]):
            x_at, out_at = x_start + first * INT_CHUNK, out_start + first * out_stride
            if format == INT8:
                _multiply_int8(
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
def _multiply_prepared(
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


@kernel
def _multiply_expanded(
    format, rows, x, x_start, K, w, w_start, ahead, bias_start, out, out_start, out_stride, accumulate,
    scratch
):  # fmt: skip
    """Rows of activations, from word `x_start` on, times one panel of `K` inputs: see `_multiply_panel`.

    A run of blocks is prepared and then meets all rows, whose sums wait in `scratch` for the next run. `bias`
    is in `w`.
    """
    blocks, group_words = num_blocks(K), GROUP * activation_words(format, K)
    if rows <= _LEVEL_ROWS:
        _multiply_levels(
            rows, format, x, x_start, w, w_start, ahead, blocks, bias_start, out, out_start, out_stride,
            accumulate, scratch,
        )  # fmt: skip
        return
    run = -(-blocks // -(-blocks // _RUN_BLOCKS))
    for first in range(0, blocks, run):
        count = min(run, blocks - first)
        is_last = first + count == blocks
        prepare_blocks(format, w, w_start, first, count, ahead, scratch, 0)
        row = 0
        while row < rows:  # whole groups, then the rest
            groups, in_group = max((rows - row) // GROUP, 1), min(GROUP, rows - row)
            for top in range(row, row + in_group, _INT_HEIGHTS[-1]):
                x_at = x_start + row // GROUP * group_words + (first * GROUP + top - row) * INT_CHUNK
                start, start_at, start_stride = scratch, _SUMS + top * PANEL, plain(PANEL)
                if first == 0:
                    start, start_at, start_stride = w, bias_start, plain(0)
                if is_last:
                    _multiply_prepared(
                        format, row + in_group - top, groups, group_words, x, x_at, scratch, count, start,
                        start_at, start_stride, out, out_start + top * out_stride, out_stride, accumulate,
                    )  # fmt: skip
                else:
                    _multiply_prepared(
                        format, row + in_group - top, groups, group_words, x, x_at, scratch, count, start,
                        start_at, start_stride, scratch, _SUMS + top * PANEL, plain(PANEL), plain(False),
                    )  # fmt: skip
            row += groups * GROUP


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
def _rows_of_item(format, M, K, num_panels, num_threads):
    """Rows of activations of a work item, whole groups: about equal parts of all `M`."""
    most = _LEAST_ROWS
    if is_expanded(format, M):
        most = _MOST_ROWS
    elif format > BFLOAT16:
        most = min(max(_WORDS_OF_ROWS // activation_words(format, K), most), _MOST_ROWS)
    cut = min(-(-M // _LEAST_ROWS), _ITEMS_PER_THREAD * num_threads // num_panels)
    return padded_rows(-(-M // max(-(-M // most), cut)))


@kernel
def matmul(
    counters, num_threads, panels, x, M, K, weights, bias_start, N, out, accumulate, scratch
):  # fmt: skip
    """One thread's share of `out[m, n] (+)= bias[n] + sum over k of x[m, k] * w[n, k]`.

    x: packed activations of M rows for the panels' formats; weights: the buffer that holds the panels, each
    from word `panels[panel, 0]` on in format `panels[panel, 1]`, and the bias (floats, padded to whole
    panels) at `bias_start`; out: flat, its rows `padded(N)` apart, `padded_rows(M)` of them; scratch:
    `scratch_size` words of this thread's own. All panels have the same float format, or all have integer
    formats. All threads of the team call it; a barrier must follow.
    """
    num_panels, format = padded(N) // PANEL, panels[0, 1]
    out_stride, row_words = num_panels * PANEL, activation_words(format, K)
    size = panel_words(format, K)
    rows_per_item = _rows_of_item(format, M, K, num_panels, num_threads)
    few_rows = rows_per_item >= M
    shortest = max(1, min(_WORDS_PER_ITEM // size, num_panels // (4 * num_threads)))
    # The words ahead are asked for by the first group. But where it would wait for them while the memory has
    # nothing to do for the others, as in float formats, all groups ask for an equal part of the next panel.
    distance, step = _PREFETCH_WORDS if few_rows else 0, PANEL
    if format <= BFLOAT16 and M > GROUP:
        distance, step = (size, -(-PANEL * GROUP // padded_rows(M))) if few_rows else (0, 0)
    while True:
        item = next_item(counters)
        if few_rows:
            first_row = 0
            first_panel, end_panel = _run_of_panels(item, num_panels, num_threads, shortest)
        else:
            first_row = item // num_panels * rows_per_item
            first_panel, end_panel = item % num_panels, item % num_panels + 1
        if first_row >= M or first_panel >= num_panels:
            return
        end_row = min(first_row + rows_per_item, M)
        for panel in range(first_panel, end_panel):
            start, format = panels[panel, 0], panels[panel, 1]
            if is_expanded(format, M):
                _multiply_expanded(
                    format, end_row - first_row, x, first_row * row_words, K, weights, start, distance,
                    bias_start + panel * PANEL, out, first_row * out_stride + panel * PANEL, out_stride,
                    accumulate, scratch,
                )  # fmt: skip
                continue
            row, ahead = first_row, distance
            while row < end_row:  # whole groups, then the rest
                groups = max((end_row - row) // GROUP, 1)
                _multiply_panel(
                    format, min(GROUP, end_row - row), groups, x, row * row_words, K, weights, start, ahead,
                    step, weights, bias_start + panel * PANEL, out, row * out_stride + panel * PANEL,
                    out_stride, accumulate, scratch,
                )  # fmt: skip
                ahead = ahead + groups * size // PANEL * step if format <= BFLOAT16 else 0
                row += groups * GROUP
