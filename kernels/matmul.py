"""Matrix multiplication on packed operands: activations [M, K] times weights [N, K], plus a bias.

Every output element is one chain of multiply-adds over k = 0 .. K-1 that starts from its bias, whatever tile
it falls into, so its bits depend neither on M nor on its neighbours nor on who computes it (batch
invariance). Only M and N are ever split; a tile keeps all of its accumulators in registers.
"""

from typing import Any

from kernels.jit import by_height, kernel
from kernels.packing import GROUP, PANEL, TILE_HEIGHTS, group_height, padded
from kernels.simd import LANES, add_tile, outer_product, start_tile, store_tile
from kernels.threads import next_item

# Rows that meet a panel while it is in the nearest cache; a work item is one panel times so many rows.
_ROWS_PER_ITEM = 8 * GROUP
_PANEL_VECTORS = PANEL // LANES


def _tile(height: int) -> Any:
    @kernel
    def tile(x, x_start, w, w_start, bias_start, out, out_start, out_stride, K, accumulate):
        accumulators = start_tile(height, _PANEL_VECTORS, w, bias_start)
        for k in range(K):
            accumulators = outer_product(
                accumulators, height, x, x_start + k * height, 1, w, w_start + k * PANEL
            )
        if accumulate:
            add_tile(accumulators, height, out, out_start, out_stride)
        else:
            store_tile(accumulators, height, out, out_start, out_stride)

    return tile


_multiply_tile = by_height(TILE_HEIGHTS, _tile)


@kernel
def matmul(counters, x, M, K, weights, w_start, bias_start, N, out, accumulate):
    """One thread's share of `out[m, n] (+)= bias[n] + sum over k of x[m, k] * w[n, k]`.

    x: packed activations of M rows; weights: the float32 buffer that holds the panels at `w_start` and the
    bias (padded to whole panels) at `bias_start`; out: flat, its rows `padded(N)` apart, `padded_rows(M)` of
    them. All threads of the team call it; a barrier must follow.
    """
    num_panels = padded(N) // PANEL
    num_row_blocks = (M + _ROWS_PER_ITEM - 1) // _ROWS_PER_ITEM
    out_stride = num_panels * PANEL
    item = next_item(counters)
    while item < num_panels * num_row_blocks:
        panel = item % num_panels
        first_row = item // num_panels * _ROWS_PER_ITEM
        for row in range(first_row, min(first_row + _ROWS_PER_ITEM, M), GROUP):
            _multiply_tile(
                group_height(M, row // GROUP),
                x,
                row * K,
                weights,
                w_start + panel * K * PANEL,
                bias_start + panel * PANEL,
                out,
                row * out_stride + panel * PANEL,
                out_stride,
                K,
                accumulate,
            )
        item = next_item(counters)
