"""The whole step as one compiled function: embedding, all layers, logits and sampling for every new token.

`step` is what each member of a thread team runs; it serves every decoder of the GPT-2 and Llama families,
told apart by a few numbers in `Architecture`. All weights lie in one float32 buffer that `Architecture` and
the offset table describe, so one compiled signature serves every model.

Buffers of hidden states are flat, their rows padded to whole panels; the padding holds zeros or is ignored.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.activation import SILU_GATED, activate
from kernels.attention import attention, key_cache_size, scratch_size, store_kv, value_cache_size
from kernels.jit import entry_point, kernel
from kernels.matmul import matmul
from kernels.norm import normalize
from kernels.packing import GROUP, pack_row, padded, padded_rows, panels_size, unpack_column
from kernels.rope import rotate
from kernels.sampling import log_sum_exp, penalize, sample, top_tokens
from kernels.simd import LANES
from kernels.threads import barrier, new_counters, next_item

# Columns of the table of offsets, one row a layer. A "_B" is the bias or shift of the matrix or norm before.
ATTENTION_NORM, ATTENTION_NORM_B, QKV, QKV_B, OUTPUT, OUTPUT_B = range(6)
MLP_NORM, MLP_NORM_B, UP, UP_B, DOWN, DOWN_B = range(6, 12)
LAYER_PARTS = 12
# Entries of the table's last row, which holds what belongs to no layer.
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

    values: NDArray[np.float32]  # [everything]
    offsets: NDArray[np.int64]  # [num_layers + 1, LAYER_PARTS]
    cos: NDArray[np.float32]  # [max_model_len, rotary_dim / 2]
    sin: NDArray[np.float32]


class Cache(NamedTuple):
    """The paged KV cache of all layers: see kernels.attention for a layer's layout."""

    keys: NDArray[np.float32]  # [num_layers * layer + LANES], the end so that a vector may begin anywhere
    values: NDArray[np.float32]  # [num_layers * layer]
    block_size: int
    num_blocks: int


class Batch(NamedTuple):
    """The new tokens of one step, flat, in the order of their sequences."""

    token_ids: NDArray[np.int32]  # [num_tokens]
    positions: NDArray[np.int32]  # [num_tokens]
    slot_mapping: NDArray[np.int64]  # [num_tokens], block * block_size + offset
    query_start_loc: NDArray[np.int32]  # [num_seqs + 1]
    seq_lens: NDArray[np.int32]  # [num_seqs], new tokens included
    block_tables: NDArray[np.int32]  # [num_seqs, max_blocks]
    tile_sequence: NDArray[np.int32]  # [num_tiles] of kernels.attention
    tile_start: NDArray[np.int32]  # [num_tiles]


class Outputs(NamedTuple):
    """What is asked of each row of logits, and where the answers go; R rows."""

    rows: NDArray[np.int64]  # [R], flat token rows
    targets: NDArray[np.int32]  # [R], the token that follows, or -1 to sample it
    temperature: NDArray[np.float32]  # [R]
    top_k: NDArray[np.int32]  # [R]
    top_p: NDArray[np.float64]  # [R]
    min_p: NDArray[np.float32]  # [R]
    seeds: NDArray[np.uint64]  # [R]
    positions: NDArray[np.uint64]  # [R], of the token that is sampled
    repetition: NDArray[np.float32]  # [R]
    frequency: NDArray[np.float32]  # [R]
    presence: NDArray[np.float32]  # [R]
    history: NDArray[np.int32]  # all rows' tokens so far, where a penalty wants them
    history_start: NDArray[np.int32]  # [R + 1]
    prompt_lens: NDArray[np.int32]  # [R]
    bias_ids: NDArray[np.int32]  # all rows' biased tokens
    bias_values: NDArray[np.float32]
    bias_start: NDArray[np.int32]  # [R + 1]
    num_logprobs: NDArray[np.int32]  # [R], how many top tokens, or -1 for no log-probabilities
    tokens: NDArray[np.int32]  # [R], out: sampled, or -1 where the logits name no token
    logprobs: NDArray[np.float32]  # [R], out: of the token or target
    top_ids: NDArray[np.int32]  # [R, max(num_logprobs)], out
    top_logprobs: NDArray[np.float32]  # [R, max(num_logprobs)], out
    logits: NDArray[np.float32]  # [at most R, vocab_size], out: whole rows
    logits_rows: NDArray[np.int32]  # [R], row of `logits` or -1


