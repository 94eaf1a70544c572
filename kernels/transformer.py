"""The whole step as one compiled function: embedding, all layers, logits and sampling for every new token.

`step` is what each member of a thread team runs; it serves every decoder of the GPT-2 and Llama families,
told apart by a few numbers in `Architecture`. All weights lie in one buffer that the tables of offsets and
formats describe, so one compiled signature serves every model in every format.

Buffers of hidden states are flat, their rows padded to whole panels; the padding holds zeros or is ignored.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.activation import SILU_GATED, activate
from pagellm.kernels.attention import (
    attention,
    choose_heads_per_item,
    key_cache_size,
    max_states,
    max_tiles,
    merge_states,
    plan_tiles,
    scratch_size,
    state_words,
    store_kv,
    store_scratch_size,
    value_cache_size,
)
from pagellm.kernels.attention_products import TILE_COLUMNS
from pagellm.kernels.jit import entry_point, kernel, plain
from pagellm.kernels.matmul import matmul
from pagellm.kernels.norm import normalize
from pagellm.kernels.packing import (
    BLOCK,
    GROUP,
    PANEL,
    aligned_zeros,
    num_blocks,
    pack_row,
    padded,
    padded_rows,
    panels_size,
    unpack_column,
)
from pagellm.kernels.rope import rotate
from pagellm.kernels.sampling import has_softmax, log_sum_exp, penalize, sample, top_tokens
from pagellm.kernels.simd import LANES
from pagellm.kernels.threads import barrier, new_counters, next_item, next_rows, share_call

# Columns of the tables of offsets and formats, one row a layer. A "_B" is the bias or shift of the matrix or
# norm before.
ATTENTION_NORM, ATTENTION_NORM_B, QKV, QKV_B, OUTPUT, OUTPUT_B = range(6)
MLP_NORM, MLP_NORM_B, UP, UP_B, DOWN, DOWN_B = range(6, 12)
LAYER_PARTS = 12
# Entries of the tables' last row, which holds what belongs to no layer.
EMBEDDING, POSITION_EMBEDDING, FINAL_NORM, FINAL_NORM_B, LM_HEAD, LM_HEAD_B = range(6)

# Rows of logits computed at a time: bounds their memory whatever the number of rows that are asked for.
LOGIT_ROWS = 4 * GROUP


class Architecture(NamedTuple):
    """The numbers that tell one model's step from another's."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    layer_norm: bool  # LayerNorm; otherwise RMSNorm
    norm_epsilon: float
    activation: int  # of kernels.activation
    rotary: bool  # rotary embeddings; otherwise learned positions
    attention_scale: float


class Weights(NamedTuple):
    """What stays the same from step to step."""

    values: NDArray[np.float32]  # [everything], packed words of every format among the floats
    offsets: NDArray[np.int64]  # [num_layers + 1, LAYER_PARTS], where each part begins, in words
    formats: NDArray[np.int64]  # [num_layers + 1, LAYER_PARTS], of kernels.packing, for the matrices
    cos: NDArray[np.float32]  # [max_model_len, rotary_dim / 2]
    sin: NDArray[np.float32]


class Cache(NamedTuple):
    """The paged KV cache of all layers: see kernels.attention for a layer's layout."""

    keys: NDArray[np.float32]  # [num_layers * layer + LANES], the end so that a vector may begin anywhere
    values: NDArray[np.float32]  # likewise
    format: int  # FLOAT32 or BFLOAT16
    block_size: int
    num_blocks: int


class Batch(NamedTuple):
    """The new tokens of one step, flat, in the order of their sequences."""

    token_ids: NDArray[np.int32]  # [num_tokens]
    num_computed: NDArray[np.int32]  # [num_seqs], tokens of each sequence before its new ones
    query_start_loc: NDArray[np.int32]  # [num_seqs + 1]
    block_tables: NDArray[np.int32]  # [num_seqs, max_blocks]


