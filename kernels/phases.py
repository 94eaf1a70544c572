"""The phases of a step: what every thread of the team does between two barriers.

A phase takes whole rows of activations or items of a product until none is left, and ends with a barrier.
What a phase leaves for the next is in the `Workspace` and the `Plan` of `kernels.buffers`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.activation import activate
from pagellm.kernels.architecture import WHOLE, attended_dim, latent_query_stride, qkv_size
from pagellm.kernels.attention import Heads, Tiles, attention, choose_heads_per_item, merge_states, plan_tiles
from pagellm.kernels.experts import choose_experts, group_rows, sigmoid
from pagellm.kernels.jit import kernel, plain
from pagellm.kernels.kv_cache import LayerCache, store_kv
from pagellm.kernels.matmul import expert_matmul, matmul, stacked_matmul
from pagellm.kernels.norm import divide_by_rms, normalize
from pagellm.kernels.packing import (
    CHUNK,
    FLOAT32,
    GROUP,
    activation_place,
    activation_words,
    pack_inputs,
    pack_row,
    padded,
    padded_rows,
    unpack_column,
)
from pagellm.kernels.rope import rotate
from pagellm.kernels.simd import LANES, broadcast, fma, load, store
from pagellm.kernels.threads import barrier, next_rows


class Member(NamedTuple):
    """One thread of the team that computes a step."""

    thread: int
    num_threads: int
    counters: NDArray[np.int64]  # that the team shares
    scratch: NDArray[np.float32]  # its own: one row of the widest activations, or what a product needs


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
            for i in range(arch.hidden_size):
                hidden[start + i] *= np.float32(arch.embedding_scale)
            for i in range(arch.hidden_size, stride):
                hidden[start + i] = 0.0
            if arch.num_positions > 0:
                position = positions.start + plan.positions[row] * arch.hidden_size
                for i in range(arch.hidden_size):
                    hidden[start + i] += weights.values[position + i]
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def _normalize(member, arch, weights, x, start, size, scale, bias):
    """Normalises `x[start : start + size]` into the thread's scratch memory, as all norms of a model do.

    scale, bias: the places of the norm's parts.
    """
    normalize(
        x, start, size, arch.layer_norm, arch.norm_epsilon, weights.values, scale.start, bias.start,
        member.scratch,
    )  # fmt: skip


@kernel
def normalize_rows(member, arch, weights, normalized, scale, bias, num_rows, part, work):
    """Packs the hidden states [num_rows, hidden_size] of the first `work.rows` for a matrix.

    normalized: whether they are normalised before; if so, scale and bias are the places of the norm's parts.
    """
    stride = padded(arch.hidden_size)
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            start = work.rows[row] * stride
            if normalized:
                _normalize(member, arch, weights, work.hidden, start, arch.hidden_size, scale, bias)
            else:
                for i in range(arch.hidden_size):
                    member.scratch[i] = work.hidden[start + i]
            pack_inputs(part, weights.values, member.scratch, arch.hidden_size, row, work.packed)
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def add_branch(member, arch, weights, features, scale, bias, sum_scale, num_rows, work):
    """Adds the rows [num_rows, hidden_size] of `work.branch` to the hidden states, normalised and scaled.

    scale, bias: the places of the parts of the norm, if the layer has it. sum_scale: of the sums.
    """
    stride, factor = padded(arch.hidden_size), np.float32(features.residual_scale)
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for start in range(first * stride, end * stride, stride):
            if features.post_norm:
                _normalize(member, arch, weights, work.branch, start, arch.hidden_size, scale, bias)
                for i in range(arch.hidden_size):
                    work.hidden[start + i] += factor * member.scratch[i]
            else:
                for i in range(arch.hidden_size):
                    work.hidden[start + i] += factor * work.branch[start + i]
            if sum_scale != 1.0:
                for i in range(arch.hidden_size):
                    work.hidden[start + i] *= sum_scale
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def _add_squares(first_row, num_rows, K, packed_start, start, work):
    """Adds the squares of packed activations [num_rows, K], float32, to `work.squares[start:]`.

    first_row: the first of them, of those whose first group begins at word `packed_start`.
    """
    size = activation_words(plain(FLOAT32), K)
    for row in range(first_row, first_row + num_rows):
        at = packed_start + row // GROUP * GROUP * size + row % GROUP * CHUNK
        for k in range(K):
            value = np.float64(work.packed[at + activation_place(k)])
            work.squares[start + k] += value * value


@kernel
def linear(member, weights, part, bias, num_rows, K, N, out, accumulate, work):
    """The packed activations [num_rows, K] times a part [N, K], plus its bias.

    out: flat, rows `padded(N)` apart, which are written or, with `accumulate`, added to.
    """
    if work.squares.size > 0 and member.thread == 0 and work.squares_start[part.panel] >= 0:
        _add_squares(plain(0), num_rows, K, plain(0), work.squares_start[part.panel], work)
    matmul(
        member.counters, member.num_threads, weights.panels[part.panel :], work.packed, num_rows, K,
        weights.values, bias.start, N, out, accumulate, member.scratch,
    )  # fmt: skip
    barrier(member.counters, member.num_threads)


@kernel
def linear_by_head(member, weights, part, bias, num_rows, K, N, num_heads, out_step, out, work):
    """The packed activations [num_rows, K] of each head times its own piece of a part, [N, K].

    out: flat, the outputs of each head, whole panels, begin `out_step` behind those of the one before.
    """
    if work.squares.size > 0 and member.thread == 0:
        head_words = padded_rows(num_rows) * activation_words(plain(FLOAT32), K)
        for head in range(num_heads):
            start = work.squares_start[part.panel] + head * K
            _add_squares(plain(0), num_rows, K, head * head_words, start, work)
    stacked_matmul(
        member.counters, member.num_threads, weights.panels[part.panel :], work.packed, num_rows, K,
        weights.values, bias.start, N, num_heads, out_step, out, plain(False), member.scratch,
    )  # fmt: skip
    barrier(member.counters, member.num_threads)


@kernel
def _normalize_heads(member, arch, weights, start, count, size, scale, bias, work):
    """Normalises `count` neighbouring vectors [size] of `work.wide`, from `start` on, in place."""
    for first in range(start, start + count * size, size):
        _normalize(member, arch, weights, work.wide, first, size, scale, bias)
        for i in range(size):
            work.wide[first + i] = member.scratch[i]


@kernel
def _rotate_heads(weights, table, position, start, heads, kv_heads, head_dim, work):
    """Rotates a token's queries and the keys behind them, from `start` on, and scales the queries."""
    half, cos, sin = weights.rope_halves[table], weights.cos[table, position], weights.sin[table, position]
    for head in range(heads + kv_heads):
        rotate(work.wide, start + head * head_dim, cos, sin, half)
    scale = weights.query_scale[table, position]
    if scale != 1.0:
        for i in range(start, start + heads * head_dim):
            work.wide[i] *= scale


