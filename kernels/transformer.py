"""The whole step as one compiled function: embedding, all layers, logits and sampling for every new token.

`step` is what each member of a thread team runs, in phases that each end with a barrier. One compiled
signature serves every model in every format: what tells models and layers apart are numbers in
`Architecture`, and where their parts lie is in `Weights`.
"""

import numpy as np

from pagellm.kernels.answer import answer_row
from pagellm.kernels.architecture import (
    adds_at_once,
    heads_size,
    latent_query_dim,
    latent_query_stride,
    qkv_size,
)
from pagellm.kernels.buffers import LOGIT_ROWS
from pagellm.kernels.jit import entry_point, kernel, plain
from pagellm.kernels.latent import join_heads, keep_latents, merge_latents, split_queries
from pagellm.kernels.packing import padded
from pagellm.kernels.phases import (
    Member,
    activate_rows,
    activate_slots,
    add_branch,
    attend,
    combine_experts,
    embed,
    expert_linear,
    gather_rows,
    linear,
    linear_by_head,
    merge_rows,
    normalize_rows,
    plan_batch,
    rotate_and_store,
    route_rows,
)
from pagellm.kernels.references import reference_to
from pagellm.kernels.threads import barrier, next_item, share_call


@kernel
def _latent_queries(member, layer, arch, weights, cache, num_rows, plan, work):
    """From the first product of latent attention to what is kept of tokens, and to queries that meet it."""
    features, parts = arch.layers[layer], weights.layers[layer]
    heads, latent, rank = features.num_heads, features.latent_dim, features.query_rank
    keep_latents(member, layer, arch, weights, cache, num_rows, plan, work)
    if rank > 0:
        linear(
            member, weights, parts.query_up, parts.query_up_b, num_rows, rank,
            heads * latent_query_dim(features), work.wide, plain(False), work,
        )  # fmt: skip
    split_queries(member, layer, arch, weights, num_rows, plan, work)
    linear_by_head(
        member, weights, parts.key_up, parts.key_up_b, num_rows, features.nope_dim, latent, heads,
        latent_query_stride(features), work.queries[features.head_dim - latent :], work,
    )  # fmt: skip


@kernel
def _latent_values(member, layer, arch, weights, num_rows, plan, work):
    """From the states that latent attention left to what the heads give, packed for the last product."""
    features, parts = arch.layers[layer], weights.layers[layer]
    merge_latents(member, layer, arch, weights, num_rows, plan, work)
    linear_by_head(
        member, weights, parts.value_up, parts.value_up_b, num_rows, features.latent_dim, features.value_dim,
        features.num_heads, padded(features.value_dim), work.wide, work,
    )  # fmt: skip
    join_heads(member, layer, arch, weights, num_rows, work)


@kernel
def _attention_block(member, layer, arch, weights, cache, batch, plan, out, accumulate, work):
    """output(attention(qkv(norm(hidden)))) for all new tokens, [num_tokens, hidden_size]."""
    features, parts, num_rows = arch.layers[layer], weights.layers[layer], batch.token_ids.size
    latent = features.latent_dim > 0
    normalize_rows(
        member, arch, weights, features.pre_norm, parts.attention_norm, parts.attention_norm_b, num_rows,
        parts.qkv, work,
    )  # fmt: skip
    linear(
        member, weights, parts.qkv, parts.qkv_b, num_rows, arch.hidden_size, qkv_size(features), work.wide,
        plain(False), work,
    )  # fmt: skip
    if latent:
        _latent_queries(member, layer, arch, weights, cache, num_rows, plan, work)
    else:
        rotate_and_store(member, layer, arch, weights, cache, num_rows, plan, work)
    attend(member, layer, arch, cache, batch, plan, work)
    if latent:
        _latent_values(member, layer, arch, weights, num_rows, plan, work)
    else:
        merge_rows(member, layer, arch, weights, num_rows, plan, work)
    linear(
        member, weights, parts.output, parts.output_b, num_rows, heads_size(features), arch.hidden_size, out,
        accumulate, work,
    )  # fmt: skip


@kernel
def _feed_forward_block(member, layer, arch, weights, num_rows, out, accumulate, work):
    """down(activation(up(norm(hidden)))) for all new tokens, [num_tokens, hidden_size]."""
    features, parts = arch.layers[layer], weights.layers[layer]
    size = features.intermediate_size
    up_size = 2 * padded(size) if features.gated else size  # each half begins on a panel
    normalize_rows(
        member, arch, weights, features.pre_norm, parts.mlp_norm, parts.mlp_norm_b, num_rows, parts.up, work,
    )  # fmt: skip
    linear(
        member, weights, parts.up, parts.up_b, num_rows, arch.hidden_size, up_size, work.wide, plain(False),
        work,
    )  # fmt: skip
    activate_rows(member, layer, arch, weights, num_rows, work)
    linear(
        member, weights, parts.down, parts.down_b, num_rows, size, arch.hidden_size, out, accumulate, work
    )  # fmt: skip


