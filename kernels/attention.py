"""Fused attention over a paged KV cache: online softmax, no attention matrix (Milakov and Gimelshein 2018).

A work item is one query tile (a run of a sequence's new tokens) for one KV head with all the query heads that
share it; decodes and prefill chunks are the same thing with other run lengths. The keys are walked through in
chunks of `KEY_CHUNK` positions and, within them, tiles of `KEY_TILE`, which begin at multiples of the
sequence's own positions. Each chunk gives a state of its own (sums, greatest score, sum of weights), and the
states are merged in the order of the chunks. So the order of every sum depends on key positions alone: not on
the block size, the prefill chunk, the neighbours, or whether the chunks of a long context were work items of
their own, as they are in a decode (batch invariance). A key that a row may not see gets weight exactly 0,
which changes no bit of the row's sums.

A tile's keys and values are gathered from their blocks into panels, and both products are those of
kernels.matmul. The cache of one layer, in words: keys [num_blocks, num_kv_heads, key words, block_size], so
that neighbouring words are neighbouring keys; values [num_blocks, num_kv_heads, block_size, value words]. A
word is one dimension as float32 or two as bfloat16.
"""

import numpy as np

from kernels.jit import kernel, plain, shared
from kernels.matmul import multiply_group
from kernels.packing import (
    BLOCK,
    CHUNK,
    FLOAT32,
    GROUP,
    PANEL,
    activation_words,
    block_words,
    num_blocks,
    pack_row,
    padded,
    padded_rows,
)
from kernels.simd import (
    LANES,
    broadcast,
    exp,
    first_lane,
    fma,
    load,
    load_bfloat16,
    maximum,
    prefetch,
    reduce_add,
    reduce_max,
    store,
    store_bfloat16,
)
from kernels.threads import next_item

KEY_TILE = 64
KEY_CHUNK = 512
QUERY_TILE_ROWS = 96
# A query tile of at most so many rows waits for memory, so the chunks of its keys are items of their own.
SPLIT_ROWS = GROUP
# Stands for minus infinity where inf - inf would be NaN: exp(_MASKED - anything real) is exactly 0.
_MASKED = np.float32(-1e30)


