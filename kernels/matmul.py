"""Matrix multiplication on packed operands: activations [M, K] times weights [N, K], plus a bias.

Every output element is one chain of additions over k = 0 .. K-1 that starts from its bias, whatever tile it
falls into, so its bits depend neither on M nor on its neighbours nor on who computes it (batch invariance).
In the integer formats the chain goes block by block, or half by half where the halves have scales of their
own: the sum of the products is an exact int32 and becomes a float32, times the product of both scales in
one multiply-add; then, where the format has minima, the minimum times the scaled sum of the activations in
another.
Only M and N are ever split; a tile keeps all of its accumulators in registers.
"""

from pagellm.kernels.expansion import (
    PREPARED_WORDS,
    decode_blocks,
    is_decoded,
    is_expanded,
    prepare_blocks,
)
from pagellm.kernels.jit import kernel, kernel_apart, plain, shared
from pagellm.kernels.matmul_tiles import (
    INT_HEIGHTS,
    LEVEL_ROWS,
    multiply_decoded,
    multiply_decoded_row,
    multiply_levels,
    multiply_panel,
    multiply_prepared,
)
from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    GROUP,
    INT_CHUNK,
    PANEL,
    activation_place,
    activation_words,
    inputs_of,
    num_blocks,
    padded,
    padded_rows,
    panel_words,
)
from pagellm.kernels.threads import next_item

# Rows that meet a panel in float formats, and in all of them the fewest, roughly, that rows are cut into.
_LEAST_ROWS = 8 * GROUP
# In integer formats more meet it: as many as have so many words, which the second cache holds.
_WORDS_OF_ROWS = 150_000
# At most so many, for whose sums there is room; always so many where blocks of the panel are prepared.
_MOST_ROWS = 43 * GROUP
# Fewer items than so many for each thread are made more by cutting the rows.
_ITEMS_PER_THREAD = 32
# Words of weights of a work item at least where there is little to compute.
_WORDS_PER_ITEM = 16384
# Blocks of a panel that are prepared at a time: together with what they are made of they fit into the nearest
# cache. Behind them in the scratch memory are the sums of the rows of an item.
_RUN_BLOCKS = 18
_SUMS = _RUN_BLOCKS * PREPARED_WORDS
# Of formats whose blocks become floats fewer fit, and more rows are worth the work.
_DECODED_BLOCKS = 4
_DECODED_ROWS = 4 * _LEAST_ROWS
# How far ahead of a product the weights are asked for: the processor's own prefetching ends at each page.
_PREFETCH_WORDS = 2048


@shared
def scratch_size() -> int:
    """Words of scratch memory that a thread needs."""
    return _SUMS + _MOST_ROWS * PANEL


