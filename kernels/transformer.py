"""The whole step as one compiled function: embedding, all layers, logits and sampling for every new token.

`step` is what each member of a thread team runs, in phases that each end with a barrier. One compiled
signature serves every model in every format: what tells models and layers apart are numbers in
`Architecture`, and where their parts lie is in `Weights`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.activation import activate
from pagellm.kernels.attention import Heads, Tiles, attention, choose_heads_per_item, merge_states, plan_tiles
from pagellm.kernels.buffers import LOGIT_ROWS
from pagellm.kernels.jit import entry_point, kernel, plain
from pagellm.kernels.kv_cache import LayerCache, store_kv
from pagellm.kernels.matmul import matmul
from pagellm.kernels.norm import normalize
from pagellm.kernels.packing import pack_row, padded, unpack_column
from pagellm.kernels.rope import rotate
from pagellm.kernels.sampling import has_softmax, log_sum_exp, penalize, sample, top_tokens
from pagellm.kernels.threads import barrier, next_item, next_rows, share_call


class Member(NamedTuple):
    """One thread of the team that computes a step."""

    thread: int
    num_threads: int
    counters: NDArray[np.int64]  # that the team shares
    scratch: NDArray[np.float32]  # its own, one row of the widest activations


@kernel
def _embed(member, arch, weights, batch, plan, work):
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
def _normalize_rows(member, arch, weights, scale, bias, num_rows, format, work):
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
def _linear(member, weights, part, bias, num_rows, K, N, out, accumulate, work):
    """The packed activations [num_rows, K] times a part [N, K], plus its bias.

    out: flat, rows `padded(N)` apart, which are written or, with `accumulate`, added to.
    """
    matmul(
        member.counters, member.num_threads, part.format, work.packed, num_rows, K, weights.values,
        part.start, bias.start, N, out, accumulate,
    )  # fmt: skip
    barrier(member.counters, member.num_threads)


@kernel
def _rotate_and_store(member, layer, arch, weights, cache, num_rows, plan, work):
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
def _attend(member, layer, arch, cache, batch, plan, work):
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
def _merge_rows(member, heads, head_dim, num_rows, plan, format, work):
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
def _activate_rows(member, features, num_rows, format, work):
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
def _attention_block(member, layer, arch, weights, cache, batch, plan, work):
    """hidden += output(attention(qkv(norm(hidden)))) for all new tokens, [num_tokens, hidden_size]."""
    features, parts, num_rows = arch.layers[layer], weights.layers[layer], batch.token_ids.size
    heads, kv_heads, head_dim = features.num_heads, features.num_kv_heads, features.head_dim
    qkv_size = (heads + 2 * kv_heads) * head_dim
    replace, add = plain(False), plain(True)
    _normalize_rows(
        member, arch, weights, parts.attention_norm, parts.attention_norm_b, num_rows, parts.qkv.format, work
    )  # fmt: skip
    _linear(
        member, weights, parts.qkv, parts.qkv_b, num_rows, arch.hidden_size, qkv_size, work.wide, replace,
        work,
    )  # fmt: skip
    _rotate_and_store(member, layer, arch, weights, cache, num_rows, plan, work)
    _attend(member, layer, arch, cache, batch, plan, work)
    _merge_rows(member, heads, head_dim, num_rows, plan, parts.output.format, work)
    _linear(
        member, weights, parts.output, parts.output_b, num_rows, heads * head_dim, arch.hidden_size,
        work.hidden, add, work,
    )  # fmt: skip


@kernel
def _feed_forward_block(member, layer, arch, weights, num_rows, work):
    """hidden += down(activation(up(norm(hidden)))) for all new tokens, [num_tokens, hidden_size]."""
    features, parts = arch.layers[layer], weights.layers[layer]
    size = features.intermediate_size
    up_size = 2 * padded(size) if features.gated else size  # each half begins on a panel
    replace, add = plain(False), plain(True)
    _normalize_rows(
        member, arch, weights, parts.mlp_norm, parts.mlp_norm_b, num_rows, parts.up.format, work
    )  # fmt: skip
    _linear(
        member, weights, parts.up, parts.up_b, num_rows, arch.hidden_size, up_size, work.wide, replace, work
    )  # fmt: skip
    _activate_rows(member, features, num_rows, parts.down.format, work)
    _linear(
        member, weights, parts.down, parts.down_b, num_rows, size, arch.hidden_size, work.hidden, add, work
    )  # fmt: skip


@kernel
def _answer_row(arch, outputs, row, logits, scratch, counts):
    """Does what `outputs` asks of one row of logits, [padded vocab_size], which it may overwrite.

    scratch: [3, padded vocab_size]; counts: [vocab_size], zeros.
    """
    size, wanted = arch.vocab_size, outputs.wanted[row]
    if wanted.logits_row >= 0:
        copied = outputs.logits[wanted.logits_row]
        for i in range(size):
            copied[i] = logits[i]
    num_logprobs, target = wanted.num_logprobs, wanted.target
    if target >= 0 and num_logprobs < 0:
        return
    raw_logits, normalizer = scratch[2], 0.0
    if num_logprobs >= 0:
        normalizer = log_sum_exp(logits, size, scratch[0])
        ids = outputs.top_ids[row, :num_logprobs]
        top_tokens(logits, size, ids)
        for i in range(ids.size):
            outputs.top_logprobs[row, i] = logits[ids[i]] - normalizer
    if target >= 0:
        outputs.logprobs[row] = logits[target] - normalizer
        return
    if not has_softmax(logits, size):
        outputs.tokens[row] = -1
        return
    if num_logprobs >= 0:
        for i in range(size):
            raw_logits[i] = logits[i]
    history = outputs.history[outputs.history_start[row] : outputs.history_start[row + 1]]
    if history.size > 0:
        penalize(
            logits, history, wanted.prompt_len, np.float32(wanted.repetition), np.float32(wanted.frequency),
            np.float32(wanted.presence), counts,
        )  # fmt: skip
    for i in range(outputs.bias_start[row], outputs.bias_start[row + 1]):
        logits[outputs.bias_ids[i]] += outputs.bias_values[i]
    token = sample(
        logits, size, np.float32(wanted.temperature), wanted.top_k, wanted.top_p, np.float32(wanted.min_p),
        np.uint64(wanted.seed), np.uint64(wanted.position), scratch[0], scratch[1],
    )  # fmt: skip
    outputs.tokens[row] = token
    if num_logprobs >= 0 and token >= 0:
        outputs.logprobs[row] = raw_logits[token] - normalizer


@kernel
def _answer(member, arch, weights, outputs, work):
    """The last norm, the logits [rows, vocab_size] and what is asked of them, `LOGIT_ROWS` rows at a time."""
    counters, num_threads, parts = member.counters, member.num_threads, weights.rest[0]
    stride, num_outputs = padded(arch.vocab_size), outputs.wanted.size
    for first in range(0, num_outputs, LOGIT_ROWS):
        num_rows = min(LOGIT_ROWS, num_outputs - first)
        if member.thread == 0:
            for row in range(num_rows):
                work.rows[row] = outputs.wanted[first + row].token_row
        barrier(counters, num_threads)
        _normalize_rows(
            member, arch, weights, parts.final_norm, parts.final_norm_b, num_rows, parts.lm_head.format, work
        )  # fmt: skip
        _linear(
            member, weights, parts.lm_head, parts.lm_head_b, num_rows, arch.hidden_size, arch.vocab_size,
            work.logits, plain(False), work,
        )  # fmt: skip
        item = next_item(counters)
        while item < num_rows:
            logits = work.logits[item * stride : (item + 1) * stride]
            scratch, counts = work.vocab_scratch[member.thread], work.counts[member.thread]
            _answer_row(arch, outputs, first + item, logits, scratch, counts)
            item = next_item(counters)
        barrier(counters, num_threads)


@kernel
def _plan(cache, batch, plan, work):
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


@entry_point
def step(thread, mailbox, arch, weights, cache, batch, plan, outputs, work):
    """Computes all new tokens of a batch through all layers, on all threads of a team.

    Fills the cache slots of the new tokens and the out fields of `outputs`. plan: room for what the step
    derives from the batch.
    """
    num_threads = share_call(thread, mailbox)
    member = Member(thread, num_threads, work.counters, work.scratch[thread])
    if thread == 0:
        _plan(cache, batch, plan, work)
    barrier(work.counters, num_threads)
    _embed(member, arch, weights, batch, plan, work)
    for layer in range(arch.layers.size):
        _attention_block(member, layer, arch, weights, cache, batch, plan, work)
        _feed_forward_block(member, layer, arch, weights, batch.token_ids.size, work)
    _answer(member, arch, weights, outputs, work)
