"""The two products of attention: queries times a tile of keys, and their weights times its values.

A tile is `KEY_TILE` tokens of one sequence and KV head: four vectors of 16, each of which is in one block of
the KV cache (if a block holds whole vectors) and anywhere in memory. Both products read all four side by side
from where they are, because a decode waits for memory alone and memory serves several streams at once best,
and ask as they go for the places that are read next. Other tiles are gathered first, as one block.

A score is one chain of multiply-adds over the dimensions in order. A sum of values is one chain over the
tile's keys in the order 0, 16, 32, 48, 1, 17, 33, 49, 2 and so on, which depends on positions alone.
"""

from functools import partial
from typing import Any

from kernels.jit import by_height, kernel
from kernels.packing import CHUNK, FLOAT32, GROUP, PANEL, activation_place
from kernels.simd import (
    LANES,
    PAIR_WORDS,
    dot_bfloat16,
    outer_product,
    outer_product_bfloat16,
    prefetch,
    start_tile,
    write_tile,
)

KEY_TILE = 64
_VECTORS = PANEL // LANES
# Rows of a register tile beside two vectors of keys; half as many leave room for four.
ROWS = max(1, GROUP * _VECTORS // 2)
_HEIGHTS = tuple(height for height in (1, 2, 3, 4, 6, 8, 12) if height <= ROWS)


@kernel
def gather_keys(keys, head, block_words, words, block_size, block_table, start, end, scratch, tile):
    """Copies the keys of positions `start` to `end` side by side, as a block of `KEY_TILE` keys.

    The words of block b begin at `head + b * block_words`.
    """
    for column in range(end - start):
        position = start + column
        at = head + block_table[position // block_size] * block_words + position % block_size
        for w in range(words):
            scratch[tile + w * KEY_TILE + column] = keys[at + w * block_size]


@kernel
def gather_values(values, head, block_words, stride, block_size, block_table, start, end, scratch, tile):
    """Like `gather_keys` for the values, with zeros behind the last."""
    for position in range(start, end):
        at = head + block_table[position // block_size] * block_words + position % block_size * stride
        for w in range(stride):
            scratch[tile + w] = values[at + w]
        tile += stride
    for w in range((start + KEY_TILE - end) * stride):
        scratch[tile + w] = 0.0


@kernel
def side_by_side(start, stride):
    """Where the four vectors of tokens of a gathered tile begin, whose tokens are `stride` words apart."""
    step = LANES * stride
    return start, start + step, start + 2 * step, start + 3 * step


@kernel
def tile_places(head, block_words, token_words, block_size, block_table, start, last):
    """Where each of a tile's four vectors of neighbouring tokens begins, the last not behind position `last`.

    The words of block b begin at `head + b * block_words`, those of a token `token_words` after another's.
    """
    last = last // LANES * LANES
    first, second = min(start, last), min(start + LANES, last)
    third, fourth = min(start + 2 * LANES, last), min(start + 3 * LANES, last)
    return (
        head + block_table[first // block_size] * block_words + first % block_size * token_words,
        head + block_table[second // block_size] * block_words + second % block_size * token_words,
        head + block_table[third // block_size] * block_words + third % block_size * token_words,
        head + block_table[fourth // block_size] * block_words + fourth % block_size * token_words,
    )


def _key_tile(product: Any, query_words: int, height: int) -> Any:
    """Scores of a tile's keys: `product` adds what a word of keys and `query_words` of queries give."""

    @kernel
    def two(x, queries, keys, first, second, ahead, next_ahead, word_stride, words, scores):
        tile = start_tile(height, 2, x, 0)
        for word in range(words):
            query = queries + activation_place(word * query_words)
            at = word * word_stride
            prefetch(keys, ahead + at)
            prefetch(keys, next_ahead + at)
            tile = product(tile, height, x, query, CHUNK, keys, (first + at, second + at))
        write_tile(tile, height, x, scores, KEY_TILE, False)

    @kernel
    def by_two(x, queries, keys, places, ahead, word_stride, words, scores):
        first, second, third, fourth = places
        two(x, queries, keys, first, second, ahead[0], ahead[1], word_stride, words, scores)
        two(x, queries, keys, third, fourth, ahead[2], ahead[3], word_stride, words, scores + 2 * LANES)

    @kernel
    def four(x, queries, keys, places, ahead, word_stride, words, scores):
        first, second, third, fourth = places
        tile = start_tile(height, 4, x, 0)
        for word in range(words):
            query = queries + activation_place(word * query_words)
            at = word * word_stride
            prefetch(keys, ahead[0] + at)
            prefetch(keys, ahead[1] + at)
            prefetch(keys, ahead[2] + at)
            prefetch(keys, ahead[3] + at)
            columns = first + at, second + at, third + at, fourth + at
            tile = product(tile, height, x, query, CHUNK, keys, columns)
        write_tile(tile, height, x, scores, KEY_TILE, False)

    return four if 2 * height <= ROWS else by_two


def _value_tile(product: Any, panel_words: int, height: int) -> Any:
    """Adds a tile's weighted values to a panel of sums: one key of each vector in turn, for more streams."""

    @kernel
    def multiply(x, weights, values, start, places, ahead, stride, sums, row_words):
        tile = start_tile(height, _VECTORS, x, 0)
        for key in range(LANES):
            at = start + key * stride
            for w in range(at, at + panel_words, LANES):
                prefetch(values, ahead[0] + w)
                prefetch(values, ahead[1] + w)
                prefetch(values, ahead[2] + w)
                prefetch(values, ahead[3] + w)
            weight = weights + key
            tile = product(tile, height, x, weight, CHUNK, values, places[0] + at)
            tile = product(tile, height, x, weight + GROUP * CHUNK, CHUNK, values, places[1] + at)
            tile = product(tile, height, x, weight + 2 * GROUP * CHUNK, CHUNK, values, places[2] + at)
            tile = product(tile, height, x, weight + 3 * GROUP * CHUNK, CHUNK, values, places[3] + at)
        write_tile(tile, height, x, sums, row_words, True)

    return multiply


_score_float32 = by_height(_HEIGHTS, partial(_key_tile, outer_product, 1))
_score_bfloat16 = by_height(_HEIGHTS, partial(_key_tile, dot_bfloat16, PAIR_WORDS))
_weigh_float32 = by_height(_HEIGHTS, partial(_value_tile, outer_product, PANEL))
_weigh_bfloat16 = by_height(_HEIGHTS, partial(_value_tile, outer_product_bfloat16, PANEL // 2))


@kernel
def score_keys(format, rows, scratch, queries, keys, places, ahead, word_stride, words, scores):
    """Writes the scores of a tile's keys for at most `ROWS` rows, rows `KEY_TILE` apart.

    queries: where the first row is in packed activations in `scratch`, which begins with a row of zeros;
    places: where each vector's first word is in `keys`, the next `word_stride` further; ahead: the places to
    ask for.
    """
    if format == FLOAT32:
        _score_float32(rows, scratch, queries, keys, places, ahead, word_stride, words, scores)
    else:
        _score_bfloat16(rows, scratch, queries, keys, places, ahead, word_stride, words, scores)


@kernel
def add_values(format, rows, scratch, weights, values, panel, places, ahead, stride, sums, row_words):
    """Adds a tile's weighted values to a panel of the sums of at most `ROWS` rows, `row_words` apart.

    weights: where the first row is in packed activations in `scratch`; places: where each vector's first
    value is in `values`, the next `stride` further. A last panel may reach behind the value: what it adds up
    there means nothing.
    """
    if format == FLOAT32:
        _weigh_float32(
            rows, scratch, weights, values, panel * PANEL, places, ahead, stride, sums, row_words
        )  # fmt: skip
    else:
        _weigh_bfloat16(
            rows, scratch, weights, values, panel * (PANEL // 2), places, ahead, stride, sums, row_words
        )  # fmt: skip