class Plan(NamedTuple):
    """What a step derives from its batch before it computes."""

    positions: NDArray[np.int32]  # [max_tokens]
    slot_mapping: NDArray[np.int64]  # [max_tokens], block * block_size + offset
    seq_lens: NDArray[np.int32]  # [max_seqs], new tokens included
    tile_sequence: NDArray[np.int32]  # [max_tiles] of kernels.attention
    tile_start: NDArray[np.int32]  # [max_tiles]
    tile_chunk: NDArray[np.int32]  # [max_tiles]
    num_tiles: NDArray[np.int64]  # [1]
    state_start: NDArray[np.int32]  # [max_tokens + 1]
    states: NDArray[np.float32]  # [max_states * num_heads * state_words]


# Columns of `Outputs.integers`: the flat token row of the logits, the token that follows or -1 to sample it,
# how many top tokens are wanted or -1 for no log-probabilities, the row of `Outputs.logits` or -1.
ROW, TARGET, NUM_LOGPROBS, LOGITS_ROW, TOP_K, SEED, POSITION, PROMPT_LEN = range(8)
NUM_INTEGERS = 8
# Columns of `Outputs.floats`.
TEMPERATURE, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE = range(6)
NUM_FLOATS = 6


class Outputs(NamedTuple):
    """What is asked of each row of logits, and where the answers go; R rows."""

    integers: NDArray[np.int64]  # [R, NUM_INTEGERS]
    floats: NDArray[np.float64]  # [R, NUM_FLOATS]
    history: NDArray[np.int32]  # all rows' tokens so far, where a penalty wants them
    history_start: NDArray[np.int32]  # [R + 1]
    bias_ids: NDArray[np.int32]  # all rows' biased tokens
    bias_values: NDArray[np.float32]
    bias_start: NDArray[np.int32]  # [R + 1]
    tokens: NDArray[np.int32]  # [R], out: sampled, or -1 where the logits name no token
    logprobs: NDArray[np.float32]  # [R], out: of the token or target
    top_ids: NDArray[np.int32]  # [R, max(num_logprobs)], out
    top_logprobs: NDArray[np.float32]  # [R, max(num_logprobs)], out
    logits: NDArray[np.float32]  # [at most R, vocab_size], out: whole rows


class Workspace(NamedTuple):
    """Buffers that a step writes first and reads afterwards; their content means nothing between steps."""

    rows: NDArray[np.int64]  # [max(max_tokens, LOGIT_ROWS)], scratch for the rows of a phase
    hidden: NDArray[np.float32]  # [rows, padded hidden_size], the residual stream
    packed: NDArray[np.float32]  # activations on their way into a matmul, in the format of its weights
    wide: NDArray[np.float32]  # [rows, the widest of qkv and feed-forward], what a matmul wrote
    logits: NDArray[np.float32]  # [LOGIT_ROWS, padded vocab_size]
    scratch: NDArray[np.float32]  # [num_threads, one row of the widest activations]
    attention: NDArray[np.float32]  # [num_threads, per thread], working memory of kernels.attention
    vocab_scratch: NDArray[np.float32]  # [num_threads, 3, padded vocab_size]
    counts: NDArray[np.int32]  # [num_threads, vocab_size], zeros
    counters: NDArray[np.int64]  # of kernels.threads


@kernel
def _embed(num_threads, arch, weights, batch, plan, work):
    stride = padded(arch.hidden_size)
    offsets, format = weights.offsets[arch.num_layers], weights.formats[arch.num_layers, EMBEDDING]
    first, end = next_rows(work.counters, batch.token_ids.size, num_threads)
    while first < end:
        for row in range(first, end):
            start, hidden = row * stride, work.hidden
            unpack_column(
                format, weights.values, offsets[EMBEDDING], arch.hidden_size, batch.token_ids[row], hidden,
                start,
            )  # fmt: skip
            for i in range(arch.hidden_size, stride):
                hidden[start + i] = 0.0
            if not arch.rotary:
                position = offsets[POSITION_EMBEDDING] + plan.positions[row] * arch.hidden_size
                for i in range(arch.hidden_size):
                    hidden[start + i] += weights.values[position + i]
        first, end = next_rows(work.counters, batch.token_ids.size, num_threads)


