"""Paged attention: the oracle's numbers, and the same bits however the tokens were stored, cut and batched.

Every cache slot that holds no token is NaN, in this layer and in the others, so whatever reads one shows.
"""

from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels.attention import (
    KEY_TILE,
    attention,
    key_cache_size,
    scratch_size,
    store_kv,
    tokens_per_query_tile,
    value_cache_size,
)
from kernels.packing import padded_rows
from kernels.simd import LANES
from kernels.threads import new_counters
from tests import oracles
from tests.kernels.layouts import Matrix, random_matrix, unpacked_rows, whole_panels

NUM_LAYERS, LAYER = 3, 1


@dataclass(frozen=True)
class Heads:
    """The heads of a model and how its scores are scaled."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float = 0.3

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Context:
    """One sequence's queries, keys and values of all of its tokens."""

    queries: Matrix  # [num_tokens, num_heads, head_dim]
    keys: Matrix  # [num_tokens, num_kv_heads, head_dim]
    values: Matrix


@dataclass(frozen=True)
class Run:
    """A sequence's new tokens, from `start` up to `end`; those before are in the cache already."""

    context: Context
    start: int
    end: int


def context(heads: Heads, num_tokens: int, seed: int = 0) -> Context:
    rng = np.random.default_rng((seed, num_tokens))
    kv_shape = (num_tokens, heads.num_kv_heads, heads.head_dim)
    return Context(
        random_matrix(rng, num_tokens, heads.num_heads, heads.head_dim),
        random_matrix(rng, *kv_shape),
        random_matrix(rng, *kv_shape),
    )