class Workspace(NamedTuple):
    """Buffers that a step writes first and reads afterwards; their content means nothing between steps."""

    hidden: NDArray[np.float32]  # [rows, padded hidden_size], the residual stream
    packed: NDArray[np.float32]  # activations on their way into a matmul
    wide: NDArray[np.float32]  # [rows, the widest of qkv and feed-forward], what a matmul wrote
    logits: NDArray[np.float32]  # [LOGIT_ROWS, padded vocab_size]
    scratch: NDArray[np.float32]  # [num_threads, per thread]
    vocab_scratch: NDArray[np.float32]  # [num_threads, 2, padded vocab_size]
    counts: NDArray[np.int32]  # [num_threads, vocab_size], zeros
    counters: NDArray[np.int64]  # of kernels.threads


@kernel
def _embed(arch, weights, batch, work):
    stride = padded(arch.hidden_size)
    offsets = weights.offsets[arch.num_layers]
    row = next_item(work.counters)
    while row < batch.token_ids.size:
        start, hidden = row * stride, work.hidden
        unpack_column(
            weights.values, offsets[EMBEDDING], arch.hidden_size, batch.token_ids[row], hidden, start
        )
        hidden[start + arch.hidden_size : start + stride] = 0.0
        if not arch.rotary:
            position = offsets[POSITION_EMBEDDING] + batch.positions[row] * arch.hidden_size
            for i in range(arch.hidden_size):
                hidden[start + i] += weights.values[position + i]
        row = next_item(work.counters)


@kernel
def _normalize_rows(arch, weights, w_start, b_start, rows, scratch, work):
    """Normalises the hidden states of `rows` and packs them for a matmul."""
    stride = padded(arch.hidden_size)
    item = next_item(work.counters)
    while item < rows.size:
        normalize(
            work.hidden, rows[item] * stride, arch.hidden_size, arch.layer_norm, arch.norm_epsilon,
            weights.values, w_start, b_start, scratch,
        )  # fmt: skip
        pack_row(scratch, 0, arch.hidden_size, item, rows.size, work.packed)
        item = next_item(work.counters)


@kernel
def _rotate_and_store(arch, weights, cache, batch, layer_k, layer_v, work):
    """Rotates the new queries and keys in place and writes keys and values to their cache slots."""
    heads, kv_heads, head_dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
    stride = padded((heads + 2 * kv_heads) * head_dim)
    row = next_item(work.counters)
    while row < batch.token_ids.size:
        start = row * stride
        if arch.rotary:
            for head in range(heads + kv_heads):
                rotate(
                    work.wide,
                    start + head * head_dim,
                    weights.cos,
                    weights.sin,
                    batch.positions[row],
                )
        k_start = start + heads * head_dim
        store_kv(
            work.wide, k_start, work.wide, k_start + kv_heads * head_dim, head_dim, kv_heads,
            cache.block_size, batch.slot_mapping[row], cache.keys, cache.values, layer_k, layer_v,
        )  # fmt: skip
        row = next_item(work.counters)


@kernel
def _activate_rows(arch, num_rows, scratch, work):
    """Applies the activation to what the up projection wrote and packs it for the down projection."""
    up_offset = padded(arch.intermediate_size)
    stride = up_offset * (2 if arch.activation == SILU_GATED else 1)
    row = next_item(work.counters)
    while row < num_rows:
        activate(arch.activation, work.wide, row * stride, arch.intermediate_size, up_offset, scratch)
        pack_row(scratch, 0, arch.intermediate_size, row, num_rows, work.packed)
        row = next_item(work.counters)