@kernel
def _multiply_expanded(
    format, rows, x, x_start, K, w, w_start, ahead, bias_start, out, out_start, out_stride, accumulate,
    scratch
):  # fmt: skip
    """Rows of activations, from word `x_start` on, times one panel of `K` inputs: see `multiply_panel`.

    A run of blocks is prepared and then meets all rows, whose sums wait in `scratch` for the next run. `bias`
    is in `w`.
    """
    blocks, group_words = num_blocks(K), GROUP * activation_words(format, K)
    if rows <= LEVEL_ROWS:
        multiply_levels(
            rows, format, x, x_start, w, w_start, ahead, blocks, bias_start, out, out_start, out_stride,
            accumulate, scratch,
        )  # fmt: skip
        return
    run = -(-blocks // -(-blocks // _RUN_BLOCKS))
    for first in range(0, blocks, run):
        count = min(run, blocks - first)
        is_last = first + count == blocks
        prepare_blocks(format, w, w_start, first, count, ahead, scratch, plain(0))
        row = 0
        while row < rows:  # whole groups, then the rest
            groups, in_group = max((rows - row) // GROUP, 1), min(GROUP, rows - row)
            for top in range(row, row + in_group, INT_HEIGHTS[-1]):
                x_at = x_start + row // GROUP * group_words + (first * GROUP + top - row) * INT_CHUNK
                start, start_at, start_stride = scratch, _SUMS + top * PANEL, plain(PANEL)
                if first == 0:
                    start, start_at, start_stride = w, bias_start, plain(0)
                if is_last:
                    multiply_prepared(
                        format, row + in_group - top, groups, group_words, x, x_at, scratch, count, start,
                        start_at, start_stride, out, out_start + top * out_stride, out_stride, accumulate,
                    )  # fmt: skip
                else:
                    multiply_prepared(
                        format, row + in_group - top, groups, group_words, x, x_at, scratch, count, start,
                        start_at, start_stride, scratch, _SUMS + top * PANEL, plain(PANEL), plain(False),
                    )  # fmt: skip
            row += groups * GROUP


@kernel
def _multiply_decoded(
    format, rows, x, x_start, K, w, w_start, ahead, bias_start, out, out_start, out_stride, accumulate,
    scratch
):  # fmt: skip
    """Like `_multiply_expanded` for formats whose blocks become floats: a chain is that of FLOAT32."""
    blocks, group_words = num_blocks(K), GROUP * activation_words(format, K)
    if rows == 1:
        multiply_decoded_row(
            format, x, x_start, w, w_start, ahead, blocks, bias_start, out, out_start, accumulate
        )  # fmt: skip
        return
    for first in range(0, blocks, _DECODED_BLOCKS):
        count = min(_DECODED_BLOCKS, blocks - first)
        is_last = first + count == blocks
        decode_blocks(format, w, w_start, first, count, ahead, scratch, plain(0))
        row = 0
        while row < rows:  # whole groups, then the rest
            groups, in_group = max((rows - row) // GROUP, 1), min(GROUP, rows - row)
            x_at = x_start + row // GROUP * group_words + activation_place(first * BLOCK)
            start, start_at, start_stride = scratch, _SUMS + row * PANEL, plain(PANEL)
            if first == 0:
                start, start_at, start_stride = w, bias_start, plain(0)
            if is_last:
                multiply_decoded(
                    in_group, groups, group_words, x, x_at, scratch, count * BLOCK, start, start_at,
                    start_stride, out, out_start + row * out_stride, out_stride, accumulate,
                )  # fmt: skip
            else:
                multiply_decoded(
                    in_group, groups, group_words, x, x_at, scratch, count * BLOCK, start, start_at,
                    start_stride, scratch, _SUMS + row * PANEL, plain(PANEL), plain(False),
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
    elif is_decoded(format):
        most = _DECODED_ROWS
    elif inputs_of(format) > BFLOAT16:
        most = min(max(_WORDS_OF_ROWS // activation_words(format, K), most), _MOST_ROWS)
    cut = min(-(-M // _LEAST_ROWS), _ITEMS_PER_THREAD * num_threads // num_panels)
    return padded_rows(-(-M // max(-(-M // most), cut)))


@kernel
def _prefetching(format, M, few_rows, size):
    """How far ahead words of weights are asked for, and how many with each step: see `multiply_panel`.

    The words ahead are asked for by the first group. But where it would wait for them while the memory has
    nothing to do for the others, as in float formats, all groups ask for an equal part of the next panel.
    few_rows: whether all rows meet a panel, [size] words, at once.
    """
    if format <= BFLOAT16 and M > GROUP:
        return (size, -(-PANEL * GROUP // padded_rows(M))) if few_rows else (0, 0)
    return (_PREFETCH_WORDS if few_rows else 0), PANEL


@kernel_apart
def _multiply_rows(
    format, rows, M, x, x_start, K, weights, start, distance, step, bias_start, out, out_start, out_stride,
    accumulate, scratch
):  # fmt: skip
    """The first `rows` of activations from word `x_start` on, of `M` that a product has, times one panel.

    start, bias_start: where in `weights` the panel and its bias begin; distance, step: of `_prefetching`.
    """
    if is_decoded(format):
        _multiply_decoded(
            format, rows, x, x_start, K, weights, start, distance, bias_start, out, out_start, out_stride,
            accumulate, scratch,
        )  # fmt: skip
        return
    if is_expanded(format, M):
        _multiply_expanded(
            format, rows, x, x_start, K, weights, start, distance, bias_start, out, out_start, out_stride,
            accumulate, scratch,
        )  # fmt: skip
        return
    row, ahead, row_words = 0, distance, activation_words(format, K)
    while row < rows:  # whole groups, then the rest
        groups = max((rows - row) // GROUP, 1)
        multiply_panel(
            format, min(GROUP, rows - row), groups, x, x_start + row * row_words, K, weights, start, ahead,
            step, weights, bias_start, out, out_start + row * out_stride, out_stride, accumulate, scratch,
        )  # fmt: skip
        ahead = ahead + groups * panel_words(format, K) // PANEL * step if format <= BFLOAT16 else 0
        row += groups * GROUP


@kernel
def stacked_matmul(
    counters, num_threads, panels, x, M, K, weights, bias_start, N, num_inputs, out_step, out, accumulate,
    scratch
):  # fmt: skip
    """So many products at once as there are inputs, each with a matrix of its own: see `matmul`.

    num_inputs: their packed activations, panels and biases lie one behind the other, those of each begin on
    a panel; out_step: the outputs of each, whole panels, begin so far behind those of the one before.
    """
    panels_of_input, format = padded(N) // PANEL, panels[0, 1]
    num_panels, out_stride = num_inputs * panels_of_input, num_inputs * out_step
    row_words = activation_words(format, K)
    input_words = padded_rows(M) * row_words
    size = panel_words(format, K)
    rows_per_item = _rows_of_item(format, M, K, num_panels, num_threads)
    few_rows = rows_per_item >= M
    shortest = max(1, min(_WORDS_PER_ITEM // size, num_panels // (4 * num_threads)))
    distance, step = _prefetching(format, M, few_rows, size)
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
        rows = min(rows_per_item, M - first_row)
        for panel in range(first_panel, end_panel):
            x_start, column = first_row * row_words, panel * PANEL
            if num_inputs > 1:
                index = panel // panels_of_input
                x_start += index * input_words
                column = index * out_step + (panel - index * panels_of_input) * PANEL
            _multiply_rows(
                panels[panel, 1], rows, M, x, x_start, K, weights, panels[panel, 0], distance, step,
                bias_start + panel * PANEL, out, first_row * out_stride + column, out_stride, accumulate,
                scratch,
            )  # fmt: skip


@kernel
def matmul(
    counters, num_threads, panels, x, M, K, weights, bias_start, N, out, accumulate, scratch
):  # fmt: skip
    """One thread's share of `out[m, n] (+)= bias[n] + sum over k of x[m, k] * w[n, k]`.

    x: packed activations of M rows for the panels' formats; weights: the buffer that holds the panels, each
    from word `panels[panel, 0]` on in format `panels[panel, 1]`, and the bias (floats, padded to whole
    panels) at `bias_start`; out: flat, its rows `padded(N)` apart, `padded_rows(M)` of them; scratch:
    `scratch_size` words of this thread's own. All panels have the same float format, or all have formats
    whose activations are blocks of integers. All threads of the team call it; a barrier must follow.
    """
    stacked_matmul(
        counters, num_threads, panels, x, M, K, weights, bias_start, N, plain(1), padded(N), out, accumulate,
        scratch,
    )  # fmt: skip


@kernel
def expert_matmul(
    counters, num_threads, panels, x, groups, K, weights, bias_start, own_biases, N, out, scratch
):  # fmt: skip
    """One thread's share of the products of several matrices [N, K], each with rows of its own: see `matmul`.

    panels: of all experts, one expert's behind the other's; groups: `kernels.experts.Groups`, the rows of
    each expert that has any, counted in slots of `x` and `out`; own_biases: whether each expert has a bias of
    its own, one behind the other, or all have the same. The panels of experts that have rows are shared out
    as though they were one matrix's, so no thread waits for one whose expert has more rows than others. Those
    of experts without rows are not read.
    """
    num_panels, format = padded(N) // PANEL, panels[0, 1]
    size, row_words = panel_words(format, K), activation_words(format, K)
    count, most, stride = groups.totals[0], groups.totals[1], num_panels * PANEL
    total = count * num_panels
    rows_per_item = _rows_of_item(format, most, K, total, num_threads)
    shortest = max(1, min(_WORDS_PER_ITEM // size, total // (4 * num_threads)))
    index = first_item = 0  # the expert under way and the first of its items
    while True:
        item = next_item(counters)
        end = item + 1
        if most <= GROUP:  # the work is to read, and long runs are read faster
            item, end = _run_of_panels(item, total, num_threads, shortest)
        if item >= end:
            return
        while item < end:
            num_items = -(-groups.num_rows[index] // rows_per_item) * num_panels
            while item >= first_item + num_items:
                index, first_item = index + 1, first_item + num_items
                if index == count:
                    return
                num_items = -(-groups.num_rows[index] // rows_per_item) * num_panels
            M, expert = groups.num_rows[index], groups.experts[index]
            first_row, panel = (
                (item - first_item) // num_panels * rows_per_item,
                (item - first_item) % num_panels,
            )
            slot, number = groups.first_slot[index] + first_row, expert * num_panels + panel
            distance, step = _prefetching(format, M, rows_per_item >= M, size)
            bias = bias_start + (own_biases * expert * num_panels + panel) * PANEL
            _multiply_rows(
                panels[number, 1], min(rows_per_item, M - first_row), M, x, slot * row_words, K, weights,
                panels[number, 0], distance, step, bias, out, slot * stride + panel * PANEL, stride,
                plain(False), scratch,
            )  # fmt: skip
            item += 1
