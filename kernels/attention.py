"""Fused attention over a paged KV cache: online softmax, no attention matrix (Milakov and Gimelshein 2018).

A work item is one query tile (a run of a sequence's new tokens) for one KV head with all the query heads that
share it, or a tile of few rows for several KV heads; decodes and prefill chunks are the same thing with other
run lengths. The keys are walked through in chunks of `KEY_CHUNK` positions and, within them, tiles of
`KEY_TILE`, which begin at multiples of the sequence's own positions. Each chunk gives a state of its own
(sums, greatest score, sum of weights), and the states are merged in the order of the chunks. So the order of
every sum depends on key positions alone: not on the block size, the prefill chunk, the neighbours, or whether
the chunks of a long context were work items of their own, as they are in a decode (batch invariance). A key
that a row may not see gets weight exactly 0, which changes no bit of the row's sums. Where keys and values
lie is in `kernels.kv_cache`. Values that are a part of the keys (`kernels.latent`) are laid out as values
tile by tile, for all rows of a query tile.

With a window (Beltagy et al. 2020) a token sees so many of the last tokens, itself included. The walk of a
query tile starts at the vector of keys that holds the first one which any of its rows sees, and a token has
states of the chunks that it sees. So the cost does not grow with the context, and of a sequence's blocks only
those are read that hold a position from `first_seen(num_computed, window)` on, num_computed being the tokens
before its new ones: an entry of its block table before these may name any block, whatever that holds by now.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.activation import softcap
from pagellm.kernels.attention_products import (
    KEY_TILE,
    TILE_COLUMNS,
    add_values,
    gather_keys,
    gather_values,
    places,
    score_keys,
    side_by_side,
    tile_blocks,
    values_of_keys,
)
from pagellm.kernels.jit import kernel, kernel_apart, plain, shared
from pagellm.kernels.kv_cache import key_words, value_words
from pagellm.kernels.packing import (
    BLOCK,
    CHUNK,
    FLOAT32,
    GROUP,
    activation_words,
    num_blocks,
    pack_row,
    padded_rows,
)
from pagellm.kernels.simd import (
    LANES,
    broadcast,
    exp,
    first_lane,
    fma,
    load,
    maximum,
    reduce_add,
    reduce_max,
    store,
)
from pagellm.kernels.threads import next_item

KEY_CHUNK = 512
QUERY_TILE_ROWS = 96
# A query tile of at most so many rows waits for memory, so the chunks of its keys are items of their own, of
# several KV heads: what lies side by side in a block is read at once.
SPLIT_ROWS = GROUP
# Fewer query tiles than so many for each thread are shared out head by head, so that no thread idles.
_MIN_TILES = 4
# The greatest of no scores, where that of scores which are not seen, exp(_UNSEEN - _NO_SCORE), must be 0.
_NO_SCORE = np.float32(-1e30)
_UNSEEN = np.float32(-np.inf)


class Heads(NamedTuple):
    """The heads of a layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int
    value_start: int  # the dimension of the keys from which on they are values, too; -1: values are apart
    query_stride: int  # floats from the query of one head to that of the next
    scale: np.float32  # of queries times keys
    softcap: np.float32  # of scores; 0 for none
    window: int  # tokens that a token sees, itself included; 0: all before it


class Tiles(NamedTuple):
    """The new tokens of a batch, cut into query tiles by `plan_tiles` for one window."""

    query_start_loc: NDArray[np.int32]  # [num_seqs + 1]
    seq_lens: NDArray[np.int32]  # [num_seqs], with the new tokens
    group_size: int  # that they are cut for: the layer's own, or a greater one
    sequence: NDArray[np.int32]  # [num_tiles], each tile's sequence
    start: NDArray[np.int32]  # [num_tiles], its first flat token row
    chunk: NDArray[np.int32]  # [num_tiles], the one chunk of keys that it looks at, or -1 for all
    state_start: NDArray[np.int32]  # [num_tokens + 1], each token's first state


class _Item(NamedTuple):
    """A query tile and the KV heads that one work item is about."""

    first_position: int  # of the tile's first token, in its sequence
    first_key: int  # that the first row sees, and no row one before
    num_rows: int  # tokens times the query heads that share a KV head
    num_keys: int  # that the last row sees
    first_head: int
    end_head: int


class _Places(NamedTuple):
    """Where a thread's working memory holds what."""

    key_tile: int
    value_tile: int
    queries: int
    scores: int
    weights: int


@shared
def first_seen(position: int, window: int) -> int:
    """The first position that the token at `position` sees."""
    return max(position - window + 1, 0) if window > 0 else 0