@kernel
def rotate_and_store(member, layer, arch, weights, cache, num_rows, plan, work):
    """Normalises and rotates the new queries and keys in place and writes keys and values to the cache.

    They are in `work.wide`: rows of [num_heads + 2 * num_kv_heads, head_dim], padded to whole panels.
    """
    features, parts = arch.layers[layer], weights.layers[layer]
    heads, kv_heads, head_dim = features.num_heads, features.num_kv_heads, features.head_dim
    layer_k, layer_v = cache.key_start[layer], cache.value_start[layer]
    stride = padded((heads + 2 * kv_heads) * head_dim)
    together = features.qk_norm == WHOLE
    queries, keys = (1, 1) if together else (heads, kv_heads)  # that are normalised by themselves
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            start = row * stride
            k_start = start + heads * head_dim
            v_start = k_start + kv_heads * head_dim
            if features.qk_norm:
                _normalize_heads(
                    member, arch, weights, start, queries, heads * head_dim // queries, parts.q_norm,
                    parts.q_norm_b, work,
                )  # fmt: skip
                _normalize_heads(
                    member, arch, weights, k_start, keys, kv_heads * head_dim // keys, parts.k_norm,
                    parts.k_norm_b, work,
                )  # fmt: skip
            if features.value_norm:
                for head in range(kv_heads):
                    divide_by_rms(work.wide, v_start + head * head_dim, head_dim, arch.norm_epsilon)
            if features.qkv_clip > 0.0:
                clip = np.float32(features.qkv_clip)
                for i in range(start, start + (heads + 2 * kv_heads) * head_dim):
                    work.wide[i] = min(max(work.wide[i], -clip), clip)
            if features.rope_table >= 0:
                _rotate_heads(
                    weights, features.rope_table, plan.positions[row], start, heads, kv_heads, head_dim, work
                )  # fmt: skip
            store_kv(
                cache.format, work.wide, k_start, work.wide, v_start, head_dim, head_dim, kv_heads,
                cache.block_size, plan.slot_mapping[row], cache.keys, cache.values, layer_k, layer_v,
                member.scratch,
            )  # fmt: skip
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def attend(member, layer, arch, cache, batch, plan, work):
    """Attention of all new tokens to their sequences' keys: fills `plan.states`, [num_states, num_heads]."""
    features = arch.layers[layer]
    num_heads, kv_heads, head_dim = features.num_heads, features.num_kv_heads, features.head_dim
    queries, value_start, query_stride = work.wide, plain(-1), head_dim
    row_stride = padded(qkv_size(features))
    if features.latent_dim > 0:
        queries, value_start = work.queries, head_dim - features.latent_dim
        query_stride = latent_query_stride(features)
        row_stride = num_heads * query_stride
    heads = Heads(
        num_heads, kv_heads, head_dim, attended_dim(features), value_start, query_stride,
        np.float32(features.attention_scale), np.float32(features.attention_softcap), features.window,
    )  # fmt: skip
    layer_cache = LayerCache(
        cache.format, cache.block_size, cache.keys, cache.values, cache.key_start[layer],
        cache.value_start[layer],
    )  # fmt: skip
    window = plan.layer_window[layer]
    num_tiles = plan.num_tiles[window]
    tiles = Tiles(
        batch.query_start_loc, plan.seq_lens, plan.group_size, plan.tile_sequence[window, :num_tiles],
        plan.tile_start[window], plan.tile_chunk[window], plan.state_start[window],
    )  # fmt: skip
    attention(
        member.counters, choose_heads_per_item(num_tiles, member.num_threads, num_heads // kv_heads),
        heads, queries, row_stride, layer_cache, batch.block_tables, tiles, plan.states,
        work.attention[member.thread],
    )  # fmt: skip
    barrier(member.counters, member.num_threads)


@kernel
def merge_rows(member, layer, arch, weights, num_rows, plan, work):
    """Joins the states that attention left for each token, [num_heads * head_dim], and packs them."""
    features, parts = arch.layers[layer], weights.layers[layer]
    heads, head_dim = features.num_heads, features.head_dim
    size, state_start = heads * head_dim, plan.state_start[plan.layer_window[layer]]
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            merge_states(
                plan.states, state_start[row], state_start[row + 1], heads, head_dim, weights.values,
                parts.sinks.start if features.sinks else -1, member.scratch,
            )  # fmt: skip
            if features.sub_norm:
                _normalize(
                    member, arch, weights, member.scratch, plain(0), size, parts.attention_sub_norm,
                    parts.attention_sub_norm_b,
                )  # fmt: skip
            pack_inputs(parts.output, weights.values, member.scratch, size, row, work.packed)
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def activate_rows(member, layer, arch, weights, num_rows, work):
    """Applies the activation to the rows of `work.wide` and packs them, [intermediate_size].

    Such a row is the gate and the linear half, each padded to whole panels, or the linear part alone.
    """
    features, parts = arch.layers[layer], weights.layers[layer]
    size, kind, gated = features.intermediate_size, features.activation, features.gated
    up_offset = padded(size)
    stride = up_offset * (1 + gated)
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            activate(kind, gated, work.wide, row * stride, size, up_offset, member.scratch)
            if features.sub_norm:
                _normalize(
                    member, arch, weights, member.scratch, plain(0), size, parts.mlp_sub_norm,
                    parts.mlp_sub_norm_b,
                )  # fmt: skip
            if features.shared_gate:
                for i in range(size):
                    member.scratch[i] *= work.groups.gates[row]
            pack_inputs(parts.down, weights.values, member.scratch, size, row, work.packed)
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def route_rows(member, layer, arch, weights, num_rows, work):
    """Chooses the experts of the rows by their logits in `work.router`, and groups the rows by them."""
    features, parts, groups = arch.layers[layer], weights.layers[layer], work.groups
    k, stride = features.experts_per_token, padded(features.num_experts + features.shared_gate)
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            start = row * stride
            if features.logit_scale != 1.0:
                for i in range(start, start + features.num_experts):
                    work.router[i] *= np.float32(features.logit_scale)
            choose_experts(
                features, work.router, start, weights.values, parts.selection_bias.start, member.scratch,
                groups.chosen[row * k : (row + 1) * k], groups.weights[row * k : (row + 1) * k],
            )  # fmt: skip
            if features.expert_scale:
                for i in range(row * k, (row + 1) * k):
                    groups.weights[i] *= weights.values[parts.expert_scale.start + groups.chosen[i]]
            if features.shared_gate:
                member.scratch[0] = work.router[start + features.num_experts]
                sigmoid(member.scratch, plain(0), plain(1), member.scratch)
                groups.gates[row] = member.scratch[0]
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)
    if member.thread == 0:
        group_rows(features, num_rows, groups)
    barrier(member.counters, member.num_threads)