@shared
def tokens_per_query_tile(group_size: int) -> int:
    """Tokens of one query tile when `group_size` query heads share a KV head."""
    return max(1, QUERY_TILE_ROWS // group_size)


@shared
def state_words(head_dim: int) -> int:
    """Words of one row's state: a sum for each dimension, then the greatest score and the sum of weights."""
    return padded(head_dim) + LANES


@shared
def key_words(format: int, head_dim: int) -> int:
    """Words of one key."""
    return head_dim if format == FLOAT32 else -(-head_dim // 2)


@shared
def value_words(format: int, head_dim: int) -> int:
    """Words of one value: whole vectors."""
    return -(-head_dim // LANES) * (LANES if format == FLOAT32 else LANES // 2)


def token_words(format: int, head_dim: int) -> int:
    """Words of one token's key and value for one KV head."""
    return key_words(format, head_dim) + value_words(format, head_dim)


@shared
def _tile_rows(group_size: int) -> int:
    return padded_rows(max(QUERY_TILE_ROWS, group_size))


@shared
def _panel_words(head_dim: int) -> int:
    """Room for a tile of keys or of values, in either format."""
    return KEY_TILE * max(num_blocks(head_dim) * BLOCK, padded(head_dim))


def scratch_size(group_size: int, head_dim: int) -> int:
    """Words of working memory of one thread; zeros at first."""
    rows = _tile_rows(group_size)
    per_row = num_blocks(head_dim) * BLOCK + KEY_TILE + 2 * state_words(head_dim)
    return PANEL + 2 * _panel_words(head_dim) + rows * per_row + GROUP * KEY_TILE


@shared
def key_cache_size(format: int, cache_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """Words of one layer's keys."""
    return cache_blocks * num_kv_heads * key_words(format, head_dim) * block_size


@shared
def value_cache_size(
    format: int, cache_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> int:
    """Words of one layer's values."""
    return cache_blocks * num_kv_heads * block_size * value_words(format, head_dim)


@shared
def max_tiles(num_tokens: int, num_seqs: int, num_chunks: int, group_size: int) -> int:
    """Work items of a batch at most, whose longest context has `num_chunks` chunks."""
    return num_tokens // tokens_per_query_tile(group_size) + num_seqs * (1 + num_chunks)


@shared
def max_states(num_tokens: int, num_seqs: int, num_chunks: int, group_size: int) -> int:
    """States of a batch at most: only a sequence's last query tile is so small that it is split."""
    return num_tokens + num_seqs * (SPLIT_ROWS // group_size) * num_chunks


@kernel
def plan_tiles(query_start_loc, seq_lens, group_size, tile_sequence, tile_start, tile_chunk, state_start):
    """Writes the work items of a batch, those with the most keys first, and each token's first state.

    For the arrays see `attention`; `max_tiles` and `max_states` say how large. Returns the number of items.
    """
    tile_tokens = tokens_per_query_tile(group_size)
    num_tiles, num_states = 0, 0
    state_start[0] = 0
    for sequence in range(seq_lens.size):
        first, end = query_start_loc[sequence], query_start_loc[sequence + 1]
        last_tile = first + (end - 1 - first) // tile_tokens * tile_tokens
        num_chunks = (seq_lens[sequence] + KEY_CHUNK - 1) // KEY_CHUNK
        splits = (end - last_tile) * group_size <= SPLIT_ROWS and num_chunks > 1
        for token in range(first, end):
            num_states += num_chunks if splits and token >= last_tile else 1
            state_start[token + 1] = num_states
        start = last_tile - tile_tokens if splits else last_tile
        while start >= first:
            tile_sequence[num_tiles], tile_start[num_tiles], tile_chunk[num_tiles] = sequence, start, -1
            num_tiles += 1
            start -= tile_tokens
    for sequence in range(seq_lens.size):
        first, end = query_start_loc[sequence], query_start_loc[sequence + 1]
        last_tile = first + (end - 1 - first) // tile_tokens * tile_tokens
        if state_start[end] - state_start[end - 1] > 1:
            for chunk in range(state_start[end] - state_start[end - 1]):
                tile_sequence[num_tiles], tile_start[num_tiles] = sequence, last_tile
                tile_chunk[num_tiles] = chunk
                num_tiles += 1
    return num_tiles


@kernel
def store_kv(
    format, k, k_start, v, v_start, head_dim, num_kv_heads, block_size, slot, keys, values, layer_k, layer_v,
    scratch
):  # fmt: skip
    """Writes one token's keys and values, [num_kv_heads, head_dim] each, into cache slot `slot`.

    scratch: two heads, each up to a whole vector and one more.
    """
    block, offset = slot // block_size, slot % block_size
    words, stride = key_words(format, head_dim), value_words(format, head_dim)
    converted = -(-head_dim // LANES) * LANES
    for head in range(num_kv_heads):  # a decode's slots are far apart and in no cache: ask for all at once
        key = layer_k + (block * num_kv_heads + head) * words * block_size + offset
        value = layer_v + ((block * num_kv_heads + head) * block_size + offset) * stride
        for w in range(words):
            prefetch(keys, key + w * block_size)
        for i in range(0, stride, LANES):
            prefetch(values, value + i)
    for head in range(num_kv_heads):
        key = layer_k + (block * num_kv_heads + head) * words * block_size + offset
        value = layer_v + ((block * num_kv_heads + head) * block_size + offset) * stride
        for d in range(head_dim):
            scratch[d] = v[v_start + head * head_dim + d]
        for d in range(head_dim, converted):
            scratch[d] = 0.0
        for d in range(0, head_dim, LANES):
            if format == FLOAT32:
                store(values, value + d, load(scratch, d))
            else:
                store_bfloat16(values, value + d // 2, load(scratch, d))
        for d in range(head_dim):
            scratch[d] = k[k_start + head * head_dim + d]
        source = 0
        if format != FLOAT32:
            source = converted
            for d in range(0, head_dim, LANES):
                store_bfloat16(scratch, converted + d // 2, load(scratch, d))
        for w in range(words):
            keys[key + w * block_size] = scratch[source + w]


@kernel
def _gather_keys(
    keys, head_at, block_words, words, block_size, block_table, start, end, last, panels, panels_at,
    panel_words
):  # fmt: skip
    """Copies the keys of positions `start` to `end` to the columns of panels.

    The words of block b begin at `head_at + b * block_words`. Asks at the same pace for the next tile, as far
    as position `last`: a decode waits for memory alone, and the processor's own prefetching ends at each
    page, which is about a block.
    """
    position = start
    while position < end:
        at = head_at + block_table[position // block_size] * block_words + position % block_size
        ahead = min(position + KEY_TILE, last)
        next_at = head_at + block_table[ahead // block_size] * block_words + ahead % block_size
        column = position - start
        target = panels_at + column // PANEL * panel_words + column % PANEL
        if block_size % LANES == 0:  # then a vector never leaves its block, and may read on behind `end`
            for _ in range(words):
                prefetch(keys, next_at)
                store(panels, target, load(keys, at))
                at += block_size
                next_at += block_size
                target += PANEL
            position += LANES
        else:
            for _ in range(words):
                panels[target] = keys[at]
                at += block_size
                target += PANEL
            position += 1


@kernel
def _gather_values(
    format, values, head_at, block_words, stride, block_size, block_table, start, end, last, head_dim, panels,
    panels_at
):  # fmt: skip
    """Like `_gather_keys` for the values, as floats, in panels [dimensions / PANEL, KEY_TILE, PANEL]."""
    position = start
    while position < end:
        offset = position % block_size
        at = head_at + block_table[position // block_size] * block_words + offset * stride
        ahead = min(position + KEY_TILE, last)
        next_at = head_at + block_table[ahead // block_size] * block_words + ahead % block_size * stride
        target = panels_at + (position - start) * PANEL
        run = min(block_size - offset, end - position)
        for d in range(0, head_dim, LANES):
            panel = target + d // PANEL * (KEY_TILE * PANEL) + d % PANEL
            if format == FLOAT32:
                for j in range(run):
                    prefetch(values, next_at + d + j * stride)
                    store(panels, panel + j * PANEL, load(values, at + d + j * stride))
            else:
                for j in range(run):
                    prefetch(values, next_at + d // 2 + j * stride)
                    store(panels, panel + j * PANEL, load_bfloat16(values, at + d // 2 + j * stride))
        position += run


@kernel
def _prefetch_tile(
    format, keys, values, layer_k, layer_v, kv_head, num_kv_heads, head_dim, block_size, block_table, start,
    end
):  # fmt: skip
    """Asks for the keys and values of positions `start` to `end` of one KV head, at most a tile."""
    words, stride = key_words(format, head_dim), value_words(format, head_dim)
    position = start
    while position < end:
        head_block = block_table[position // block_size] * num_kv_heads + kv_head
        run = min(block_size - position % block_size, end - position)
        at = layer_k + head_block * words * block_size + position % block_size
        for _ in range(words):
            prefetch(keys, at)
            at += block_size
        at = layer_v + (head_block * block_size + position % block_size) * stride
        for i in range(0, run * stride, LANES):
            prefetch(values, at + i)
        position += run


@kernel
def _softmax_row(scratch, scores_at, visible, count, state, size, weights_at):
    """Turns one row's `count` scores into packed weights and rescales the row's sums so far.

    The first `visible` keys count, the others get weight 0. state: where the row's state is in `scratch`.
    """
    for j in range(max(visible, 0), count):
        scratch[scores_at + j] = _MASKED
    greatest = load(scratch, scores_at)
    for j in range(LANES, count, LANES):
        greatest = maximum(greatest, load(scratch, scores_at + j))
    old = scratch[state + size]
    new = max(old, reduce_max(greatest))
    total = broadcast(np.float32(0.0))
    for j in range(0, count, LANES):
        weight = exp(load(scratch, scores_at + j) - broadcast(new))
        total = total + weight
        store(scratch, weights_at + j * GROUP, weight)
    if new > old:
        scale = first_lane(exp(broadcast(old - new)))
        for d in range(0, size, LANES):
            store(scratch, state + d, load(scratch, state + d) * broadcast(scale))
        scratch[state + size] = new
        scratch[state + size + 1] *= scale
    scratch[state + size + 1] += reduce_add(total)


@kernel
def _merge(total, total_at, part, part_at, size):
    """Adds the state of a later chunk of keys to that of the chunks before it."""
    greatest = max(total[total_at + size], part[part_at + size])
    old = exp(broadcast(total[total_at + size] - greatest))
    new = exp(broadcast(part[part_at + size] - greatest))
    for d in range(0, size, LANES):
        store(total, total_at + d, fma(load(total, total_at + d), old, load(part, part_at + d) * new))
    total[total_at + size] = greatest
    total[total_at + size + 1] = total[total_at + size + 1] * first_lane(old) + part[
        part_at + size + 1
    ] * first_lane(new)


@kernel
def _attend_chunk(
    format, first_key, end_key, first_position, num_rows, group_size, kv_head, num_kv_heads, head_dim, keys,
    values, layer_k, layer_v, block_size, block_table, scratch, queries, scores, weights, key_panels,
    value_panels, state
):  # fmt: skip
    """Attention of a query tile's rows to the keys `first_key` to `end_key` of one KV head; fills `state`."""
    words, stride = key_words(format, head_dim), value_words(format, head_dim)
    row_words, size = state_words(head_dim), padded(head_dim)
    blocks = num_blocks(head_dim)
    panel_words = blocks * block_words(format) * PANEL
    zero = broadcast(np.float32(0.0))
    for row in range(num_rows):
        at = state + row * row_words
        for d in range(0, row_words, LANES):
            store(scratch, at + d, zero)
        scratch[at + size] = _MASKED
    key_block, value_block = num_kv_heads * words * block_size, num_kv_heads * stride * block_size
    head_k, head_v = layer_k + kv_head * words * block_size, layer_v + kv_head * stride * block_size
    for tile_start in range(first_key, end_key, KEY_TILE):
        tile_end = min(tile_start + KEY_TILE, end_key)
        tile_keys = tile_end - tile_start
        _gather_keys(
            keys, head_k, key_block, words, block_size, block_table, tile_start, tile_end, end_key - 1,
            scratch, key_panels, panel_words,
        )  # fmt: skip
        for first in range(0, num_rows, GROUP):
            height = min(GROUP, num_rows - first)
            # Of the tile's keys, those that the group's last row sees.
            seen = min(tile_keys, first_position + (first + height - 1) // group_size + 1 - tile_start)
            for panel in range(-(-seen // PANEL)):
                multiply_group(
                    format, height, scratch, queries + first * activation_words(format, head_dim),
                    scratch, key_panels + panel * panel_words, plain(0), blocks, scratch, plain(0),
                    scratch, scores + first * KEY_TILE + panel * PANEL, plain(KEY_TILE), plain(False),
                )  # fmt: skip
        _gather_values(
            format, values, head_v, value_block, stride, block_size, block_table, tile_start, tile_end,
            end_key - 1, head_dim, scratch, value_panels,
        )  # fmt: skip
        # Whole blocks of keys are multiplied, zeros behind the last.
        for panel in range(value_panels, value_panels + size * KEY_TILE, KEY_TILE * PANEL):
            for at in range(panel + tile_keys * PANEL, panel + num_blocks(tile_keys) * BLOCK * PANEL, LANES):
                store(scratch, at, zero)
        for first in range(0, num_rows, GROUP):
            height = min(GROUP, num_rows - first)
            seen = min(tile_keys, first_position + (first + height - 1) // group_size + 1 - tile_start)
            if seen <= 0:
                continue
            for row in range(first, first + height):
                visible = min(first_position + row // group_size + 1 - tile_start, tile_keys)
                _softmax_row(
                    scratch, scores + row * KEY_TILE, visible, num_blocks(seen) * BLOCK,
                    state + row * row_words, size, weights + (row - first) * CHUNK,
                )  # fmt: skip
            for panel in range(size // PANEL):
                multiply_group(
                    plain(FLOAT32), height, scratch, weights,
                    scratch, value_panels + panel * KEY_TILE * PANEL, plain(0), num_blocks(seen), scratch,
                    plain(0),
                    scratch, state + first * row_words + panel * PANEL, row_words, plain(True),
                )  # fmt: skip


@kernel
def attention(
    counters, format, qkv, qkv_stride, num_heads, num_kv_heads, head_dim, scale, keys, values, layer_k,
    layer_v, block_size, block_tables, query_start_loc, seq_lens, tile_sequence, tile_start, tile_chunk,
    state_start, states, scratch
):  # fmt: skip
    """One thread's share of causal attention of all new tokens of a batch.

    format: of the cache, FLOAT32 or BFLOAT16; qkv: flat rows of [num_heads + 2 * num_kv_heads, head_dim],
    rotated; keys, values: the flat caches, with this layer's part from `layer_k` and `layer_v` on;
    block_tables: [num_seqs, max_blocks]; query_start_loc: [num_seqs + 1]; seq_lens: [num_seqs], with the new
    tokens; tile_sequence, tile_start, tile_chunk: [num_tiles], each query tile's sequence, its first flat
    token row, and the one chunk of keys that it looks at or -1 for all; state_start: [num_tokens + 1], each
    token's first state; states: out, [num_states, num_heads, state_words]; scratch: this thread's own.
    """
    group_size = num_heads // num_kv_heads
    tile_tokens = tokens_per_query_tile(group_size)
    row_words, size, rows = state_words(head_dim), padded(head_dim), _tile_rows(group_size)
    # The scratch begins with the zeros that the products start from.
    key_panels = PANEL
    value_panels = key_panels + _panel_words(head_dim)
    queries = value_panels + _panel_words(head_dim)
    scores = queries + rows * num_blocks(head_dim) * BLOCK
    weights = scores + rows * KEY_TILE
    total = weights + GROUP * KEY_TILE
    part = total + rows * row_words

    num_items = tile_sequence.size * num_kv_heads
    item = next_item(counters)
    while item < num_items:
        following = next_item(counters)
        if following < num_items:  # its first keys are on their way while this item is computed
            ahead = following // num_kv_heads
            start = max(tile_chunk[ahead], 0) * KEY_CHUNK
            _prefetch_tile(
                format, keys, values, layer_k, layer_v, following % num_kv_heads, num_kv_heads, head_dim,
                block_size, block_tables[tile_sequence[ahead]], start,
                min(start + KEY_TILE, seq_lens[tile_sequence[ahead]]),
            )  # fmt: skip
        tile, kv_head = item // num_kv_heads, item % num_kv_heads
        sequence, first_token, chunk = tile_sequence[tile], tile_start[tile], tile_chunk[tile]
        end = query_start_loc[sequence + 1]
        count = min(tile_tokens, end - first_token)
        num_rows = count * group_size
        first_position = seq_lens[sequence] - end + first_token
        num_keys = first_position + count
        for row in range(num_rows):
            token, head = first_token + row // group_size, kv_head * group_size + row % group_size
            source = token * qkv_stride + head * head_dim
            for d in range(0, head_dim, LANES):
                store(scratch, part + d, load(qkv, source + d) * broadcast(scale))
            pack_row(format, scratch, part, head_dim, row, scratch, queries)
        first_key = max(chunk, 0) * KEY_CHUNK
        end_key = min(first_key + KEY_CHUNK, num_keys) if chunk >= 0 else num_keys
        for key in range(first_key, end_key, KEY_CHUNK):
            state = total if key == first_key else part
            _attend_chunk(
                format, key, min(key + KEY_CHUNK, end_key), first_position, num_rows, group_size, kv_head,
                num_kv_heads, head_dim, keys, values, layer_k, layer_v, block_size, block_tables[sequence],
                scratch, queries, scores, weights, key_panels, value_panels, state
            )  # fmt: skip
            if key > first_key:
                for row in range(num_rows):
                    if first_position + row // group_size >= key:
                        _merge(scratch, total + row * row_words, scratch, part + row * row_words, size)
        for row in range(num_rows):
            token, head = first_token + row // group_size, kv_head * group_size + row % group_size
            target = ((state_start[token] + max(chunk, 0)) * num_heads + head) * row_words
            for d in range(0, row_words, LANES):
                store(states, target + d, load(scratch, total + row * row_words + d))
        item = following


@kernel
def merge_states(states, first, end, num_heads, head_dim, out):
    """Joins one token's states `first` to `end`, in order, to the attention's output [num_heads * head_dim].

    out: up to a whole panel more. Overwrites the first state.
    """
    row_words, size = state_words(head_dim), padded(head_dim)
    for head in range(num_heads):
        total = (first * num_heads + head) * row_words
        for state in range(first + 1, end):
            _merge(states, total, states, (state * num_heads + head) * row_words, size)
        inverse = broadcast(np.float32(1.0) / states[total + size + 1])
        for d in range(0, size, LANES):
            store(out, head * head_dim + d, load(states, total + d) * inverse)