@shared
def tokens_per_query_tile(group_size: int) -> int:
    """Tokens of one query tile when `group_size` query heads share a KV head."""
    return max(1, QUERY_TILE_ROWS // group_size)


@shared
def _num_sums(value_dim: int) -> int:
    """Sums of values of one row: those of whole register tiles."""
    return -(-value_dim // TILE_COLUMNS) * TILE_COLUMNS


@shared
def state_words(value_dim: int) -> int:
    """Words of one row's state: a sum for each dimension, then the greatest score and the sum of weights."""
    return _num_sums(value_dim) + LANES


@shared
def _tile_rows(group_size: int) -> int:
    """Rows of a query tile at most: a token's query heads are never apart."""
    return padded_rows(max(QUERY_TILE_ROWS, group_size))


@shared
def max_heads_per_item(group_size: int) -> int:
    """KV heads of a query tile of few rows that a thread has room for."""
    return _tile_rows(group_size) // GROUP


@shared
def choose_heads_per_item(num_tiles: int, num_threads: int, group_size: int) -> int:
    """KV heads of a work item of at most `SPLIT_ROWS` rows."""
    return max_heads_per_item(group_size) if num_tiles >= _MIN_TILES * num_threads else 1


@shared
def _value_tile_words(head_dim: int) -> int:
    """Room for a tile of values, in either format, and for what a register tile reads on behind the last."""
    return KEY_TILE * value_words(FLOAT32, head_dim) + TILE_COLUMNS


def scratch_size(group_size: int, head_dim: int) -> int:
    """Words of working memory of one thread, if values are as long as keys or shorter; zeros at first."""
    rows = _tile_rows(group_size)
    per_row = num_blocks(head_dim) * BLOCK + 2 * state_words(head_dim)
    tiles = KEY_TILE * head_dim + _value_tile_words(head_dim)
    return KEY_TILE + tiles + rows * per_row + 2 * GROUP * KEY_TILE


@shared
def max_tiles(num_tokens: int, num_seqs: int, num_chunks: int, group_size: int) -> int:
    """Work items of a batch at most, whose longest context has `num_chunks` chunks."""
    return num_tokens // tokens_per_query_tile(group_size) + num_seqs * (1 + num_chunks)


@shared
def _most_split_tokens(group_size: int) -> int:
    """Tokens of a query tile that is split: `SPLIT_ROWS` rows, or one token, however many heads it has."""
    return max(1, SPLIT_ROWS // group_size)


@shared
def max_states(num_tokens: int, num_seqs: int, num_chunks: int, group_size: int) -> int:
    """States of a batch at most: only a sequence's last query tile is so small that it is split."""
    return num_tokens + num_seqs * _most_split_tokens(group_size) * num_chunks


@kernel
def _last_tile(first, end, seq_len, group_size, window):
    """A sequence's last query tile: its first token and, if they are items of their own, its chunks of keys.

    first, end: the sequence's new tokens. The chunks are the first of them and their number, 0 if not split.
    """
    tile_tokens = tokens_per_query_tile(group_size)
    start = first + (end - 1 - first) // tile_tokens * tile_tokens
    first_chunk = first_seen(seq_len - end + start, window) // KEY_CHUNK
    num_chunks = (seq_len - 1) // KEY_CHUNK - first_chunk + 1
    splits = end - start <= _most_split_tokens(group_size) and num_chunks > 1
    return start, first_chunk, num_chunks if splits else 0


@kernel
def plan_tiles(
    query_start_loc, seq_lens, group_size, window, tile_sequence, tile_start, tile_chunk, state_start
):  # fmt: skip
    """Writes the work items of a batch, those with the most keys first, and each token's first state.

    query_start_loc: [num_seqs + 1]; seq_lens: [num_seqs]; out: tile_sequence, tile_start and tile_chunk,
    [max_tiles], and state_start, [num_tokens + 1], as in `Tiles`. Returns the number of items.
    """
    tile_tokens = tokens_per_query_tile(group_size)
    num_tiles, num_states = 0, 0
    state_start[0] = 0
    for sequence in range(seq_lens.size):
        first, end = query_start_loc[sequence], query_start_loc[sequence + 1]
        start, _, num_chunks = _last_tile(first, end, seq_lens[sequence], group_size, window)
        for token in range(first, end):
            position = seq_lens[sequence] - end + token
            seen_chunks = position // KEY_CHUNK - first_seen(position, window) // KEY_CHUNK + 1
            num_states += seen_chunks if num_chunks > 0 and token >= start else 1
            state_start[token + 1] = num_states
        if num_chunks > 0:
            start -= tile_tokens
        while start >= first:
            tile_sequence[num_tiles], tile_start[num_tiles], tile_chunk[num_tiles] = sequence, start, -1
            num_tiles += 1
            start -= tile_tokens
    for sequence in range(seq_lens.size):
        first, end = query_start_loc[sequence], query_start_loc[sequence + 1]
        start, first_chunk, num_chunks = _last_tile(first, end, seq_lens[sequence], group_size, window)
        for chunk in range(first_chunk, first_chunk + num_chunks):
            tile_sequence[num_tiles], tile_start[num_tiles], tile_chunk[num_tiles] = sequence, start, chunk
            num_tiles += 1
    return num_tiles


@kernel
def _softmax(
    heads, scratch, scores, first_row, rows, position, count, states, row_words, size, weights
):  # fmt: skip
    """Turns the scores of `rows` rows of a query tile into packed weights and rescales their sums so far.

    scores: where in `scratch` they are, [rows, KEY_TILE]; weights: where the packed ones go, `GROUP` rows.
    position: where the query tile's first token is, counted from the first of the tile's `count` keys, of
    which a row sees those up to its token; states: where the first row's state is in `scratch`. In two passes
    over the rows, because within a row each step waits for the one before; the first leaves each row's new
    greatest score behind its state.
    """
    group_size = heads.num_heads // heads.num_kv_heads
    if heads.softcap > 0.0:
        softcap(scratch, scores, rows * KEY_TILE, heads.softcap)
    if heads.window > 0:
        for row in range(rows):
            begin = position + (first_row + row) // group_size + 1 - heads.window
            for j in range(min(begin, count)):
                scratch[scores + row * KEY_TILE + j] = _UNSEEN
    for row in range(rows):
        row_scores, greatest_at = scores + row * KEY_TILE, states + row * row_words + size
        visible = min(position + (first_row + row) // group_size + 1, count)
        for j in range(max(visible, 0), -(-count // LANES) * LANES):
            scratch[row_scores + j] = _UNSEEN
        greatest = load(scratch, row_scores)
        for j in range(LANES, count, LANES):
            greatest = maximum(greatest, load(scratch, row_scores + j))
        scratch[greatest_at + 2] = max(scratch[greatest_at], reduce_max(greatest))
    for row in range(rows):
        row_scores, row_weights = scores + row * KEY_TILE, weights + row * CHUNK
        state = states + row * row_words
        greatest_at, total_at = state + size, state + size + 1
        old, new = scratch[greatest_at], scratch[greatest_at + 2]
        total = broadcast(np.float32(0.0))
        for j in range(0, count, LANES):
            weight = exp(load(scratch, row_scores + j) - broadcast(new))
            total = total + weight
            store(scratch, row_weights + j * GROUP, weight)
        if new > old:
            scale = first_lane(exp(broadcast(old - new)))
            for d in range(0, size, LANES):
                store(scratch, state + d, load(scratch, state + d) * broadcast(scale))
            scratch[greatest_at] = new
            scratch[total_at] *= scale
        scratch[total_at] += reduce_add(total)


@kernel
def _merge(total, total_at, part, part_at, size):
    """Adds the state [size + 2] at `part_at`, of a later chunk of keys, to that of the chunks before it."""
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
def _attend_chunk(heads, cache, block_table, item, first_key, end_key, scratch, at, states):
    """Attention of a query tile's rows to the keys `first_key` to `end_key` of some KV heads.

    block_table: of the tile's sequence, [max_blocks]; scratch: flat; at: where in it what is; states: where
    in it the first head's states are, [padded rows, state_words], those of the next behind, as with the
    queries. Asks for the keys of each next tile while it reads this one, as far as the query tile's last
    key, for whoever computes the next chunk.
    """
    format, block_size = cache.format, cache.block_size
    first_head, end_head, num_rows = item.first_head, item.end_head, item.num_rows
    group_size, last = heads.num_heads // heads.num_kv_heads, item.num_keys - 1
    words, stride = key_words(format, heads.head_dim), value_words(format, heads.value_dim)
    per_word = 1 if format == FLOAT32 else 2
    row_words, size = state_words(heads.value_dim), _num_sums(heads.value_dim)
    rows_per_head = padded_rows(num_rows)  # register tiles may be higher than their rows
    zero = broadcast(np.float32(0.0))
    for state in range(states, states + (end_head - first_head) * rows_per_head * row_words, row_words):
        for d in range(0, row_words, LANES):
            store(scratch, state + d, zero)
        scratch[state + size] = _NO_SCORE
    key_block = heads.num_kv_heads * words * block_size
    value_block = heads.num_kv_heads * stride * block_size
    tile_start = max(first_key, item.first_key // LANES * LANES)  # a lane is a position's in every tile
    blocks = tile_blocks(block_size, block_table, tile_start, last)
    while tile_start < end_key:
        tile_end = min(tile_start // KEY_TILE * KEY_TILE + KEY_TILE, end_key)
        count = tile_end - tile_start
        following = tile_blocks(block_size, block_table, tile_end, last)
        for head in range(first_head, end_head):
            head_k = cache.layer_k + head * words * block_size
            head_v = cache.layer_v + head * stride * block_size
            if head + 1 < end_head:
                ahead = places(head_k + words * block_size, key_block, plain(1), blocks)
            else:
                ahead = places(
                    cache.layer_k + first_head * words * block_size, key_block, plain(1), following
                )
            # A vector of tokens may hold some behind the end: they are not seen, and their values not read.
            if block_size % LANES == 0:
                source_k, word_stride = cache.keys, np.int64(block_size)
                places_k = places(head_k, key_block, plain(1), blocks)
            else:
                gather_keys(
                    cache.keys, head_k, key_block, words, block_size, block_table, tile_start, count,
                    item.first_key, scratch, at.key_tile,
                )  # fmt: skip
                source_k, word_stride = scratch, np.int64(KEY_TILE)
                places_k = side_by_side(at.key_tile, plain(1))
            if heads.value_start >= 0:
                values_of_keys(
                    source_k, places_k, word_stride, heads.value_start // per_word,
                    -(-heads.value_dim // per_word), count, stride, scratch, at.value_tile,
                )  # fmt: skip
                source_v, places_v = scratch, side_by_side(at.value_tile, stride)
            elif block_size % LANES == 0:
                source_v, places_v = cache.values, places(head_v, value_block, stride, blocks)
            else:
                gather_values(
                    cache.values, head_v, value_block, stride, block_size, block_table, tile_start, count,
                    item.first_key, scratch, at.value_tile,
                )  # fmt: skip
                source_v, places_v = scratch, side_by_side(at.value_tile, stride)
            query_words = activation_words(format, heads.head_dim)
            query = at.queries + (head - first_head) * rows_per_head * query_words
            state = states + (head - first_head) * rows_per_head * row_words
            for first in range(0, num_rows, GROUP):
                height = min(GROUP, num_rows - first)
                # Its first row sees the first keys that the group sees, its last row the last ones.
                if heads.window > 0:
                    position = item.first_position + first // group_size
                    if first_seen(position, heads.window) >= tile_start + count:
                        continue
                if item.first_position + (first + height - 1) // group_size < tile_start:
                    continue
                score_keys(
                    format, height, scratch, query + first * query_words, source_k,
                    places_k, count, source_v, places_v, word_stride, words, at.scores,
                )  # fmt: skip
                _softmax(
                    heads, scratch, at.scores, first, height, item.first_position - tile_start, count,
                    state + first * row_words, row_words, size, at.weights,
                )  # fmt: skip
                add_values(
                    format, height, scratch, at.weights, source_v, places_v, count, cache.keys, ahead,
                    block_size, stride, state + first * row_words, row_words, size,
                )  # fmt: skip
                ahead = places_k  # the first rows have asked for the next tile
        tile_start, blocks = tile_end, following


@kernel_apart
def attention(
    counters, heads_per_item, heads, queries, row_stride, cache, block_tables, tiles, states, scratch
):  # fmt: skip
    """One thread's share of causal attention of all new tokens of a batch.

    heads_per_item: of `choose_heads_per_item`; heads: `Heads`; queries: flat rows, `row_stride` apart, that
    begin with the queries of all heads, rotated; cache: `LayerCache`; block_tables: [num_seqs, max_blocks];
    tiles: `Tiles`; states: out, [num_states, num_heads, state_words]; scratch: this thread's own,
    [scratch_size].
    """
    format, head_dim, group_size = cache.format, heads.head_dim, heads.num_heads // heads.num_kv_heads
    tile_tokens = tokens_per_query_tile(tiles.group_size)
    row_words, size = state_words(heads.value_dim), _num_sums(heads.value_dim)
    rows = _tile_rows(group_size)
    # The scratch begins with the zeros that the products start from, at most a row of a tile's scores.
    value_tile = KEY_TILE + KEY_TILE * head_dim
    packed = value_tile + _value_tile_words(head_dim)
    scores = packed + rows * num_blocks(head_dim) * BLOCK
    weights = scores + GROUP * KEY_TILE
    at = _Places(KEY_TILE, value_tile, packed, scores, weights)
    total = weights + GROUP * KEY_TILE
    part = total + rows * row_words

    num_items = tiles.sequence.size * heads.num_kv_heads
    number = next_item(counters)
    while number < num_items:
        tile, first_head = number // heads.num_kv_heads, number % heads.num_kv_heads
        sequence, first_token, chunk = tiles.sequence[tile], tiles.start[tile], tiles.chunk[tile]
        end = tiles.query_start_loc[sequence + 1]
        count = min(tile_tokens, end - first_token)
        num_rows, rows_per_head = count * group_size, padded_rows(count * group_size)
        end_head = first_head + 1
        if num_rows <= SPLIT_ROWS:
            end_head = min(first_head + heads_per_item, heads.num_kv_heads)
            if first_head % heads_per_item > 0:  # belongs to an item before
                number = next_item(counters)
                continue
        first_position = tiles.seq_lens[sequence] - end + first_token
        num_keys = first_position + count
        first_key = first_seen(first_position, heads.window)
        item = _Item(first_position, first_key, num_rows, num_keys, first_head, end_head)
        for head in range(first_head, end_head):
            query = packed + (head - first_head) * rows_per_head * activation_words(format, head_dim)
            for row in range(num_rows):
                source = (first_token + row // group_size) * row_stride
                source += (head * group_size + row % group_size) * heads.query_stride
                for d in range(0, head_dim, LANES):
                    store(scratch, part + d, load(queries, source + d) * broadcast(heads.scale))
                pack_row(format, scratch, part, head_dim, row, scratch, query)
        start = chunk * KEY_CHUNK if chunk >= 0 else first_key // KEY_CHUNK * KEY_CHUNK
        end_key = min(start + KEY_CHUNK, num_keys) if chunk >= 0 else num_keys
        for key in range(start, end_key, KEY_CHUNK):
            state = total if key == start else part
            _attend_chunk(
                heads, cache, block_tables[sequence], item, key, min(key + KEY_CHUNK, end_key), scratch, at,
                state,
            )  # fmt: skip
            if key > start:
                for row in range(rows_per_head * (end_head - first_head)):
                    position = first_position + row % rows_per_head // group_size
                    if first_seen(position, heads.window) >= key:  # the row has seen no chunk before
                        for d in range(row * row_words, (row + 1) * row_words, LANES):
                            store(scratch, total + d, load(scratch, part + d))
                    elif position >= key:
                        _merge(scratch, total + row * row_words, scratch, part + row * row_words, size)
        for head in range(first_head, end_head):
            source = total + (head - first_head) * rows_per_head * row_words
            for row in range(num_rows):
                token, query_head = first_token + row // group_size, head * group_size + row % group_size
                state = tiles.state_start[token]
                if chunk >= 0:  # a token has a state of each chunk that it sees
                    position = first_position + row // group_size
                    first_chunk = first_seen(position, heads.window) // KEY_CHUNK
                    if chunk < first_chunk or chunk > position // KEY_CHUNK:
                        continue
                    state += chunk - first_chunk
                state = state * heads.num_heads + query_head
                for d in range(0, row_words, LANES):
                    store(states, state * row_words + d, load(scratch, source + row * row_words + d))
        number = next_item(counters)


@kernel
def merge_states(states, first, end, num_heads, value_dim, sinks, sinks_start, out):
    """Joins one token's states `first` to `end`, in order, to the attention's output [num_heads * value_dim].

    sinks: holds at `sinks_start` the score of each head that no value belongs to, a share of the weights that
    is given to nothing (Xiao et al. 2023); sinks_start < 0: heads have none. out: up to a whole vector more.
    Overwrites the first state.
    """
    row_words, size = state_words(value_dim), _num_sums(value_dim)
    for head in range(num_heads):
        total = (first * num_heads + head) * row_words
        for state in range(first + 1, end):
            _merge(states, total, states, (state * num_heads + head) * row_words, size)
        inverse = broadcast(np.float32(1.0) / states[total + size + 1])
        if sinks_start >= 0:
            sink, greatest = sinks[sinks_start + head], states[total + size]
            old = first_lane(exp(broadcast(greatest - max(greatest, sink))))
            new = first_lane(exp(broadcast(sink - max(greatest, sink))))
            inverse = broadcast(old / (states[total + size + 1] * old + new))
        for d in range(0, value_dim, LANES):
            store(out, head * value_dim + d, load(states, total + d) * inverse)