@kernel
def gather_rows(member, layer, arch, weights, num_rows, work):
    """Packs the hidden states, normalised as the layer does, for each of their experts."""
    features, parts = arch.layers[layer], weights.layers[layer]
    size, k = arch.hidden_size, features.experts_per_token
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            start = row * padded(size)
            if features.pre_norm:
                _normalize(
                    member, arch, weights, work.hidden, start, size, parts.expert_norm, parts.expert_norm_b
                )  # fmt: skip
            else:
                for i in range(size):
                    member.scratch[i] = work.hidden[start + i]
            for i in range(row * k, (row + 1) * k):
                pack_row(
                    parts.expert_up.format, member.scratch, plain(0), size, work.groups.slots[i], work.packed,
                    plain(0),
                )  # fmt: skip
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def expert_linear(member, weights, features, part, bias, K, N, out, work):
    """The packed activations of each expert's slots times its own matrix [N, K], plus its bias."""
    if work.squares.size > 0 and member.thread == 0:
        groups, first = work.groups, work.squares_start[part.panel]
        for index in range(groups.totals[0]):
            expert, num_rows = groups.experts[index], groups.num_rows[index]
            _add_squares(groups.first_slot[index], num_rows, K, plain(0), first + expert * K, work)
            work.squares[first + features.num_experts * K + expert] += num_rows
    expert_matmul(
        member.counters, member.num_threads, weights.panels[part.panel :], work.packed, work.groups, K,
        weights.values, bias.start, features.expert_bias, N, out, member.scratch,
    )  # fmt: skip
    barrier(member.counters, member.num_threads)