def attend(heads: Heads, batch: list[Run], block_size: int, seed: int = 0) -> list[Matrix]:
    """Attention of a batch on freshly filled blocks in a random order: [new tokens, num_heads, head_dim]s."""
    lengths = [run.end for run in batch]
    blocks_of = [-(-length // block_size) for length in lengths]
    num_blocks = sum(blocks_of) + 1
    order = np.random.default_rng(seed).permutation(num_blocks).astype(np.int32)
    block_tables = np.zeros((len(batch), max(blocks_of)), np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum([0, *blocks_of]), blocks_of, strict=False)):
        block_tables[row, :count] = order[first : first + count]

    layer_k = key_cache_size(num_blocks, block_size, heads.num_kv_heads, heads.head_dim)
    layer_v = value_cache_size(num_blocks, block_size, heads.num_kv_heads, heads.head_dim)
    keys = np.full(NUM_LAYERS * layer_k + LANES, np.nan, np.float32)
    values = np.full(NUM_LAYERS * layer_v, np.nan, np.float32)
    for run, table in zip(batch, block_tables, strict=True):
        k, v = run.context.keys.reshape(-1), run.context.values.reshape(-1)
        for position in range(run.end):
            slot = int(table[position // block_size]) * block_size + position % block_size
            start = position * heads.num_kv_heads * heads.head_dim
            store_kv(
                k, start, v, start, heads.head_dim, heads.num_kv_heads, block_size, slot, keys, values,
                LAYER * layer_k, LAYER * layer_v,
            )  # fmt: skip

    counts = [run.end - run.start for run in batch]
    query_start_loc = np.cumsum([0, *counts]).astype(np.int32)
    num_tokens, size = int(query_start_loc[-1]), heads.num_heads * heads.head_dim
    stride = whole_panels(size + 2 * heads.num_kv_heads * heads.head_dim)
    qkv = np.full((num_tokens, stride), np.nan, np.float32)
    qkv[:, :size] = np.concatenate([r.context.queries[r.start : r.end] for r in batch]).reshape(-1, size)
    per_tile = tokens_per_query_tile(heads.group_size)
    tiles = [(i, first) for i, count in enumerate(counts) for first in range(0, count, per_tile)]
    scratch = np.full(scratch_size(heads.group_size, heads.head_dim) + 64, np.nan, np.float32)
    packed = np.full(padded_rows(num_tokens) * size + 64, 7.0, np.float32)
    attention(
        new_counters(), qkv.reshape(-1), stride, heads.num_heads, heads.num_kv_heads, heads.head_dim,
        np.float32(heads.scale), keys, values, LAYER * layer_k, LAYER * layer_v, block_size, block_tables,
        query_start_loc, np.array(lengths, np.int32), np.array([i for i, _ in tiles], np.int32),
        np.array([query_start_loc[i] + first for i, first in tiles], np.int32), scratch[:-64], packed,
    )  # fmt: skip
    assert np.isnan(scratch[-64:]).all(), "wrote past its scratch memory"
    assert (packed[-64:] == 7.0).all(), "wrote past the packed rows"
    rows = unpacked_rows(packed, num_tokens, size).reshape(num_tokens, heads.num_heads, heads.head_dim)
    return np.split(rows, query_start_loc[1:-1])


def alone(heads: Heads, whole: Context, block_size: int = 16) -> Matrix:
    """Every token of one sequence, computed in one piece by itself."""
    return attend(heads, [Run(whole, 0, len(whole.queries))], block_size)[0]


HEADS = st.builds(
    lambda groups, head_dim, scale: Heads(groups[0] * groups[1], groups[0], head_dim, scale),
    # KV heads and the query heads that share each: multi-head, grouped and multi-query attention.
    st.sampled_from([(1, 1), (3, 1), (2, 2), (2, 3), (1, 4), (1, 7), (3, 5), (1, 13)]),
    st.sampled_from([4, 5, 6, 15, 16, 17, 20, 32, 48, 64, 80]),
    st.sampled_from([0.02, 0.2, 1.0]),
)
BLOCK_SIZES = st.integers(1, 40)
# (tokens in the cache, new tokens): decodes, first and later chunks, more than a key tile or a query tile.
RUNS = st.tuples(
    st.sampled_from([0, 0, 1, 15, 16, 17, KEY_TILE - 1, KEY_TILE, KEY_TILE + 1, 2 * KEY_TILE + 3]),
    st.sampled_from([1, 1, 2, 5, 12, 13, 40, 97]),
)


@settings(max_examples=60)
@given(HEADS, BLOCK_SIZES, st.lists(RUNS, min_size=1, max_size=4))
def test_agrees_with_the_oracle(heads: Heads, block_size: int, runs: list[tuple[int, int]]) -> None:
    batch = [
        Run(context(heads, cached + new, seed), cached, cached + new)
        for seed, (cached, new) in enumerate(runs)
    ]
    for run, found in zip(batch, attend(heads, batch, block_size), strict=True):
        expected = oracles.attention(
            run.context.queries[run.start :], run.context.keys, run.context.values, heads.scale
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@settings(max_examples=40)
@given(HEADS, BLOCK_SIZES, BLOCK_SIZES, st.integers(1, 150))
def test_bits_do_not_depend_on_the_block_size(heads: Heads, one: int, other: int, num_tokens: int) -> None:
    assume(one != other)
    whole = context(heads, num_tokens)
    np.testing.assert_array_equal(alone(heads, whole, one), alone(heads, whole, other))


@settings(max_examples=40)
@given(HEADS, BLOCK_SIZES, st.integers(1, 150), st.lists(st.integers(1, 149), max_size=4))
def test_bits_do_not_depend_on_the_chunks(
    heads: Heads, block_size: int, num_tokens: int, cuts: list[int]
) -> None:
    whole = context(heads, num_tokens)
    bounds = sorted({0, num_tokens, *(cut for cut in cuts if cut < num_tokens)})
    chunks = [attend(heads, [Run(whole, start, end)], block_size)[0] for start, end in pairwise(bounds)]
    np.testing.assert_array_equal(np.concatenate(chunks), alone(heads, whole, block_size))


def test_token_by_token_gives_the_bits_of_the_whole_prompt() -> None:
    heads = Heads(6, 2, 20)
    whole = context(heads, 2 * KEY_TILE + 5)
    decoded = [attend(heads, [Run(whole, t, t + 1)], 16)[0][0] for t in range(len(whole.queries))]
    np.testing.assert_array_equal(np.stack(decoded), alone(heads, whole))


@settings(max_examples=40)
@given(HEADS, BLOCK_SIZES, st.lists(RUNS, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_bits_do_not_depend_on_the_batch(
    heads: Heads, block_size: int, runs: list[tuple[int, int]], random: Random
) -> None:
    batch = [
        Run(context(heads, cached + new, seed), cached, cached + new)
        for seed, (cached, new) in enumerate(runs)
    ]
    random.shuffle(batch)
    for run, found in zip(batch, attend(heads, batch, block_size), strict=True):
        np.testing.assert_array_equal(found, attend(heads, [run], block_size, seed=1)[0])


def test_one_thread_is_as_good_as_another() -> None:
    """Work items are independent: those that are left over by other threads come out the same."""
    heads = Heads(4, 2, 16)
    whole = context(heads, 3 * tokens_per_query_tile(2) + 1)
    last = attend(heads, [Run(whole, len(whole.queries) - 1, len(whole.queries))], 8)[0]
    np.testing.assert_array_equal(alone(heads, whole, 8)[-1:], last)


def test_more_heads_share_a_kv_head_than_a_query_tile_has_rows() -> None:
    heads = Heads(100, 1, 8)
    whole = context(heads, 5)
    expected = oracles.attention(whole.queries, whole.keys, whole.values, heads.scale)
    np.testing.assert_allclose(alone(heads, whole, 3), expected, rtol=0, atol=2e-5)


def test_the_first_token_sees_itself_alone() -> None:
    heads = Heads(4, 2, 16)
    whole = context(heads, 9)
    np.testing.assert_array_equal(alone(heads, whole)[0], whole.values[0].repeat(2, axis=0))


@pytest.mark.parametrize("num_tokens", [KEY_TILE, KEY_TILE + 1, 3 * KEY_TILE - 1])
def test_scores_far_apart_pick_one_key(num_tokens: int) -> None:
    """Every query matches one key a thousand times better than all others, wherever in the context it is."""
    heads = Heads(1, 1, 4, scale=1.0)
    for winner in (0, 1, KEY_TILE - 1, num_tokens - 1):
        whole = context(heads, num_tokens)
        whole.queries[:] = 1.0
        whole.keys[:] = -1000.0
        whole.keys[winner] = 1000.0
        np.testing.assert_array_equal(alone(heads, whole, 7)[-1], whole.values[winner])


def test_later_tokens_are_not_seen() -> None:
    heads = Heads(2, 1, 8)
    whole = context(heads, 100)
    before = alone(heads, whole)
    changed = context(heads, 100)
    changed.keys[60:], changed.values[60:] = 50.0, -1e6
    np.testing.assert_array_equal(alone(heads, changed)[:60], before[:60])
    assert (alone(heads, changed)[60:] != before[60:]).any()
