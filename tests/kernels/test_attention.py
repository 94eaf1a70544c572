"""Paged attention: the oracle's numbers, and the same bits however the tokens were stored, cut and batched.

Every cache slot that holds no token is NaN, in this layer and in the others, so whatever reads one shows.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pagellm.kernels.activation import SILU
from pagellm.kernels.architecture import Architecture, layer_rows
from pagellm.kernels.attention import (
    KEY_CHUNK,
    QUERY_TILE_ROWS,
    Tiles,
    attention,
    max_heads_per_item,
    max_states,
    max_tiles,
    merge_states,
    plan_tiles,
    scratch_size,
    state_words,
    tokens_per_query_tile,
)
from pagellm.kernels.attention import Heads as LayerHeads
from pagellm.kernels.attention_products import KEY_TILE
from pagellm.kernels.buffers import new_workspace
from pagellm.kernels.kv_cache import (
    LayerCache,
    key_cache_size,
    store_kv,
    store_scratch_size,
    token_words,
    value_cache_size,
)
from pagellm.kernels.packing import BFLOAT16, FLOAT32
from pagellm.kernels.simd import LANES
from pagellm.kernels.threads import new_counters
from tests import oracles
from tests.conftest import at_most
from tests.kernels.layouts import (
    FORMATS,
    Exact,
    Matrix,
    are_floats,
    is_poison,
    poisoned,
    random_matrix,
    whole_panels,
)

NUM_LAYERS, LAYER = 3, 1
BLOCK_SIZES = [1, 2, 5, 16, 24, 64]

both_formats = pytest.mark.parametrize("format", [FLOAT32, BFLOAT16], ids=FORMATS.get)


@dataclass(frozen=True)
class Heads:
    """The heads of a model, how its scores are scaled, and the format of its cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float = 0.3
    format: int = FLOAT32
    cap: float = 0.0
    window: int = 0
    latent: int = 0  # the last dimensions of the keys that are the values; 0: these are apart

    @property
    def value_dim(self) -> int:
        return self.latent or self.head_dim

    @property
    def cached_value_dim(self) -> int:
        return 0 if self.latent else self.head_dim

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Context:
    """One sequence's queries, keys and values of all of its tokens."""

    queries: Matrix  # [num_tokens, num_heads, head_dim]
    keys: Matrix  # [num_tokens, num_kv_heads, head_dim]
    values: Matrix  # [num_tokens, num_kv_heads, value_dim]


@dataclass(frozen=True)
class Run:
    """A sequence's new tokens, from `start` up to `end`; those before are in the cache already."""

    context: Context
    start: int
    end: int


def context(heads: Heads, num_tokens: int, seed: int = 0) -> Context:
    rng = np.random.default_rng((seed, num_tokens))
    kv_shape = (num_tokens, heads.num_kv_heads, heads.head_dim)
    queries = random_matrix(rng, num_tokens, heads.num_heads, heads.head_dim)
    keys, values = random_matrix(rng, *kv_shape), random_matrix(rng, *kv_shape)
    return Context(queries, keys, keys[..., -heads.latent :] if heads.latent else values)


@dataclass(frozen=True)
class Tile:
    """A work item: a run of new tokens of one sequence of the batch, and one chunk of their keys or all."""

    sequence: int
    first_token: int
    chunk: int = -1


def query_tiles(
    heads: Heads, batch: list[Run], split: bool | None, group_size: int
) -> tuple[list[Tile], list[int]]:
    """The work items of a batch, and how many states each token gets.

    split: an item for each chunk of keys of each tile, or of none, or of those that `plan_tiles` chooses.
    group_size: the tiles suit so many query heads that share a KV head, or fewer.
    """
    if split is None:
        return planned(heads, batch, group_size)
    per_tile = tokens_per_query_tile(group_size)
    tiles, states, token = [], [], 0
    for index, run in enumerate(batch):
        for start in range(run.start, run.end, per_tile):
            end = min(start + per_tile, run.end)
            chunks = seen_chunks(heads, start, end) if split else [-1]
            tiles += [Tile(index, token, chunk) for chunk in chunks]
            states += [len(seen_chunks(heads, t, t + 1)) if split else 1 for t in range(start, end)]
            token += end - start
    return tiles, states


