"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): its own phases of a step.

What is kept of a token is one short vector for all heads: a key of a few dimensions that is rotated, and a
latent vector. A head has a matrix that would make its key of the latents, and one that would make its value.
Neither is ever made: the query, times the first matrix, meets the latents as they are ("absorbed"), and what
attention adds up of them, times the second, is what the head gives. So the cache has one KV head, whose
values are the last part of its keys. A prefill does the same: widened keys would give it other bits than a
decode.
"""

import numpy as np

from pagellm.kernels.architecture import latent_query_dim, latent_query_stride, qkv_size
from pagellm.kernels.attention import merge_states
from pagellm.kernels.jit import kernel, plain
from pagellm.kernels.kv_cache import store_kv
from pagellm.kernels.norm import normalize
from pagellm.kernels.packing import activation_words, pack_inputs, pack_row, padded, padded_rows
from pagellm.kernels.rope import rotate
from pagellm.kernels.threads import barrier, next_rows


@kernel
def _normalize(member, features, weights, start, size, scale, bias, work):
    """Normalises `work.wide[start : start + size]` into the thread's scratch memory.

    scale, bias: the places of the norm's parts.
    """
    normalize(
        work.wide, start, size, plain(False), features.latent_epsilon, weights.values, scale.start,
        bias.start, member.scratch,
    )  # fmt: skip


@kernel
def _rotate(weights, features, position, start, work):
    """Rotates the vector of `work.wide` that begins at `start`, if the layer rotates."""
    table = features.rope_table
    if table >= 0:
        rotate(
            work.wide, start, weights.cos[table, position], weights.sin[table, position],
            weights.rope_halves[table],
        )  # fmt: skip


@kernel
def keep_latents(member, layer, arch, weights, cache, num_rows, plan, work):
    """Normalises and rotates what is kept of the new tokens and writes it to the cache.

    It is in `work.wide` behind each token's queries. Where these are compressed, they are normalised, too,
    and packed, [query_rank].
    """
    features, parts = arch.layers[layer], weights.layers[layer]
    latent, rank = features.latent_dim, features.query_rank
    rotary, stride = features.head_dim - latent, padded(qkv_size(features))
    size = qkv_size(features) - features.head_dim
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            start = row * stride
            kept = start + size
            _rotate(weights, features, plan.positions[row], kept, work)
            _normalize(
                member, features, weights, kept + rotary, latent, parts.latent_norm, parts.latent_norm_b, work
            )  # fmt: skip
            for i in range(latent):
                work.wide[kept + rotary + i] = member.scratch[i]
            store_kv(
                cache.format, work.wide, kept, work.wide, kept, features.head_dim, plain(0), plain(1),
                cache.block_size, plan.slot_mapping[row], cache.keys, cache.values, cache.key_start[layer],
                cache.value_start[layer], member.scratch,
            )  # fmt: skip
            if rank > 0:
                _normalize(
                    member, features, weights, start, rank, parts.query_norm, parts.query_norm_b, work
                )  # fmt: skip
                pack_inputs(parts.query_up, weights.values, member.scratch, rank, row, work.packed)
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def split_queries(member, layer, arch, weights, num_rows, plan, work):
    """Rotates a part of each query and puts it in its place in `work.queries`; packs the other part.

    The queries are in `work.wide`, [num_heads, nope_dim + rotated dimensions], in rows that go on with what
    is kept of the token unless they were compressed. Packed are the [num_rows, nope_dim] of each head.
    """
    features, parts = arch.layers[layer], weights.layers[layer]
    heads, nope = features.num_heads, features.nope_dim
    rotary = features.head_dim - features.latent_dim
    size, table, format = latent_query_dim(features), features.rope_table, parts.key_up.format
    stride = padded(heads * size) if features.query_rank > 0 else padded(qkv_size(features))
    input_words = padded_rows(num_rows) * activation_words(format, nope)
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            position = plan.positions[row]
            scale = weights.query_scale[table, position] if table >= 0 else np.float32(1.0)
            for head in range(heads):
                query = row * stride + head * size
                target = (row * heads + head) * latent_query_stride(features)
                _rotate(weights, features, position, query + nope, work)
                for i in range(rotary):
                    work.queries[target + i] = work.wide[query + nope + i] * scale
                for i in range(nope):
                    member.scratch[i] = work.wide[query + i] * scale
                pack_row(
                    format, member.scratch, plain(0), nope, row, work.packed, head * input_words
                )  # fmt: skip
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def merge_latents(member, layer, arch, weights, num_rows, plan, work):
    """Joins the states that attention left for each token and packs each head's [num_rows, latent_dim]."""
    features, format = arch.layers[layer], weights.layers[layer].value_up.format
    heads, latent = features.num_heads, features.latent_dim
    state_start = plan.state_start[plan.layer_window[layer]]
    input_words = padded_rows(num_rows) * activation_words(format, latent)
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            merge_states(
                plan.states, state_start[row], state_start[row + 1], heads, latent, weights.values, plain(-1),
                member.scratch,
            )  # fmt: skip
            # From the last on: packing a head spoils what is behind it.
            for head in range(heads - 1, -1, -1):
                pack_row(
                    format, member.scratch, head * latent, latent, row, work.packed, head * input_words
                )  # fmt: skip
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)


@kernel
def join_heads(member, layer, arch, weights, num_rows, work):
    """Packs the heads' outputs in `work.wide`, whole panels each, as [num_rows, num_heads * value_dim]."""
    features, output = arch.layers[layer], weights.layers[layer].output
    heads, size = features.num_heads, features.value_dim
    first, end = next_rows(member.counters, num_rows, member.num_threads)
    while first < end:
        for row in range(first, end):
            for head in range(heads):
                start = (row * heads + head) * padded(size)
                for i in range(size):
                    member.scratch[head * size + i] = work.wide[start + i]
            pack_inputs(output, weights.values, member.scratch, heads * size, row, work.packed)
        first, end = next_rows(member.counters, num_rows, member.num_threads)
    barrier(member.counters, member.num_threads)