@kernel
def _normalize_rows(num_threads, arch, weights, w_start, b_start, num_rows, format, scratch, work):
    """Normalises the hidden states of the first `work.rows` and packs them for a matrix of this format."""
    stride = padded(arch.hidden_size)
    first, end = next_rows(work.counters, num_rows, num_threads)
    while first < end:
        for row in range(first, end):
            normalize(
                work.hidden, work.rows[row] * stride, arch.hidden_size, arch.layer_norm, arch.norm_epsilon,
                weights.values, w_start, b_start, scratch,
            )  # fmt: skip
            pack_row(format, scratch, 0, arch.hidden_size, row, work.packed, 0)
        first, end = next_rows(work.counters, num_rows, num_threads)


@kernel
def _rotate_and_store(num_threads, arch, weights, cache, num_rows, plan, layer_k, layer_v, scratch, work):
    """Rotates the new queries and keys in place and writes keys and values to their cache slots."""
    heads, kv_heads, head_dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
    stride = padded((heads + 2 * kv_heads) * head_dim)
    first, end = next_rows(work.counters, num_rows, num_threads)
    while first < end:
        for row in range(first, end):
            start = row * stride
            if arch.rotary:
                for head in range(heads + kv_heads):
                    rotate(work.wide, start + head * head_dim, weights.cos, weights.sin, plan.positions[row])
            k_start = start + heads * head_dim
            store_kv(
                cache.format, work.wide, k_start, work.wide, k_start + kv_heads * head_dim, head_dim,
                kv_heads, cache.block_size, plan.slot_mapping[row], cache.keys, cache.values, layer_k,
                layer_v, scratch,
            )  # fmt: skip
        first, end = next_rows(work.counters, num_rows, num_threads)


@kernel
def _attended_rows(num_threads, arch, num_rows, plan, format, scratch, work):
    """Joins the states that attention left for each token and packs them for the output projection."""
    size = arch.num_heads * arch.head_dim
    first, end = next_rows(work.counters, num_rows, num_threads)
    while first < end:
        for row in range(first, end):
            merge_states(
                plan.states, plan.state_start[row], plan.state_start[row + 1], arch.num_heads,
                arch.head_dim, scratch,
            )  # fmt: skip
            pack_row(format, scratch, 0, size, row, work.packed, 0)
        first, end = next_rows(work.counters, num_rows, num_threads)


@kernel
def _activate_rows(num_threads, arch, num_rows, format, scratch, work):
    """Applies the activation to what the up projection wrote and packs it for the down projection."""
    up_offset = padded(arch.intermediate_size)
    stride = up_offset * (2 if arch.activation == SILU_GATED else 1)
    first, end = next_rows(work.counters, num_rows, num_threads)
    while first < end:
        for row in range(first, end):
            activate(arch.activation, work.wide, row * stride, arch.intermediate_size, up_offset, scratch)
            pack_row(format, scratch, 0, arch.intermediate_size, row, work.packed, 0)
        first, end = next_rows(work.counters, num_rows, num_threads)


