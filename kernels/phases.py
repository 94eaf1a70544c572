"""The phases of a step: what every thread of the team does between two barriers.

A phase takes whole rows of activations or items of a product until none is left, and ends with a barrier.
What a phase leaves for the next is in the `Workspace` and the `Plan` of `kernels.buffers`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.activation import activate
from pagellm.kernels.attention import Heads, Tiles, attention, choose_heads_per_item, merge_states, plan_tiles
from pagellm.kernels.jit import kernel
from pagellm.kernels.kv_cache import LayerCache, store_kv
from pagellm.kernels.matmul import matmul
from pagellm.kernels.norm import normalize
from pagellm.kernels.packing import pack_row, padded, unpack_column
from pagellm.kernels.rope import rotate
from pagellm.kernels.threads import barrier, next_rows


class Member(NamedTuple):
    """One thread of the team that computes a step."""

    thread: int
    num_threads: int
    counters: NDArray[np.int64]  # that the team shares
    scratch: NDArray[np.float32]  # its own, one row of the widest activations


@kernel
def embed(member, arch, weights, batch, plan, work):
    """Starts every new token's hidden state, [num_tokens, padded hidden_size], from its embedding."""
    stride, num_rows, hidden = padded(arch.hidden_size), batch.token_ids.size, work.hidden
    table, positions = weights.rest[0].embedding, weights.rest[0].position_embedding
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            start = row * stride
            unpack_column(
                table.format, weights.values, table.start, arch.hidden_size, batch.token_ids[row], hidden,
                start,
            )  # fmt: skip
            for i in range(arch.hidden_size, stride):
                hidden[start + i] = 0.0
            if arch.num_positions > 0:
                position = positions.start + plan.positions[row] * arch.hidden_size
                for i in range(arch.hidden_size):
                    hidden[start + i] += weights.values[position + i]
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def normalize_rows(member, arch, weights, scale, bias, num_rows, format, work):
    """Normalises the hidden states [num_rows, hidden_size] of the first `work.rows` and packs them.

    scale, bias: the places of the norm's parts; format: of the matrix that is to multiply them.
    """
    stride = padded(arch.hidden_size)
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            normalize(
                work.hidden, work.rows[row] * stride, arch.hidden_size, arch.layer_norm, arch.norm_epsilon,
                weights.values, scale.start, bias.start, member.scratch,
            )  # fmt: skip
            pack_row(format, member.scratch, 0, arch.hidden_size, row, work.packed, 0)
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def linear(member, weights, part, bias, num_rows, K, N, out, accumulate, work):
    """The packed activations [num_rows, K] times a part [N, K], plus its bias.

    out: flat, rows `padded(N)` apart, which are written or, with `accumulate`, added to.
    """
    matmul(
        member.counters, member.num_threads, part.format, work.packed, num_rows, K, weights.values,
        part.start, bias.start, N, out, accumulate,
    )  # fmt: skip
    barrier(member.counters, member.num_threads)


@kernel
def rotate_and_store(member, layer, arch, weights, cache, num_rows, plan, work):
    """Rotates the new queries and keys in place and writes keys and values to their cache slots.

    They are in `work.wide`: rows of [num_heads + 2 * num_kv_heads, head_dim], padded to whole panels.
    """
    features = arch.layers[layer]
    heads, kv_heads, head_dim = features.num_heads, features.num_kv_heads, features.head_dim
    table, layer_k, layer_v = features.rope_table, cache.key_start[layer], cache.value_start[layer]
    stride = padded((heads + 2 * kv_heads) * head_dim)
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            start = row * stride
            if table >= 0:
                half, position = weights.rope_halves[table], plan.positions[row]
                cos, sin = weights.cos[table, position], weights.sin[table, position]
                for head in range(heads + kv_heads):
                    rotate(work.wide, start + head * head_dim, cos, sin, half)
            k_start = start + heads * head_dim
            store_kv(
                cache.format, work.wide, k_start, work.wide, k_start + kv_heads * head_dim, head_dim,
                kv_heads, cache.block_size, plan.slot_mapping[row], cache.keys, cache.values, layer_k,
                layer_v, member.scratch,
            )  # fmt: skip
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def attend(member, layer, arch, cache, batch, plan, work):
    """Attention of all new tokens to their sequences' keys: fills `plan.states`, [num_states, num_heads]."""
    features = arch.layers[layer]
    num_heads, kv_heads, head_dim = features.num_heads, features.num_kv_heads, features.head_dim
    heads = Heads(num_heads, kv_heads, head_dim, np.float32(features.attention_scale))
    layer_cache = LayerCache(
        cache.format, cache.block_size, cache.keys, cache.values, cache.key_start[layer],
        cache.value_start[layer],
    )  # fmt: skip
    tiles = Tiles(
        batch.query_start_loc, plan.seq_lens, plan.group_size, plan.tile_sequence[: plan.num_tiles[0]],
        plan.tile_start, plan.tile_chunk, plan.state_start,
    )  # fmt: skip
    attention(
        member.counters, choose_heads_per_item(plan.num_tiles[0], member.num_threads, num_heads // kv_heads),
        heads, work.wide, padded((num_heads + 2 * kv_heads) * head_dim), layer_cache, batch.block_tables,
        tiles, plan.states, work.attention[member.thread],
    )  # fmt: skip
    barrier(member.counters, member.num_threads)


@kernel
def merge_rows(member, heads, head_dim, num_rows, plan, format, work):
    """Joins the states that attention left for each token, [heads * head_dim], and packs them."""
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            merge_states(
                plan.states, plan.state_start[row], plan.state_start[row + 1], heads, head_dim,
                member.scratch,
            )  # fmt: skip
            pack_row(format, member.scratch, 0, heads * head_dim, row, work.packed, 0)
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def activate_rows(member, features, num_rows, format, work):
    """Applies the activation to the rows of `work.wide` and packs them, [intermediate_size], for a matrix.

    Such a row is the gate and the linear half, each padded to whole panels, or the linear part alone.
    """
    size, kind, gated = features.intermediate_size, features.activation, features.gated
    up_offset = padded(size)
    stride = up_offset * (1 + gated)
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            activate(kind, gated, work.wide, row * stride, size, up_offset, member.scratch)
            pack_row(format, member.scratch, 0, size, row, work.packed, 0)
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def plan_batch(cache, batch, plan, work):
    """Fills the plan, and `work.rows` with all rows."""
    for sequence in range(batch.num_computed.size):
        first, end = batch.query_start_loc[sequence], batch.query_start_loc[sequence + 1]
        for row in range(first, end):
            position = batch.num_computed[sequence] + row - first
            block = np.int64(batch.block_tables[sequence, position // cache.block_size])
            plan.positions[row] = position
            plan.slot_mapping[row] = block * cache.block_size + position % cache.block_size
            work.rows[row] = row
        plan.seq_lens[sequence] = batch.num_computed[sequence] + end - first
    plan.num_tiles[0] = plan_tiles(
        batch.query_start_loc, plan.seq_lens[: batch.num_computed.size], plan.group_size, plan.tile_sequence,
        plan.tile_start, plan.tile_chunk, plan.state_start,
    )  # fmt: skip
