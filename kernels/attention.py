"""Fused attention over a paged KV cache: online softmax, no attention matrix (Milakov and Gimelshein 2018).

A work item is one query tile (a run of a sequence's new tokens) for one KV head with all the query heads that
share it; decodes and prefill chunks are the same thing with other run lengths. It walks over the keys in
tiles of `KEY_TILE` positions that begin at multiples of `KEY_TILE` of the sequence itself. So the
order of every sum depends on key positions alone: not on the block size, the chunk, or the neighbours (batch
invariance). A key that a row may not see gets weight exactly 0, which changes no bit of the row's sums.

The cache of one layer: keys [num_blocks, num_kv_heads, head_dim, block_size], so that neighbouring lanes are
neighbouring keys; values [num_blocks, num_kv_heads, block_size, padded head_dim].
"""

from typing import Any

import numpy as np

from kernels.jit import by_height, kernel, shared
from kernels.packing import GROUP, TILE_HEIGHTS, group_height, pack_row, padded_rows
from kernels.simd import (
    LANES,
    broadcast,
    exp,
    first_lane,
    load,
    load_tile,
    maximum,
    outer_product,
    prefetch,
    reduce_add,
    reduce_max,
    start_tile,
    store,
    store_tile,
)
from kernels.threads import next_item

KEY_TILE = 64
QUERY_TILE_ROWS = 96
# A row of scores has room for one vector that begins at the tile's last key.
_SCORE_STRIDE = KEY_TILE + LANES
# Stands for minus infinity where inf - inf would be NaN: exp(_MASKED - anything real) is exactly 0.
_MASKED = np.float32(-1e30)


