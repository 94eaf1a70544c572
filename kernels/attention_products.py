"""The two products of attention: queries times a tile of keys, and their weights times its values.

A tile is `KEY_TILE` tokens of one sequence and KV head: four vectors of 16, each of which is in one block of
the KV cache (if a block holds whole vectors) and anywhere in memory. Both products read them from where they
are; other tiles are gathered first, as one block. A decode waits for memory, so a product asks for what the
next one reads: a line of each vector in turn, each vector's lines in order, whatever the order in which the
product itself walks. The processor's own prefetching follows such streams.

A score is one chain of multiply-adds over the dimensions in order, a sum of values one over the tile's keys.
"""

from functools import partial
from typing import Any

from pagellm.kernels.jit import by_height, kernel
from pagellm.kernels.packing import CHUNK, FLOAT32, GROUP, PANEL, activation_place
from pagellm.kernels.simd import (
    LANES,
    PAIR_WORDS,
    REGISTERS_PER_VECTOR,
    dot_bfloat16,
    load_tile,
    outer_product,
    outer_product_bfloat16,
    prefetch,
    start_tile,
    transposed,
    write_tile,
)

KEY_TILE = 64
TILE_COLUMNS = 2 * PANEL  # of the widest register tiles
# Two rows are computed as three: few sums wait for each other anyway, and one height less is compiled.
_HEIGHTS = tuple(height for height in (1, 3, 4, 6, 8, 12) if height <= GROUP)