@kernel
def _layer(thread, num_threads, layer, arch, weights, cache, batch, plan, work):
    """One decoder layer, in phases that a barrier separates."""
    counters, scratch, num_rows = work.counters, work.scratch[thread], batch.token_ids.size
    offsets, formats = weights.offsets[layer], weights.formats[layer]
    heads, kv_heads, head_dim, hidden = arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.hidden_size
    qkv_size = (heads + 2 * kv_heads) * head_dim
    up_size = padded(arch.intermediate_size) * 2 if arch.activation == SILU_GATED else arch.intermediate_size
    replace, add = plain(False), plain(True)
    layer_k = layer * key_cache_size(cache.format, cache.num_blocks, cache.block_size, kv_heads, head_dim)
    layer_v = layer * value_cache_size(cache.format, cache.num_blocks, cache.block_size, kv_heads, head_dim)

    _normalize_rows(
        num_threads, arch, weights, offsets[ATTENTION_NORM], offsets[ATTENTION_NORM_B], num_rows,
        formats[QKV], scratch, work,
    )  # fmt: skip
    barrier(counters, num_threads)
    matmul(
        counters, num_threads, formats[QKV], work.packed, num_rows, hidden, weights.values, offsets[QKV],
        offsets[QKV_B], qkv_size, work.wide, replace,
    )  # fmt: skip
    barrier(counters, num_threads)
    _rotate_and_store(num_threads, arch, weights, cache, num_rows, plan, layer_k, layer_v, scratch, work)
    barrier(counters, num_threads)
    heads_per_item = choose_heads_per_item(plan.num_tiles[0], num_threads, heads // kv_heads)
    attention(
        counters, heads_per_item, cache.format, work.wide, padded(qkv_size), heads, kv_heads, head_dim,
        np.float32(arch.attention_scale), cache.keys, cache.values, layer_k, layer_v, cache.block_size,
        batch.block_tables, batch.query_start_loc, plan.seq_lens, plan.tile_sequence[: plan.num_tiles[0]],
        plan.tile_start, plan.tile_chunk, plan.state_start, plan.states, work.attention[thread],
    )  # fmt: skip
    barrier(counters, num_threads)
    _attended_rows(num_threads, arch, num_rows, plan, formats[OUTPUT], scratch, work)
    barrier(counters, num_threads)
    matmul(
        counters, num_threads, formats[OUTPUT], work.packed, num_rows, heads * head_dim, weights.values,
        offsets[OUTPUT], offsets[OUTPUT_B], hidden, work.hidden, add,
    )  # fmt: skip
    barrier(counters, num_threads)

    _normalize_rows(
        num_threads, arch, weights, offsets[MLP_NORM], offsets[MLP_NORM_B], num_rows, formats[UP], scratch,
        work,
    )  # fmt: skip
    barrier(counters, num_threads)
    matmul(
        counters, num_threads, formats[UP], work.packed, num_rows, hidden, weights.values, offsets[UP],
        offsets[UP_B], up_size, work.wide, replace,
    )  # fmt: skip
    barrier(counters, num_threads)
    _activate_rows(num_threads, arch, num_rows, formats[DOWN], scratch, work)
    barrier(counters, num_threads)
    matmul(
        counters, num_threads, formats[DOWN], work.packed, num_rows, arch.intermediate_size, weights.values,
        offsets[DOWN], offsets[DOWN_B], hidden, work.hidden, add,
    )  # fmt: skip
    barrier(counters, num_threads)


@kernel
def _answer_row(arch, outputs, row, logits, scratch, counts):
    """Does what `outputs` asks of one row of logits, which it may overwrite."""
    size, integers, floats = arch.vocab_size, outputs.integers[row], outputs.floats[row]
    if integers[LOGITS_ROW] >= 0:
        copied = outputs.logits[integers[LOGITS_ROW]]
        for i in range(size):
            copied[i] = logits[i]
    num_logprobs, target = integers[NUM_LOGPROBS], integers[TARGET]
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
            logits, history, integers[PROMPT_LEN], np.float32(floats[REPETITION]),
            np.float32(floats[FREQUENCY]), np.float32(floats[PRESENCE]), counts,
        )  # fmt: skip
    for i in range(outputs.bias_start[row], outputs.bias_start[row + 1]):
        logits[outputs.bias_ids[i]] += outputs.bias_values[i]
    token = sample(
        logits, size, np.float32(floats[TEMPERATURE]), integers[TOP_K], floats[TOP_P],
        np.float32(floats[MIN_P]), np.uint64(integers[SEED]), np.uint64(integers[POSITION]), scratch[0],
        scratch[1],
    )  # fmt: skip
    outputs.tokens[row] = token
    if num_logprobs >= 0 and token >= 0:
        outputs.logprobs[row] = raw_logits[token] - normalizer