def seen_chunks(heads: Heads, start: int, end: int) -> list[int]:
    """The chunks of keys that the tokens at positions `start` to `end` see."""
    first = max(start - heads.window + 1, 0) if heads.window else 0
    return list(range(first // KEY_CHUNK, (end - 1) // KEY_CHUNK + 1))


def planned(heads: Heads, batch: list[Run], group_size: int | None = None) -> tuple[list[Tile], list[int]]:
    group_size = group_size or heads.group_size
    counts = [run.end - run.start for run in batch]
    longest = max(-(-run.end // KEY_CHUNK) for run in batch)
    most = sum(counts), len(batch), longest, group_size
    guard = 5
    sequence, start, chunk = (np.full(max_tiles(*most) + guard, -7, np.int32) for _ in range(3))
    state_start = np.full(sum(counts) + 1 + guard, -7, np.int32)
    num_tiles = plan_tiles(
        np.cumsum([0, *counts]).astype(np.int32), np.array([run.end for run in batch], np.int32),
        group_size, heads.window, sequence, start, chunk, state_start,
    )  # fmt: skip
    for array, used in ((sequence, num_tiles), (start, num_tiles), (chunk, num_tiles)):
        assert used + guard <= array.size
        assert (array[used:] == -7).all()
    assert (state_start[-guard:] == -7).all()
    states = np.diff(state_start[:-guard]).tolist()
    assert state_start[0] == 0
    assert sum(states) <= max_states(*most)
    tiles = zip(sequence.tolist(), start.tolist(), chunk.tolist(), strict=True)
    return [Tile(*tile) for tile in tiles][:num_tiles], states


def attend(
    heads: Heads,
    batch: list[Run],
    block_size: int = 16,
    *,
    split: bool | None = False,
    heads_per_item: int = 1,
    planned_group_size: int | None = None,
    seed: int = 0,
) -> list[Matrix]:
    """Attention of a batch on freshly filled blocks in a random order: [new tokens, num_heads, head_dim]s.

    The order of the work items is random as well. Blocks behind the window have been given back: the entries
    of their table name one that holds no token.
    """
    assert heads_per_item <= max_heads_per_item(heads.group_size)
    rng = np.random.default_rng(seed)
    lengths = [run.end for run in batch]
    blocks_of = [-(-length // block_size) for length in lengths]
    num_blocks = sum(blocks_of) + 1
    order = rng.permutation(num_blocks).astype(np.int32)
    block_tables = np.zeros((len(batch), max(blocks_of)), np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum([0, *blocks_of]), blocks_of, strict=False)):
        block_tables[row, :count] = order[first : first + count]

    cache_shape = (heads.format, num_blocks, block_size, heads.num_kv_heads)
    layer_k = key_cache_size(*cache_shape, heads.head_dim)
    layer_v = value_cache_size(*cache_shape, heads.cached_value_dim)
    keys, values = poisoned(NUM_LAYERS * layer_k + LANES), poisoned(NUM_LAYERS * layer_v)
    scratch = poisoned(store_scratch_size(heads.head_dim) + LANES)
    for run, table in zip(batch, block_tables, strict=True):
        k, v = run.context.keys.reshape(-1), run.context.values.reshape(-1)
        given_back = max(run.start - heads.window + 1, 0) // block_size if heads.window else 0
        table[:given_back] = order[-1]
        for position in range(given_back * block_size, run.end):
            slot = int(table[position // block_size]) * block_size + position % block_size
            start = position * heads.num_kv_heads * heads.head_dim
            v_start = position * heads.num_kv_heads * heads.value_dim
            store_kv(
                heads.format, k, start, v, v_start, heads.head_dim, heads.cached_value_dim,
                heads.num_kv_heads, block_size, slot, keys, values, LAYER * layer_k, LAYER * layer_v,
                scratch[:-LANES],
            )  # fmt: skip
    for cache, layer in ((keys, layer_k), (values, layer_v)):
        assert is_poison(cache[: LAYER * layer]), "wrote to the layer before"
        assert is_poison(cache[(LAYER + 1) * layer :]), "wrote to the layer behind"
    assert is_poison(scratch[-LANES:]), "wrote past its scratch memory"

    counts = [run.end - run.start for run in batch]
    query_start_loc = np.cumsum([0, *counts]).astype(np.int32)
    num_tokens, size = int(query_start_loc[-1]), heads.num_heads * heads.head_dim
    stride = whole_panels(size + 2 * heads.num_kv_heads * heads.head_dim)
    qkv = np.full((num_tokens, stride), np.nan, np.float32)
    qkv[:, :size] = np.concatenate([r.context.queries[r.start : r.end] for r in batch]).reshape(-1, size)

    group_size = planned_group_size or heads.group_size
    tiles, states_of = query_tiles(heads, batch, split, group_size)
    tiles = [tiles[i] for i in rng.permutation(len(tiles))]
    state_start = np.cumsum([0, *states_of]).astype(np.int32)
    states = poisoned(int(state_start[-1]) * heads.num_heads * state_words(heads.value_dim) + 64)
    scratch = np.zeros(scratch_size(heads.group_size, heads.head_dim) + 64, np.float32)
    scratch[-64:] = 7.0
    before = keys.copy(), values.copy()
    attention(
        new_counters(), heads_per_item,
        LayerHeads(
            heads.num_heads, heads.num_kv_heads, heads.head_dim, heads.value_dim,
            heads.head_dim - heads.latent if heads.latent else -1, heads.head_dim, np.float32(heads.scale),
            np.float32(heads.cap), heads.window,
        ),
        qkv.reshape(-1), stride,
        LayerCache(heads.format, block_size, keys, values, LAYER * layer_k, LAYER * layer_v), block_tables,
        Tiles(
            query_start_loc, np.array(lengths, np.int32), group_size,
            np.array([tile.sequence for tile in tiles], np.int32),
            np.array([tile.first_token for tile in tiles], np.int32),
            np.array([tile.chunk for tile in tiles], np.int32), state_start,
        ),
        states[:-64], scratch[:-64],
    )  # fmt: skip
    assert (scratch[-64:] == 7.0).all(), "wrote past its scratch memory"
    assert is_poison(states[-64:]), "wrote past the states"
    for cache, unchanged in zip((keys, values), before, strict=True):
        assert (cache.view(np.uint32) == unchanged.view(np.uint32)).all(), "wrote to the cache"

    size = heads.num_heads * heads.value_dim
    rows = np.full((num_tokens, size + LANES + 8), 7.0, np.float32)
    for token in range(num_tokens):
        first, end = state_start[token], state_start[token + 1]
        merge_states(states, first, end, heads.num_heads, heads.value_dim, rows[token], -1, rows[token])
    assert (rows[:, -8:] == 7.0).all(), "wrote past the output"
    outputs = rows[:, :size].reshape(num_tokens, heads.num_heads, heads.value_dim)
    return np.split(outputs, query_start_loc[1:-1])


def expected(heads: Heads, run: Run) -> Exact:
    """In a cache of bfloat16 keys and values are rounded, and scaled queries if they are bfloat16."""
    queries = run.context.queries[run.start : run.end] * np.float32(heads.scale)
    keys, values = run.context.keys[: run.end], run.context.values[: run.end]
    if heads.format == BFLOAT16:
        keys, values = oracles.bfloat16(keys), oracles.bfloat16(values)
        queries = queries if are_floats(BFLOAT16) else oracles.bfloat16(queries)
    return oracles.attention(queries, keys, values, 1.0, heads.window, heads.cap)


def alone(heads: Heads, whole: Context, block_size: int = 16) -> Matrix:
    """Every token of one sequence, computed in one piece by itself."""
    return attend(heads, [Run(whole, 0, len(whole.queries))], block_size)[0]


def runs_of(heads: Heads, runs: list[tuple[int, int]]) -> list[Run]:
    return [
        Run(context(heads, cached + new, seed), cached, cached + new)
        for seed, (cached, new) in enumerate(runs)
    ]


# Dimensions of a key and those of them that are the value: whole vectors, and parts of one.
LATENT = st.builds(
    lambda num_heads, dims, *rest: Heads(num_heads, 1, dims[0], *rest, latent=dims[1]),
    st.sampled_from([1, 4, 7, 13, 40]),
    st.sampled_from([(40, 32), (20, 16), (7, 5), (38, 36), (24, 20), (96, 64), (112, 80)]),
    st.sampled_from([0.02, 0.2, 1.0]),
    st.sampled_from([FLOAT32, BFLOAT16]),
    st.sampled_from([0.0, 0.0, 1.5]),
    st.sampled_from([0, 0, 1, 13, 40, KEY_TILE + 1, KEY_CHUNK + 9]),
)
HEADS = LATENT | st.builds(
    lambda groups, head_dim, *rest: Heads(groups[0] * groups[1], groups[0], head_dim, *rest),
    # KV heads and the query heads that share each: multi-head, grouped and multi-query attention.
    st.sampled_from([(1, 1), (3, 1), (2, 2), (2, 3), (1, 4), (1, 7), (3, 5), (1, 13), (1, 71)]),
    st.sampled_from([4, 5, 6, 15, 16, 17, 20, 32, 33, 48, 64, 80]),
    st.sampled_from([0.02, 0.2, 1.0]),
    st.sampled_from([FLOAT32, BFLOAT16]),
    st.sampled_from([0.0, 0.0, 1.5]),
    st.sampled_from([0, 0, 1, 2, 13, 16, 40, KEY_TILE, KEY_TILE + 1, 100, KEY_CHUNK, KEY_CHUNK + 9]),
)
SPLIT = st.sampled_from([False, True, None])
HEADS_PER_ITEM = st.integers(1, 4)
BLOCK_SIZE = st.sampled_from([*BLOCK_SIZES, 3, 7, 17, 32, 40])
# (tokens in the cache, new tokens): decodes, first and later pieces, more than a tile or a chunk of keys or a
# query tile.
RUNS = st.tuples(
    st.sampled_from(
        [0, 0, 1, 15, 16, 17, KEY_TILE - 1, KEY_TILE, KEY_TILE + 1, 2 * KEY_TILE + 3, KEY_CHUNK - 1]
    ),
    st.sampled_from([1, 1, 2, 5, 12, 13, 40, 97]),
)
LENGTH = st.one_of(
    st.integers(1, 150), st.sampled_from([KEY_CHUNK - 1, KEY_CHUNK, KEY_CHUNK + 1, 2 * KEY_CHUNK + 9])
)


@at_most(150)
@given(HEADS, BLOCK_SIZE, st.lists(RUNS, min_size=1, max_size=4), SPLIT, HEADS_PER_ITEM)
def test_agrees_with_the_oracle(
    heads: Heads, block_size: int, runs: list[tuple[int, int]], split: bool | None, heads_per_item: int
) -> None:
    batch = runs_of(heads, runs)
    outputs = attend(heads, batch, block_size, split=split, heads_per_item=heads_per_item)
    for run, found in zip(batch, outputs, strict=True):
        np.testing.assert_allclose(found, expected(heads, run), rtol=0, atol=2e-5)


@at_most(100)
@given(HEADS, st.permutations(BLOCK_SIZES), LENGTH)
def test_bits_do_not_depend_on_the_block_size(heads: Heads, sizes: list[int], num_tokens: int) -> None:
    whole = context(heads, num_tokens)
    one, *others = sizes[:3]
    found = alone(heads, whole, one)
    for other in others:
        np.testing.assert_array_equal(alone(heads, whole, other), found)


# Five rows of a head fill no register tile.
@example(Heads(15, 3, 16), 16, [(0, 97), (0, 1), (3, 1), (20, 1)], False, 3)
@at_most(100)
@given(HEADS, BLOCK_SIZE, st.lists(RUNS, min_size=1, max_size=4), SPLIT, HEADS_PER_ITEM)
def test_bits_do_not_depend_on_the_heads_of_an_item(
    heads: Heads, block_size: int, runs: list[tuple[int, int]], split: bool | None, heads_per_item: int
) -> None:
    batch = runs_of(heads, runs)
    outputs = attend(heads, batch, block_size, split=split, heads_per_item=heads_per_item)
    for one_by_one, found in zip(attend(heads, batch, block_size, split=split), outputs, strict=True):
        np.testing.assert_array_equal(found, one_by_one)


@at_most(60)
@given(HEADS, BLOCK_SIZE, st.lists(RUNS, min_size=1, max_size=4), SPLIT, st.integers(1, 9))
def test_bits_do_not_depend_on_tiles_that_suit_another_layer(
    heads: Heads, block_size: int, runs: list[tuple[int, int]], split: bool | None, times: int
) -> None:
    """One plan serves all layers: that of the layer in which the most query heads share a KV head."""
    batch = runs_of(heads, runs)
    own = attend(heads, batch, block_size, split=split)
    shared = attend(heads, batch, block_size, split=split, planned_group_size=times * heads.group_size)
    for found, expected in zip(shared, own, strict=True):
        np.testing.assert_array_equal(found, expected)


@both_formats
@pytest.mark.parametrize("num_tokens", [KEY_TILE + 1, KEY_CHUNK + KEY_TILE + 1])
def test_all_block_sizes_give_the_same_bits(format: int, num_tokens: int) -> None:
    heads = Heads(4, 2, 20, format=format)
    whole = context(heads, num_tokens)
    found = alone(heads, whole, BLOCK_SIZES[0])
    for block_size in BLOCK_SIZES[1:]:
        np.testing.assert_array_equal(alone(heads, whole, block_size), found)


@at_most(100)
@given(HEADS, BLOCK_SIZE, LENGTH, st.lists(st.integers(1, 2 * KEY_CHUNK), max_size=4), SPLIT)
def test_bits_do_not_depend_on_the_pieces(
    heads: Heads, block_size: int, num_tokens: int, cuts: list[int], split: bool | None
) -> None:
    whole = context(heads, num_tokens)
    bounds = sorted({0, num_tokens, *(cut % num_tokens for cut in cuts)})
    pieces = [
        attend(heads, [Run(whole, start, end)], block_size, split=split)[0] for start, end in pairwise(bounds)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), alone(heads, whole, block_size))


@both_formats
def test_token_by_token_gives_the_bits_of_the_whole_prompt(format: int) -> None:
    heads = Heads(6, 2, 20, format=format)
    whole = context(heads, 2 * KEY_TILE + 5)
    decoded = [attend(heads, [Run(whole, t, t + 1)])[0][0] for t in range(len(whole.queries))]
    np.testing.assert_array_equal(np.stack(decoded), alone(heads, whole))


@at_most(100)
@given(HEADS, BLOCK_SIZE, st.sampled_from([0, 1, KEY_TILE, KEY_CHUNK, KEY_CHUNK + 1]), st.integers(1, 40))
def test_bits_do_not_depend_on_whether_chunks_of_keys_are_work_items(
    heads: Heads, block_size: int, more: int, new: int
) -> None:
    run = Run(context(heads, KEY_CHUNK + more + new), KEY_CHUNK + more, KEY_CHUNK + more + new)
    [joined] = attend(heads, [run], block_size, split=False)
    for split in (True, None):
        np.testing.assert_array_equal(attend(heads, [run], block_size, split=split)[0], joined)


@both_formats
def test_decodes_around_the_end_of_a_chunk_of_keys_have_the_bits_of_the_prompt(format: int) -> None:
    heads = Heads(4, 2, 16, format=format)
    whole = context(heads, 2 * KEY_CHUNK + 3)
    prompt = alone(heads, whole)
    for end in (KEY_CHUNK, 2 * KEY_CHUNK):
        for t in range(end - 2, end + 2):
            for split in (False, True, None):
                np.testing.assert_array_equal(
                    attend(heads, [Run(whole, t, t + 1)], split=split)[0][0], prompt[t]
                )


@at_most(100)
@given(HEADS, BLOCK_SIZE, st.permutations(range(4)), st.lists(RUNS, min_size=2, max_size=4), SPLIT)
def test_bits_do_not_depend_on_the_batch(
    heads: Heads, block_size: int, order: list[int], runs: list[tuple[int, int]], split: bool | None
) -> None:
    batch = runs_of(heads, runs)
    batch = [batch[i] for i in order if i < len(batch)]
    for run, found in zip(batch, attend(heads, batch, block_size, split=split), strict=True):
        np.testing.assert_array_equal(found, attend(heads, [run], block_size, seed=1)[0])


@both_formats
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("cached", [5, KEY_TILE + 1])
def test_bits_do_not_depend_on_neighbours_that_are_no_numbers(
    format: int, poison: float, cached: int
) -> None:
    """Nothing that an item leaves in the working memory reaches the next."""
    heads = Heads(4, 2, 20, format=format)
    runs = runs_of(heads, [(cached, 1), (0, 3), (cached, 30)])
    spoilt = context(heads, 2 * KEY_TILE - 1)
    for x in (spoilt.queries, spoilt.keys, spoilt.values):
        x[:] = poison
    neighbour = Run(spoilt, 3, 2 * KEY_TILE - 1)
    for seed in range(6):  # so many orders of the work items
        batch = [neighbour, runs[0], neighbour, runs[1], runs[2]]
        found = attend(heads, batch, 8, seed=seed)
        for run, rows in zip((runs[0], runs[1], runs[2]), (found[1], found[3], found[4]), strict=True):
            np.testing.assert_array_equal(rows, attend(heads, [run], 8)[0])


def test_one_thread_is_as_good_as_another() -> None:
    """Work items are independent: those that are left over by other threads come out the same."""
    heads = Heads(4, 2, 16)
    whole = context(heads, 3 * tokens_per_query_tile(2) + 1)
    last = attend(heads, [Run(whole, len(whole.queries) - 1, len(whole.queries))], 8)[0]
    np.testing.assert_array_equal(alone(heads, whole, 8)[-1:], last)


@both_formats
@pytest.mark.parametrize("group_size", [QUERY_TILE_ROWS - 1, QUERY_TILE_ROWS, QUERY_TILE_ROWS + 4])
def test_a_query_tile_is_filled_by_the_heads_that_share_a_kv_head(format: int, group_size: int) -> None:
    heads = Heads(group_size, 1, 8, format=format)
    whole = context(heads, 5)
    run = Run(whole, 0, 5)
    np.testing.assert_allclose(alone(heads, whole, 3), expected(heads, run), rtol=0, atol=2e-5)


@both_formats
def test_the_first_token_sees_itself_alone(format: int) -> None:
    heads = Heads(4, 2, 16, format=format)
    whole = context(heads, 9)
    value = whole.values[0] if format == FLOAT32 else oracles.bfloat16(whole.values[0])
    np.testing.assert_array_equal(alone(heads, whole)[0], value.repeat(2, axis=0))


@both_formats
@pytest.mark.parametrize("num_tokens", [KEY_TILE, KEY_TILE + 1, 3 * KEY_TILE - 1, KEY_CHUNK + 2])
def test_scores_far_apart_pick_one_key(format: int, num_tokens: int) -> None:
    """Every query matches one key a thousand times better than all others, wherever in the context it is."""
    heads = Heads(1, 1, 4, scale=1.0, format=format)
    for winner in (0, 1, KEY_TILE - 1, num_tokens - 1):
        whole = context(heads, num_tokens)
        whole.queries[:] = 1.0
        whole.keys[:] = -1000.0
        whole.keys[winner] = 1000.0
        value = whole.values[winner] if format == FLOAT32 else oracles.bfloat16(whole.values[winner])
        for split in (False, True):
            last = attend(heads, [Run(whole, num_tokens - 1, num_tokens)], 7, split=split)[0]
            np.testing.assert_array_equal(last[0, 0], value[0])


@both_formats
def test_later_tokens_are_not_seen(format: int) -> None:
    heads = Heads(2, 1, 8, format=format)
    whole = context(heads, 100)
    before = alone(heads, whole)
    changed = context(heads, 100)
    changed.keys[60:], changed.values[60:] = 50.0, -1e6
    np.testing.assert_array_equal(alone(heads, changed)[:60], before[:60])
    assert (alone(heads, changed)[60:] != before[60:]).any()


@both_formats
def test_the_caches_of_kv_heads_are_apart(format: int) -> None:
    heads = Heads(6, 3, 8, format=format)
    whole, changed = context(heads, 70), context(heads, 70)
    changed.keys[:, 1], changed.values[:, 1] = np.nan, np.nan
    before, after = alone(heads, whole, 5), alone(heads, changed, 5)
    np.testing.assert_array_equal(after[:, [0, 1, 4, 5]], before[:, [0, 1, 4, 5]])
    assert np.isnan(after[:, 2:4]).all()


@pytest.mark.parametrize("head_dim", [4, 5, 16, 17, 64])
def test_bfloat16_takes_half_of_the_cache(head_dim: int) -> None:
    assert token_words(FLOAT32, 64, 64) == 128
    assert token_words(BFLOAT16, 64, 64) == 64
    for format in (FLOAT32, BFLOAT16):
        size = (format, 7, 5, 3, head_dim)
        words = key_cache_size(*size) + value_cache_size(*size)
        assert words == 7 * 5 * 3 * token_words(format, head_dim, head_dim)


@both_formats
def test_what_is_no_number_in_a_visible_key_or_value_shows(format: int) -> None:
    heads = Heads(2, 1, 8, format=format)
    for name in ("queries", "keys", "values"):
        whole = context(heads, 90)
        array = getattr(whole, name).copy()
        array[70, 0] = np.nan
        finite = np.isfinite(alone(heads, replace(whole, **{name: array})))
        assert not finite[70, 0].any()
        if name != "queries":
            assert not finite[70:].any()
        if name != "values":  # which a weight of 0 does not hide
            assert finite[:70].all()


@both_formats
@pytest.mark.parametrize("window", [1, 7, 16, KEY_TILE, KEY_TILE + 1, KEY_CHUNK, KEY_CHUNK + 1])
def test_a_window_hides_what_is_before_it(format: int, window: int) -> None:
    """Token by token, in pieces and at once: the oracle's numbers, and the same bits."""
    heads = Heads(4, 2, 20, format=format, window=window)
    whole = context(heads, 2 * KEY_CHUNK + 30)
    count = len(whole.queries)
    found = alone(heads, whole)
    np.testing.assert_allclose(found, expected(heads, Run(whole, 0, count)), rtol=0, atol=2e-5)
    for cut in (KEY_CHUNK - 1, KEY_CHUNK + window, count - 1):
        for block_size in (1, 24, 64):
            for split in (False, True, None):
                [rest] = attend(heads, [Run(whole, cut, count)], block_size, split=split)
                np.testing.assert_array_equal(rest, found[cut:])


@both_formats
def test_a_window_as_long_as_the_context_changes_no_bit(format: int) -> None:
    heads = Heads(6, 2, 16, format=format)
    whole = context(heads, KEY_CHUNK + 40)
    without = alone(heads, whole)
    for more in (0, 1, KEY_CHUNK):
        found = alone(replace(heads, window=KEY_CHUNK + 40 + more), whole)
        np.testing.assert_array_equal(found, without)


# The plan of a step's work items


@at_most(300)
@given(
    st.sampled_from([1, 2, 3, 5, 9, 13, QUERY_TILE_ROWS + 1]),
    st.lists(st.tuples(st.integers(0, 3 * KEY_CHUNK), st.integers(1, 250)), min_size=1, max_size=6),
    st.sampled_from([0, 0, 1, 100, KEY_CHUNK, KEY_CHUNK + 1, KEY_CHUNK + 2, 2 * KEY_CHUNK]),
)
def test_every_token_meets_every_chunk_of_its_keys_in_one_item(
    group_size: int, runs: list[tuple[int, int]], window: int
) -> None:
    heads = Heads(group_size, 1, 1, window=window)
    empty = context(heads, 0)
    batch = [Run(empty, cached, cached + new) for cached, new in runs]
    tiles, states = planned(heads, batch)
    starts = np.cumsum([0, *(new for _, new in runs)])
    met: list[list[int]] = [[] for _ in range(starts[-1])]
    for tile in tiles:
        end = min(tile.first_token + tokens_per_query_tile(group_size), starts[tile.sequence + 1])
        assert starts[tile.sequence] <= tile.first_token < end
        for token in range(tile.first_token, end):
            met[token].append(tile.chunk)
    for sequence, run in enumerate(batch):
        for token in range(starts[sequence], starts[sequence + 1]):
            position = run.start + token - starts[sequence]
            own = seen_chunks(heads, position, position + 1)
            if met[token] == [-1]:
                assert states[token] == 1
            else:
                assert len(set(met[token])) == len(met[token])
                assert set(own) <= set(met[token])
                assert states[token] == len(own)


def test_a_windowed_decode_costs_no_more_in_a_longer_context() -> None:
    heads = Heads(3, 1, 1, window=512)
    empty = context(heads, 0)
    for start in (100, 1000, 100_000, 100_352):
        tiles, states = planned(heads, [Run(empty, start, start + 1)])
        assert len(tiles) == states[0] == len(seen_chunks(heads, start, start + 1)) <= 2


def test_a_long_decode_is_split_and_a_prefill_is_not() -> None:
    heads = Heads(3, 1, 1)
    empty = context(heads, 0)
    decode, prefill, short = (
        Run(empty, start, end) for start, end in ((4 * KEY_CHUNK, 4 * KEY_CHUNK + 1), (0, 999), (9, 10))
    )
    tiles, _ = planned(heads, [decode, prefill, short])
    assert sorted(tile.chunk for tile in tiles if tile.sequence == 0) == [0, 1, 2, 3, 4]
    assert sorted(tile.chunk for tile in tiles if tile.sequence == 2) == [-1]
    whole = QUERY_TILE_ROWS // 3
    prefill_tiles = [tile for tile in tiles if tile.sequence == 1]
    assert [t.chunk for t in prefill_tiles if t.first_token + whole < 1 + 999] == [-1] * (998 // whole)


@pytest.mark.parametrize("head_dim", [4, 80, 128, 256])
def test_a_thread_of_a_step_has_room_to_store_a_head_that_is_all_of_its_model(head_dim: int) -> None:
    layers = layer_rows(
        1, num_heads=1, num_kv_heads=1, head_dim=head_dim, attention_scale=0.25, rope_table=-1,
        intermediate_size=head_dim, activation=SILU, gated=True,
    )  # fmt: skip
    arch = Architecture(head_dim, 16, 0, tied=True, layer_norm=False, norm_epsilon=1e-5, layers=layers)
    assert new_workspace(arch, 1, 2).scratch.shape[1] >= store_scratch_size(head_dim)