@kernel
def _layer(thread, num_threads, layer, arch, weights, cache, batch, all_rows, work):
    """One decoder layer, in phases that a barrier separates."""
    counters, scratch, num_rows = work.counters, work.scratch[thread], all_rows.size
    offsets = weights.offsets[layer]
    heads, kv_heads, head_dim, hidden = arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.hidden_size
    qkv_size = (heads + 2 * kv_heads) * head_dim
    layer_k = layer * cache.num_blocks * kv_heads * head_dim * cache.block_size
    layer_v = layer * (cache.values.size // arch.num_layers)

    _normalize_rows(
        arch, weights, offsets[ATTENTION_NORM], offsets[ATTENTION_NORM_B], all_rows, scratch, work
    )
    barrier(counters, num_threads)
    matmul(
        counters, work.packed, num_rows, hidden, weights.values, offsets[QKV], offsets[QKV_B], qkv_size,
        work.wide, False,
    )  # fmt: skip
    barrier(counters, num_threads)
    _rotate_and_store(arch, weights, cache, batch, layer_k, layer_v, work)
    barrier(counters, num_threads)
    attention(
        counters, work.wide, padded(qkv_size), heads, kv_heads, head_dim, np.float32(arch.attention_scale),
        cache.keys, cache.values, layer_k, layer_v, cache.block_size, batch.block_tables,
        batch.query_start_loc, batch.seq_lens, batch.tile_sequence, batch.tile_start, scratch, work.packed,
    )  # fmt: skip
    barrier(counters, num_threads)
    matmul(
        counters, work.packed, num_rows, heads * head_dim, weights.values, offsets[OUTPUT],
        offsets[OUTPUT_B], hidden, work.hidden, True,
    )  # fmt: skip
    barrier(counters, num_threads)

    _normalize_rows(arch, weights, offsets[MLP_NORM], offsets[MLP_NORM_B], all_rows, scratch, work)
    barrier(counters, num_threads)
    up_size = padded(arch.intermediate_size) * 2 if arch.activation == SILU_GATED else arch.intermediate_size
    matmul(
        counters, work.packed, num_rows, hidden, weights.values, offsets[UP], offsets[UP_B], up_size,
        work.wide, False,
    )  # fmt: skip
    barrier(counters, num_threads)
    _activate_rows(arch, num_rows, scratch, work)
    barrier(counters, num_threads)
    matmul(
        counters, work.packed, num_rows, arch.intermediate_size, weights.values, offsets[DOWN],
        offsets[DOWN_B], hidden, work.hidden, True,
    )  # fmt: skip
    barrier(counters, num_threads)


@kernel
def _answer_row(arch, outputs, row, logits, scratch, counts):
    """Does what `outputs` asks of one row of logits, which it may overwrite."""
    size = arch.vocab_size
    if outputs.logits_rows[row] >= 0:
        outputs.logits[outputs.logits_rows[row]] = logits[:size]
    num_logprobs, target = outputs.num_logprobs[row], outputs.targets[row]
    if target >= 0 and num_logprobs < 0:
        return
    raw_logits = logits
    normalizer = log_sum_exp(logits, size, scratch[0])
    ids = outputs.top_ids[row, : max(num_logprobs, 0)]
    if num_logprobs >= 0:
        top_tokens(logits, size, ids)
        for i in range(ids.size):
            outputs.top_logprobs[row, i] = logits[ids[i]] - normalizer
    if target >= 0:
        outputs.logprobs[row] = logits[target] - normalizer
        return
    if not np.isfinite(normalizer):
        outputs.tokens[row] = -1
        return
    if num_logprobs >= 0:
        raw_logits = logits.copy()
    history = outputs.history[outputs.history_start[row] : outputs.history_start[row + 1]]
    if history.size > 0:
        penalize(
            logits, history, outputs.prompt_lens[row], outputs.repetition[row], outputs.frequency[row],
            outputs.presence[row], counts,
        )  # fmt: skip
    for i in range(outputs.bias_start[row], outputs.bias_start[row + 1]):
        logits[outputs.bias_ids[i]] += outputs.bias_values[i]
    token = sample(
        logits, size, outputs.temperature[row], outputs.top_k[row], outputs.top_p[row], outputs.min_p[row],
        outputs.seeds[row], outputs.positions[row], scratch[0], scratch[1],
    )  # fmt: skip
    outputs.tokens[row] = token
    if num_logprobs >= 0 and token >= 0:
        outputs.logprobs[row] = raw_logits[token] - normalizer


@kernel
def _answer(thread, num_threads, arch, weights, outputs, work):
    """The last norm, the logits and what is asked of them, for `LOGIT_ROWS` rows at a time."""
    counters = work.counters
    offsets = weights.offsets[arch.num_layers]
    stride = padded(arch.vocab_size)
    for first in range(0, outputs.rows.size, LOGIT_ROWS):
        rows = outputs.rows[first : first + LOGIT_ROWS]
        _normalize_rows(
            arch, weights, offsets[FINAL_NORM], offsets[FINAL_NORM_B], rows, work.scratch[thread], work
        )
        barrier(counters, num_threads)
        matmul(
            counters, work.packed, rows.size, arch.hidden_size, weights.values, offsets[LM_HEAD],
            offsets[LM_HEAD_B], arch.vocab_size, work.logits, False,
        )  # fmt: skip
        barrier(counters, num_threads)
        item = next_item(counters)
        while item < rows.size:
            logits = work.logits[item * stride : (item + 1) * stride]
            _answer_row(arch, outputs, first + item, logits, work.vocab_scratch[thread], work.counts[thread])
            item = next_item(counters)
        barrier(counters, num_threads)


@entry_point
def step(thread, num_threads, arch, weights, cache, batch, outputs, work):
    """Computes all new tokens of a batch through all layers; every thread of the team calls it.

    Fills the cache slots of the new tokens and the out fields of `outputs`.
    """
    all_rows = np.arange(batch.token_ids.size)
    _embed(arch, weights, batch, work)
    barrier(work.counters, num_threads)
    for layer in range(arch.num_layers):
        _layer(thread, num_threads, layer, arch, weights, cache, batch, all_rows, work)
    _answer(thread, num_threads, arch, weights, outputs, work)


def lay_out(arch: Architecture, max_positions: int, tied: bool) -> tuple[NDArray[np.int64], int]:
    """Where every part lies in the weights buffer: the table of offsets and the buffer's size, in floats.

    max_positions: rows of the learned position embedding, if there is one; tied: the output matrix is the
    embedding. Parts that a model lacks (biases) are there as zeros, so that the step has one path.
    """
    hidden, heads_size = arch.hidden_size, arch.num_heads * arch.head_dim
    qkv_size = heads_size + 2 * arch.num_kv_heads * arch.head_dim
    up_size = arch.intermediate_size
    if arch.activation == SILU_GATED:
        up_size = padded(up_size) * 2  # the gate and the linear half each begin on a panel
    layer = {
        ATTENTION_NORM: padded(hidden),
        ATTENTION_NORM_B: padded(hidden),
        QKV: panels_size(qkv_size, hidden),
        QKV_B: padded(qkv_size),
        OUTPUT: panels_size(hidden, heads_size),
        OUTPUT_B: padded(hidden),
        MLP_NORM: padded(hidden),
        MLP_NORM_B: padded(hidden),
        UP: panels_size(up_size, hidden),
        UP_B: padded(up_size),
        DOWN: panels_size(hidden, arch.intermediate_size),
        DOWN_B: padded(hidden),
    }
    rest = {
        EMBEDDING: panels_size(arch.vocab_size, hidden),
        POSITION_EMBEDDING: 0 if arch.rotary else max_positions * hidden,
        FINAL_NORM: padded(hidden),
        FINAL_NORM_B: padded(hidden),
        LM_HEAD: 0 if tied else panels_size(arch.vocab_size, hidden),
        LM_HEAD_B: padded(arch.vocab_size),
    }
    offsets = np.zeros((arch.num_layers + 1, LAYER_PARTS), dtype=np.int64)
    end = 0
    for row in range(arch.num_layers + 1):
        for part, size in (layer if row < arch.num_layers else rest).items():
            offsets[row, part] = end
            end += -(-size // LANES) * LANES
    if tied:
        offsets[arch.num_layers, LM_HEAD] = offsets[arch.num_layers, EMBEDDING]
    return offsets, end + LANES


def new_workspace(arch: Architecture, max_tokens: int, num_threads: int) -> Workspace:
    """Buffers for steps of at most `max_tokens` tokens on `num_threads` threads."""
    rows = padded_rows(max_tokens)
    heads_size = arch.num_heads * arch.head_dim
    qkv_size = heads_size + 2 * arch.num_kv_heads * arch.head_dim
    up_size = padded(arch.intermediate_size) * (2 if arch.activation == SILU_GATED else 1)
    widest_input = max(arch.hidden_size, heads_size, arch.intermediate_size)
    per_thread = max(scratch_size(arch.num_heads // arch.num_kv_heads, arch.head_dim), padded(widest_input))
    return Workspace(
        hidden=np.zeros(rows * padded(arch.hidden_size), np.float32),
        packed=np.zeros(max(rows, LOGIT_ROWS) * widest_input, np.float32),
        wide=np.zeros(rows * max(padded(qkv_size), up_size), np.float32),
        logits=np.zeros(LOGIT_ROWS * padded(arch.vocab_size), np.float32),
        scratch=np.zeros((num_threads, per_thread), np.float32),
        vocab_scratch=np.zeros((num_threads, 2, padded(arch.vocab_size)), np.float32),
        counts=np.zeros((num_threads, arch.vocab_size), np.int32),
        counters=new_counters(),
    )


def new_cache(arch: Architecture, num_blocks: int, block_size: int) -> Cache:
    """A zeroed KV cache; the operating system hands out its memory as blocks are first written."""
    keys = arch.num_layers * key_cache_size(num_blocks, block_size, arch.num_kv_heads, arch.head_dim)
    values = arch.num_layers * value_cache_size(num_blocks, block_size, arch.num_kv_heads, arch.head_dim)
    return Cache(
        keys=np.zeros(keys + LANES, np.float32),
        values=np.zeros(values, np.float32),
        block_size=block_size,
        num_blocks=num_blocks,
    )