@kernel
def activate_slots(member, layer, arch, weights, num_rows, work):
    """Applies the activation to the rows of all slots and packs them, [expert_size]: see `activate_rows`."""
    features, parts = arch.layers[layer], weights.layers[layer]
    size, kind, gated = features.expert_size, features.activation, features.gated
    up_offset, count = padded(size), num_rows * features.experts_per_token
    first, end = next_rows(member.counters, count, member.num_threads)
    while first < end:
        for i in range(first, end):
            slot = work.groups.slots[i]
            activate(
                kind, gated, work.wide, slot * up_offset * (1 + gated), size, up_offset, member.scratch
            )  # fmt: skip
            pack_row(
                parts.expert_down.format, member.scratch, plain(0), size, slot, work.packed, plain(0)
            )  # fmt: skip
        first, end = next_rows(member.counters, count, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def _sum_of_experts(row, k, stride, out, start, accumulate, work):
    """Writes the sum of what a row's experts give, or adds it with `accumulate`, to `out[start:]`."""
    groups = work.groups
    for column in range(0, stride, LANES):
        total = broadcast(np.float32(0.0))
        for i in range(row * k, (row + 1) * k):
            part = load(work.expert_out, groups.slots[i] * stride + column)
            total = fma(broadcast(groups.weights[i]), part, total)
        if accumulate:
            total = load(out, start + column) + total
        store(out, start + column, total)


@kernel
def combine_experts(member, layer, arch, weights, num_rows, out, accumulate, work):
    """Adds up what a row's experts give, times their weights and best first, [num_rows, hidden_size].

    out: its rows are written or, with `accumulate`, added to. Where the layer normalises both, they are what
    the feed-forward beside the experts gave.
    """
    features, parts = arch.layers[layer], weights.layers[layer]
    size, stride, k = arch.hidden_size, padded(arch.hidden_size), features.experts_per_token
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            start = row * stride
            if features.expert_norms:
                _normalize(
                    member, arch, weights, out, start, size, parts.shared_post_norm, parts.shared_post_norm_b
                )  # fmt: skip
                for i in range(size):
                    out[start + i] = member.scratch[i]
                # In the place of what the first of them gave, which nobody reads any more.
                slot = work.groups.slots[row * k] * stride
                _sum_of_experts(row, k, stride, work.expert_out, slot, plain(False), work)
                _normalize(
                    member, arch, weights, work.expert_out, slot, size, parts.expert_post_norm,
                    parts.expert_post_norm_b,
                )  # fmt: skip
                for i in range(size):
                    out[start + i] += member.scratch[i]
            else:
                _sum_of_experts(row, k, stride, out, start, accumulate, work)
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
    seq_lens = plan.seq_lens[: batch.num_computed.size]
    for window in range(plan.windows.size):
        plan.num_tiles[window] = plan_tiles(
            batch.query_start_loc, seq_lens, plan.group_size, plan.windows[window],
            plan.tile_sequence[window], plan.tile_start[window], plan.tile_chunk[window],
            plan.state_start[window],
        )  # fmt: skip