@kernel
def gather_keys(keys, head, block_words, words, block_size, block_table, start, count, first, scratch, tile):
    """Copies the keys of `count` positions from `start` on side by side, as a block of `KEY_TILE` keys.

    keys: flat; the words of block b begin at `head + b * block_words`, [words, block_size]; block_table:
    [max_blocks]; first: stands for the positions before it; out: `scratch` from `tile` on, [words, KEY_TILE].
    """
    for column in range(count):
        position = max(start + column, first)
        at = head + block_table[position // block_size] * block_words + position % block_size
        for w in range(words):
            scratch[tile + w * KEY_TILE + column] = keys[at + w * block_size]


@kernel
def gather_values(
    values, head, block_words, stride, block_size, block_table, start, count, first, scratch, tile
):  # fmt: skip
    """Like `gather_keys` for the values, [block_size, stride] in a block, as [count, stride]."""
    for row in range(count):
        position = max(start + row, first)
        at = head + block_table[position // block_size] * block_words + position % block_size * stride
        for w in range(stride):
            scratch[tile + w] = values[at + w]
        tile += stride


@kernel
def values_of_keys(keys, places, word_stride, first_word, words, count, stride, scratch, tile):
    """Lays `words` words of each of a tile's first `count` keys, and of some more, out as its values.

    keys: flat; places: where each vector's first word is, the next `word_stride` further; first_word: of the
    words that are taken; out: `scratch` from `tile` on, [count, stride].
    """
    whole = words // LANES * LANES
    for first in range(0, count, LANES):
        source, target = _place(places, first // LANES) + first_word * word_stride, tile + first * stride
        for word in range(0, whole, LANES):
            block = load_tile(LANES, 1, keys, source + word * word_stride, word_stride)
            write_tile(transposed(block), LANES, scratch, target + word, stride, False)
        for key in range(LANES):
            for word in range(whole, words):
                scratch[target + key * stride + word] = keys[source + word * word_stride + key]


@kernel
def side_by_side(start, stride):
    """Where the four vectors of tokens of a gathered tile begin, whose tokens are `stride` words apart."""
    step = LANES * stride
    return start, start + step, start + 2 * step, start + 3 * step


@kernel
def tile_blocks(block_size, block_table, start, last):
    """The blocks of a tile's four vectors of neighbouring tokens and where in them each begins.

    block_table: [max_blocks]; start: the tile's first position; a vector behind position `last` stands for
    the one that holds it.
    """
    last = last // LANES * LANES
    first, second = min(start, last), min(start + LANES, last)
    third, fourth = min(start + 2 * LANES, last), min(start + 3 * LANES, last)
    a, b, c, d = first // block_size, second // block_size, third // block_size, fourth // block_size
    return (
        (block_table[a], first - a * block_size), (block_table[b], second - b * block_size),
        (block_table[c], third - c * block_size), (block_table[d], fourth - d * block_size),
    )  # fmt: skip


@kernel
def places(head, block_words, token_words, blocks):
    """Where each vector of `tile_blocks` begins, if the words of block b begin at `head + b * block_words`.

    The words of a token begin `token_words` after those of the token before.
    """
    first, second, third, fourth = blocks
    return (
        head + first[0] * block_words + first[1] * token_words,
        head + second[0] * block_words + second[1] * token_words,
        head + third[0] * block_words + third[1] * token_words,
        head + fourth[0] * block_words + fourth[1] * token_words,
    )


@kernel
def _place(places, vector):
    """One of a tile's four places; which of them is known only at run time."""
    first, second = (places[0], places[1]) if vector < 2 else (places[2], places[3])
    return first if vector % 2 == 0 else second


@kernel
def _first_of_one(places, column, word):
    """Where word `word` is of the vector of a tile's keys that begins with `column`."""
    return (_place(places, column // LANES) + word,)


@kernel
def _first_of_two(places, column, word):
    """Where word `word` is of each of two vectors of a tile's keys."""
    return _place(places, column // LANES) + word, _place(places, column // LANES + 1) + word


@kernel
def _first_of_four(places, column, word):
    """Where word `word` is of each of a tile's four vectors of keys."""
    return places[0] + word, places[1] + word, places[2] + word, places[3] + word


_VECTOR_PLACES = {1: _first_of_one, 2: _first_of_two, 4: _first_of_four}


@kernel
def _prefetch(words, places, at):
    """Asks for a line in each of a tile's four streams, `at` words from where it begins."""
    prefetch(words, places[0] + at)
    prefetch(words, places[1] + at)
    prefetch(words, places[2] + at)
    prefetch(words, places[3] + at)


def _num_vectors(height: int) -> int:
    """Vectors of a register tile: a panel, or two where its sums are too few to keep the processor busy.

    An addition takes about four cycles, and two can begin in each.
    """
    sums = height * PANEL // LANES * REGISTERS_PER_VECTOR
    return (PANEL if sums >= 8 else TILE_COLUMNS) // LANES


def _key_tile(product: Any, query_words: int, height: int) -> Any:
    """Scores of a tile's keys: `product` adds what a word of keys and `query_words` of queries give.

    A vector's values have as many lines as its keys have words.
    """
    vectors = _num_vectors(height)
    columns, vector_places = vectors * LANES, _VECTOR_PLACES[vectors]
    tiles = KEY_TILE // columns

    @kernel
    def multiply(x, queries, keys, places, count, values, ahead, word_stride, words, scores):
        for column in range(0, count, columns):
            tile = start_tile(height, vectors, x, 0)
            for word in range(words):
                if word % tiles == 0:
                    _prefetch(values, ahead, (column // columns * words + word) // tiles * LANES)
                query = queries + activation_place(word * query_words)
                key = vector_places(places, column, word * word_stride)
                tile = product(tile, height, x, query, CHUNK, keys, key)
            write_tile(tile, height, x, scores + column, KEY_TILE, False)

    return multiply


def _value_tile(product: Any, values_per_word: int, height: int) -> Any:
    """Adds a tile's weighted values to the sums, some dimensions at a time."""
    vectors = _num_vectors(height)
    columns = vectors * LANES
    keys_per_line = KEY_TILE * values_per_word // columns

    @kernel
    def multiply(x, weights, values, places, count, keys, ahead, word_stride, stride, sums, row_words, size):
        for column in range(0, size, columns):
            tile = start_tile(height, vectors, x, 0)
            word = column // values_per_word
            for first in range(0, count, LANES):
                value = _place(places, first // LANES) + word
                weight = weights + first * GROUP
                for key in range(min(LANES, count - first)):
                    if key % keys_per_line == 0:
                        _prefetch(keys, ahead, (word + (first + key) // keys_per_line) * word_stride)
                    tile = product(tile, height, x, weight + key, CHUNK, values, value + key * stride)
            write_tile(tile, height, x, sums + column, row_words, True)

    return multiply


_score_float32 = by_height(_HEIGHTS, partial(_key_tile, outer_product, 1))
_score_bfloat16 = by_height(_HEIGHTS, partial(_key_tile, dot_bfloat16, PAIR_WORDS))
_weigh_float32 = by_height(_HEIGHTS, partial(_value_tile, outer_product, 1))
_weigh_bfloat16 = by_height(_HEIGHTS, partial(_value_tile, outer_product_bfloat16, 2))


@kernel
def score_keys(
    format, rows, scratch, queries, keys, places, count, values, ahead, word_stride, words, scores
):  # fmt: skip
    """Writes the scores of a tile's first `count` keys, and of some more, for at most `GROUP` rows.

    scratch: flat, beginning with a row of `KEY_TILE` zeros; queries: where in it the first row of the packed
    queries [rows, head_dim] is; places: where each vector's first word is in `keys`, the next `word_stride`
    further; ahead: the places in `values` to ask for; scores: rows `KEY_TILE` apart.
    """
    if format == FLOAT32:
        _score_float32(
            rows, scratch, queries, keys, places, count, values, ahead, word_stride, words, scores
        )  # fmt: skip
    else:
        _score_bfloat16(
            rows, scratch, queries, keys, places, count, values, ahead, word_stride, words, scores
        )  # fmt: skip


@kernel
def add_values(
    format, rows, scratch, weights, values, places, count, keys, ahead, word_stride, stride, sums, row_words,
    size
):  # fmt: skip
    """Adds a tile's first `count` weighted values to the `size` sums of at most `GROUP` rows.

    weights: where in `scratch` the first row of the packed weights [rows, count] is; places: where each
    vector's first value is in `values`, the next `stride` further; ahead: the places in `keys` to ask for,
    the next word `word_stride` further; sums: rows `row_words` apart. The last sums may reach behind the
    value: what is added up there means nothing.
    """
    if format == FLOAT32:
        _weigh_float32(
            rows, scratch, weights, values, places, count, keys, ahead, word_stride, stride, sums, row_words,
            size,
        )  # fmt: skip
    else:
        _weigh_bfloat16(
            rows, scratch, weights, values, places, count, keys, ahead, word_stride, stride, sums, row_words,
            size,
        )  # fmt: skip