@kernel
def _answer(thread, num_threads, arch, weights, outputs, work):
    """The last norm, the logits and what is asked of them, for `LOGIT_ROWS` rows at a time."""
    counters = work.counters
    offsets, formats = weights.offsets[arch.num_layers], weights.formats[arch.num_layers]
    stride = padded(arch.vocab_size)
    num_outputs = outputs.integers.shape[0]
    for first in range(0, num_outputs, LOGIT_ROWS):
        num_rows = min(LOGIT_ROWS, num_outputs - first)
        if thread == 0:
            for row in range(num_rows):
                work.rows[row] = outputs.integers[first + row, ROW]
        barrier(counters, num_threads)
        _normalize_rows(
            num_threads, arch, weights, offsets[FINAL_NORM], offsets[FINAL_NORM_B], num_rows,
            formats[LM_HEAD], work.scratch[thread], work,
        )  # fmt: skip
        barrier(counters, num_threads)
        matmul(
            counters, num_threads, formats[LM_HEAD], work.packed, num_rows, arch.hidden_size, weights.values,
            offsets[LM_HEAD], offsets[LM_HEAD_B], arch.vocab_size, work.logits, plain(False),
        )  # fmt: skip
        barrier(counters, num_threads)
        item = next_item(counters)
        while item < num_rows:
            logits = work.logits[item * stride : (item + 1) * stride]
            _answer_row(arch, outputs, first + item, logits, work.vocab_scratch[thread], work.counts[thread])
            item = next_item(counters)
        barrier(counters, num_threads)


@kernel
def _plan(arch, cache, batch, plan, work):
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
        batch.query_start_loc, plan.seq_lens[: batch.num_computed.size], arch.num_heads // arch.num_kv_heads,
        plan.tile_sequence, plan.tile_start, plan.tile_chunk, plan.state_start,
    )  # fmt: skip


@entry_point
def step(thread, mailbox, arch, weights, cache, batch, plan, outputs, work):
    """Computes all new tokens of a batch through all layers, on all threads of a team.

    Fills the cache slots of the new tokens and the out fields of `outputs`. plan: room for what the step
    derives from the batch.
    """
    num_threads = share_call(thread, mailbox)
    if thread == 0:
        _plan(arch, cache, batch, plan, work)
    barrier(work.counters, num_threads)
    _embed(num_threads, arch, weights, batch, plan, work)
    barrier(work.counters, num_threads)
    for layer in range(arch.num_layers):
        _layer(thread, num_threads, layer, arch, weights, cache, batch, plan, work)
    _answer(thread, num_threads, arch, weights, outputs, work)