@kernel
def _experts_block(member, layer, arch, weights, num_rows, out, accumulate, work):
    """What each token's experts give of norm(hidden), and what the shared experts do, if there are any."""
    features, parts = arch.layers[layer], weights.layers[layer]
    size = features.expert_size
    normalize_rows(
        member, arch, weights, features.pre_norm, parts.router_norm, parts.router_norm_b, num_rows,
        parts.router, work,
    )  # fmt: skip
    linear(
        member, weights, parts.router, parts.router_b, num_rows, arch.hidden_size,
        features.num_experts + features.shared_gate, work.router, plain(False), work,
    )  # fmt: skip
    route_rows(member, layer, arch, weights, num_rows, work)
    gather_rows(member, layer, arch, weights, num_rows, work)
    expert_linear(
        member, weights, features, parts.expert_up, parts.expert_up_b, arch.hidden_size,
        padded(size) * (1 + features.gated), work.wide, work,
    )  # fmt: skip
    activate_slots(member, layer, arch, weights, num_rows, work)
    expert_linear(
        member, weights, features, parts.expert_down, parts.expert_down_b, size, arch.hidden_size,
        work.expert_out, work,
    )  # fmt: skip
    if features.intermediate_size > 0:
        _feed_forward_block(member, layer, arch, weights, num_rows, out, accumulate, work)
        accumulate = True
    combine_experts(member, layer, arch, weights, num_rows, out, accumulate, work)


@kernel
def _layer(member, layer, arch, weights, cache, batch, plan, work):
    """Adds to the hidden states what attention gives and then what the feed-forward gives.

    It is added as it is computed where nothing is to be done with it before, and else by way of a branch,
    which in a parallel layer holds the sum of both.
    """
    features, parts, num_rows = arch.layers[layer], weights.layers[layer], batch.token_ids.size
    at_once, parallel = adds_at_once(features), features.parallel != 0
    out = work.hidden if at_once else work.branch
    _attention_block(member, layer, arch, weights, cache, batch, plan, out, at_once, work)
    if not at_once and not parallel:
        norm, bias = parts.attention_post_norm, parts.attention_post_norm_b
        add_branch(member, arch, weights, features, norm, bias, np.float32(1.0), num_rows, work)
    if features.num_experts > 0:
        _experts_block(member, layer, arch, weights, num_rows, out, at_once or parallel, work)
    else:
        _feed_forward_block(member, layer, arch, weights, num_rows, out, at_once or parallel, work)
    if not at_once:
        norm, bias = parts.mlp_post_norm, parts.mlp_post_norm_b
        sum_scale = weights.values[parts.layer_scale.start] if features.layer_scale else np.float32(1.0)
        add_branch(member, arch, weights, features, norm, bias, sum_scale, num_rows, work)


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
        normalize_rows(
            member, arch, weights, plain(1), parts.final_norm, parts.final_norm_b, num_rows,
            parts.lm_head, work,
        )  # fmt: skip
        linear(
            member, weights, parts.lm_head, parts.lm_head_b, num_rows, arch.hidden_size, arch.vocab_size,
            work.logits, plain(False), work,
        )  # fmt: skip
        item = next_item(counters)
        while item < num_rows:
            logits = work.logits[item * stride : (item + 1) * stride]
            scratch, counts = work.vocab_scratch[member.thread], work.counts[member.thread]
            answer_row(arch, outputs, first + item, logits, scratch, counts)
            item = next_item(counters)
        barrier(counters, num_threads)


@entry_point
def step(thread, mailbox, arch, weights, cache, batch, plan, outputs, work):
    """Computes all new tokens of a batch through all layers, on all threads of a team.

    Fills the cache slots of the new tokens and the out fields of `outputs`. plan: room for what the step
    derives from the batch.
    """
    num_threads = share_call(thread, mailbox)
    member = reference_to(Member(thread, num_threads, work.counters, work.scratch[thread]))
    arch, weights, cache = reference_to(arch), reference_to(weights), reference_to(cache)
    batch, plan, outputs, work = (
        reference_to(batch), reference_to(plan), reference_to(outputs), reference_to(work)
    )  # fmt: skip
    if thread == 0:
        plan_batch(cache, batch, plan, work)
    barrier(work.counters, num_threads)
    embed(member, arch, weights, batch, plan, work)
    for layer in range(arch.layers.size):
        _layer(member, layer, arch, weights, cache, batch, plan, work)
    _answer(member, arch, weights, outputs, work)