@shared
def tokens_per_query_tile(group_size: int) -> int:
    """Tokens of one query tile when `group_size` query heads share a KV head."""
    return max(1, QUERY_TILE_ROWS // group_size)


def scratch_size(group_size: int, head_dim: int) -> int:
    """Floats of working memory of one thread."""
    rows = _scratch_rows(group_size)
    return rows * (_lanes(head_dim) * 2 + _SCORE_STRIDE + 2) + 2 * LANES


@shared
def _scratch_rows(group_size: int) -> int:
    return padded_rows(max(QUERY_TILE_ROWS, group_size))


@shared
def _lanes(head_dim: int) -> int:
    """head_dim rounded up to whole vectors."""
    return -(-head_dim // LANES) * LANES


def key_cache_size(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """Floats of one layer's keys."""
    return num_blocks * num_kv_heads * head_dim * block_size


def value_cache_size(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """Floats of one layer's values."""
    return num_blocks * num_kv_heads * block_size * _lanes(head_dim)


@kernel
def store_kv(
    k, k_start, v, v_start, head_dim, num_kv_heads, block_size, slot, keys, values, layer_k, layer_v
):
    """Writes one token's keys and values, [num_kv_heads, head_dim] each, into cache slot `slot`."""
    block, offset = slot // block_size, slot % block_size
    stride = _lanes(head_dim)
    for head in range(num_kv_heads):
        key = layer_k + (block * num_kv_heads + head) * head_dim * block_size + offset
        value = layer_v + ((block * num_kv_heads + head) * block_size + offset) * stride
        for d in range(head_dim):
            keys[key + d * block_size] = k[k_start + head * head_dim + d]
            values[value + d] = v[v_start + head * head_dim + d]


def _score_tile(height: int) -> Any:
    @kernel
    def score(queries, q_start, head_dim, zeros, keys, k_start, block_size, scores, out_start):
        """Scores of `height` query rows against the `LANES` keys from `k_start` on."""
        tile = start_tile(height, 1, zeros, 0)
        for d in range(head_dim):
            tile = outer_product(
                tile, height, queries, q_start + d * height, 1, keys, k_start + d * block_size
            )
        store_tile(tile, height, scores, out_start, _SCORE_STRIDE)

    return score


def _value_tile(height: int) -> Any:
    @kernel
    def accumulate(scores, s_start, count, values, value_rows, column, out, out_start, out_stride):
        """Adds `count` keys' values, weighted by the scores, to `LANES` columns of `height` output rows."""
        tile = load_tile(height, out, out_start, out_stride)
        for j in range(count):
            tile = outer_product(
                tile, height, scores, s_start + j, _SCORE_STRIDE, values, value_rows[j] + column
            )
        store_tile(tile, height, out, out_start, out_stride)

    return accumulate


_score = by_height(TILE_HEIGHTS, _score_tile)
_accumulate = by_height(TILE_HEIGHTS, _value_tile)


@kernel
def _prefetch_run(keys, layer_k, values, layer_v, head_block, offset, head_dim, stride, block_size):
    """Asks for what one block holds of the next key tile.

    A decode waits for memory alone, and the processor's own prefetching ends at each page, which is about a
    block.
    """
    run = min(block_size - offset, KEY_TILE)
    key = layer_k + head_block * head_dim * block_size + offset
    value = layer_v + (head_block * block_size + offset) * stride
    for d in range(head_dim):
        for j in range(0, run, LANES):
            prefetch(keys, key + d * block_size + j)
    for i in range(0, run * stride, LANES):
        prefetch(values, value + i)


@kernel
def _softmax_row(scores, start, visible, running, row, out, out_start, out_size):
    """Turns one row's scores into weights and rescales what the row has summed up so far.

    running[row]: the greatest score and the sum of weights so far, updated. The first `visible` of the tile's
    keys count.
    """
    for j in range(max(visible, 0), KEY_TILE):
        scores[start + j] = _MASKED
    greatest = load(scores, start)
    for j in range(LANES, KEY_TILE, LANES):
        greatest = maximum(greatest, load(scores, start + j))
    old = running[row, 0]
    new = max(old, reduce_max(greatest))
    total = broadcast(np.float32(0.0))
    for j in range(0, KEY_TILE, LANES):
        weight = exp(load(scores, start + j) - broadcast(new))
        store(scores, start + j, weight)
        total = total + weight
    scale = first_lane(exp(broadcast(old - new)))
    if scale != 1.0:
        for d in range(0, out_size, LANES):
            store(out, out_start + d, load(out, out_start + d) * broadcast(scale))
    running[row, 0] = new
    running[row, 1] = running[row, 1] * scale + reduce_add(total)


@kernel
def _attend_tile(
    qkv, qkv_stride, first_token, num_tokens, first_position, kv_head, num_heads, num_kv_heads, head_dim,
    scale, keys, values, layer_k, layer_v, block_size, block_table, queries, out, scores, running,
    value_rows, zeros
):  # fmt: skip
    """Attention of `num_tokens` query tokens (flat rows from `first_token` on) for one KV head.

    Leaves in `out` one row of unnormalised sums for each (token, query head of the group), token-major, and
    in `running` each row's greatest score and sum of weights.
    """
    group_size = num_heads // num_kv_heads
    num_rows = num_tokens * group_size
    stride = _lanes(head_dim)
    for row in range(num_rows):
        token, head = first_token + row // group_size, kv_head * group_size + row % group_size
        for d in range(head_dim):
            out[d] = qkv[token * qkv_stride + head * head_dim + d] * scale
        pack_row(out, 0, head_dim, row, num_rows, queries)
    out[: padded_rows(num_rows) * stride] = 0.0
    running[:num_rows, 0] = _MASKED
    running[:num_rows, 1] = 0.0

    num_keys = first_position + num_tokens
    for tile_start in range(0, num_keys, KEY_TILE):
        tile_keys = min(KEY_TILE, num_keys - tile_start)
        position = tile_start
        while position < tile_start + tile_keys:  # the tile's pieces of one block each
            block, offset = block_table[position // block_size], position % block_size
            run = min(block_size - offset, tile_start + tile_keys - position)
            head_block = block * num_kv_heads + kv_head
            if num_rows <= GROUP and position + KEY_TILE < num_keys:
                ahead = position + KEY_TILE  # each piece of this tile asks for its counterpart in the next
                _prefetch_run(
                    keys, layer_k, values, layer_v, block_table[ahead // block_size] * num_kv_heads + kv_head,
                    ahead % block_size, head_dim, stride, block_size,
                )  # fmt: skip
            for j in range(run):
                value_rows[position - tile_start + j] = (
                    layer_v + (head_block * block_size + offset + j) * stride
                )
            for j in range(0, run, LANES):
                for first in range(0, num_rows, GROUP):
                    _score(
                        group_height(num_rows, first // GROUP), queries, first * head_dim, head_dim, zeros,
                        keys, layer_k + head_block * head_dim * block_size + offset + j, block_size,
                        scores, first * _SCORE_STRIDE + position - tile_start + j,
                    )  # fmt: skip
            position += run
        for row in range(num_rows):
            visible = first_position + row // group_size + 1 - tile_start
            _softmax_row(scores, row * _SCORE_STRIDE, visible, running, row, out, row * stride, stride)
        for first in range(0, num_rows, GROUP):
            for column in range(0, stride, LANES):
                _accumulate(
                    group_height(num_rows, first // GROUP), scores, first * _SCORE_STRIDE, tile_keys,
                    values, value_rows, column, out, first * stride + column, stride,
                )  # fmt: skip


@kernel
def attention(
    counters, qkv, qkv_stride, num_heads, num_kv_heads, head_dim, scale, keys, values, layer_k, layer_v,
    block_size, block_tables, query_start_loc, seq_lens, tile_sequence, tile_start, scratch, packed
):  # fmt: skip
    """One thread's share of causal attention of all new tokens of a batch, written as packed activations.

    qkv: flat rows of [num_heads + 2 * num_kv_heads, head_dim], rotated; keys, values: the flat caches, with
    this layer's part from `layer_k` and `layer_v` on; block_tables: [num_seqs, max_blocks]; query_start_loc:
    [num_seqs + 1]; seq_lens: [num_seqs], the new tokens included; tile_sequence, tile_start: [num_tiles],
    each query tile's sequence and its first flat token row; scratch: this thread's working memory; packed:
    the output as activations [num_tokens, num_heads * head_dim].
    """
    group_size = num_heads // num_kv_heads
    tile_tokens = tokens_per_query_tile(group_size)
    rows = _scratch_rows(group_size)
    stride = _lanes(head_dim)
    queries = scratch[: rows * stride]
    out = scratch[rows * stride : 2 * rows * stride]
    scores = scratch[2 * rows * stride : 2 * rows * stride + rows * _SCORE_STRIDE + LANES]
    running = scratch[scratch.size - LANES - 2 * rows : scratch.size - LANES].reshape((rows, 2))
    zeros = scratch[scratch.size - LANES :]
    zeros[:] = 0.0
    value_rows = np.empty(KEY_TILE, np.int64)

    num_tokens = query_start_loc[-1]
    num_items = tile_sequence.size * num_kv_heads
    item = next_item(counters)
    while item < num_items:
        # The last tiles of a prompt see the most keys: longest first keeps all threads busy to the end.
        tile, kv_head = tile_sequence.size - 1 - item // num_kv_heads, item % num_kv_heads
        sequence, first_token = tile_sequence[tile], tile_start[tile]
        end = query_start_loc[sequence + 1]
        count = min(tile_tokens, end - first_token)
        first_position = seq_lens[sequence] - end + first_token
        _attend_tile(
            qkv, qkv_stride, first_token, count, first_position, kv_head, num_heads, num_kv_heads, head_dim,
            scale, keys, values, layer_k, layer_v, block_size, block_tables[sequence], queries, out, scores,
            running, value_rows, zeros
        )  # fmt: skip
        _write_rows(out, running, count, group_size, head_dim, stride, first_token, kv_head, num_heads,
                    num_tokens, packed)  # fmt: skip
        item = next_item(counters)


@kernel
def _write_rows(
    out, running, count, group_size, head_dim, stride, first_token, kv_head, num_heads, num_tokens, packed
):  # fmt: skip
    """Normalises a query tile's sums and scatters them to their places as packed activations."""
    for row in range(count * group_size):
        token, head = first_token + row // group_size, kv_head * group_size + row % group_size
        group = token // GROUP
        height = group_height(num_tokens, group)
        base = group * GROUP * num_heads * head_dim + token % GROUP + head * head_dim * height
        inverse = np.float32(1.0) / running[row, 1]
        for d in range(head_dim):
            packed[base + d * height] = out[row * stride + d] * inverse