def new_plan(arch: Architecture, max_tokens: int, max_seqs: int, num_chunks: int) -> Plan:
    """Room for the plans of batches whose longest context has at most `num_chunks` chunks of keys."""
    size = (max_tokens, max_seqs, num_chunks, arch.num_heads // arch.num_kv_heads)
    return Plan(
        positions=np.zeros(max_tokens, np.int32),
        slot_mapping=np.zeros(max_tokens, np.int64),
        seq_lens=np.zeros(max_seqs, np.int32),
        tile_sequence=np.zeros(max_tiles(*size), np.int32),
        tile_start=np.zeros(max_tiles(*size), np.int32),
        tile_chunk=np.zeros(max_tiles(*size), np.int32),
        num_tiles=np.zeros(1, np.int64),
        state_start=np.zeros(max_tokens + 1, np.int32),
        states=aligned_zeros(max_states(*size) * arch.num_heads * state_words(arch.head_dim)),
    )


def lay_out(
    arch: Architecture, formats: NDArray[np.int64], max_positions: int, tied: bool
) -> tuple[NDArray[np.int64], int]:
    """Where every part lies in the weights buffer: the table of offsets and the buffer's size, in words.

    formats: as in `Weights`; max_positions: rows of the learned position embedding, if there is one; tied:
    the output matrix is the embedding. Parts that a model lacks (biases) are there as zeros, so that the step
    has one path.
    """
    hidden, heads_size = arch.hidden_size, arch.num_heads * arch.head_dim
    qkv_size = heads_size + 2 * arch.num_kv_heads * arch.head_dim
    up_size = arch.intermediate_size
    if arch.activation == SILU_GATED:
        up_size = padded(up_size) * 2  # the gate and the linear half each begin on a panel
    vectors = {
        ATTENTION_NORM: hidden,
        ATTENTION_NORM_B: hidden,
        QKV_B: qkv_size,
        OUTPUT_B: hidden,
        MLP_NORM: hidden,
        MLP_NORM_B: hidden,
        UP_B: up_size,
        DOWN_B: hidden,
    }
    matrices = {
        QKV: (qkv_size, hidden),
        OUTPUT: (hidden, heads_size),
        UP: (up_size, hidden),
        DOWN: (hidden, arch.intermediate_size),
    }
    rest_vectors = {
        POSITION_EMBEDDING: 0 if arch.rotary else max_positions * hidden,
        FINAL_NORM: hidden,
        FINAL_NORM_B: hidden,
        LM_HEAD_B: arch.vocab_size,
    }
    rest_matrices = {EMBEDDING: (arch.vocab_size, hidden)}
    if not tied:
        rest_matrices[LM_HEAD] = (arch.vocab_size, hidden)
    offsets = np.zeros((arch.num_layers + 1, LAYER_PARTS), dtype=np.int64)
    end = 0
    for row in range(arch.num_layers + 1):
        in_layer = row < arch.num_layers
        for part, (N, K) in (matrices if in_layer else rest_matrices).items():
            offsets[row, part] = end
            end += -(-panels_size(int(formats[row, part]), N, K) // LANES) * LANES
        for part, size in (vectors if in_layer else rest_vectors).items():
            offsets[row, part] = end
            end += padded(size)
    if tied:
        offsets[arch.num_layers, LM_HEAD] = offsets[arch.num_layers, EMBEDDING]
    return offsets, end + LANES


def new_workspace(arch: Architecture, max_tokens: int, num_threads: int) -> Workspace:
    """Buffers for steps of at most `max_tokens` tokens on `num_threads` threads."""
    rows = padded_rows(max_tokens)
    heads_size = arch.num_heads * arch.head_dim
    qkv_size = heads_size + 2 * arch.num_kv_heads * arch.head_dim
    up_size = padded(arch.intermediate_size) * (2 if arch.activation == SILU_GATED else 1)
    widest_input = num_blocks(max(arch.hidden_size, heads_size, arch.intermediate_size)) * BLOCK
    per_thread = max(widest_input + PANEL + BLOCK, store_scratch_size(arch.head_dim))
    attention_scratch = scratch_size(arch.num_heads // arch.num_kv_heads, arch.head_dim)
    attention_scratch = -(-attention_scratch // LANES) * LANES
    return Workspace(
        rows=np.zeros(max(max_tokens, LOGIT_ROWS), np.int64),
        hidden=aligned_zeros(rows * padded(arch.hidden_size)),
        packed=aligned_zeros(max(rows, LOGIT_ROWS) * widest_input),
        wide=aligned_zeros(rows * max(padded(qkv_size), up_size)),
        logits=aligned_zeros(LOGIT_ROWS * padded(arch.vocab_size)),
        scratch=aligned_zeros(num_threads * per_thread).reshape(num_threads, per_thread),
        attention=aligned_zeros(num_threads * attention_scratch).reshape(num_threads, attention_scratch),
        vocab_scratch=np.zeros((num_threads, 3, padded(arch.vocab_size)), np.float32),
        counts=np.zeros((num_threads, arch.vocab_size), np.int32),
        counters=new_counters(),
    )


def new_cache(arch: Architecture, format: int, num_blocks: int, block_size: int) -> Cache:
    """A zeroed KV cache; the operating system hands out its memory as blocks are first written."""
    size = (format, num_blocks, block_size, arch.num_kv_heads, arch.head_dim)
    return Cache(
        keys=aligned_zeros(arch.num_layers * key_cache_size(*size) + LANES),
        values=aligned_zeros(arch.num_layers * value_cache_size(*size) + TILE_COLUMNS),
        format=format,
        block_size=block_size,
        num_blocks=num_blocks,
    )
