"""What a step is given besides the weights: a batch, the KV cache, what is asked of it, and room to work in.

Buffers of hidden states are flat, their rows padded to whole panels; the padding holds zeros or is ignored.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.architecture import (
    Architecture,
    adds_at_once,
    attended_dim,
    cached_value_dim,
    heads_size,
    latent_query_dim,
    latent_query_stride,
    qkv_size,
)
from pagellm.kernels.attention import max_states, max_tiles, scratch_size, state_words
from pagellm.kernels.attention_products import TILE_COLUMNS
from pagellm.kernels.experts import Groups, max_slots, new_groups
from pagellm.kernels.experts import scratch_size as router_scratch_size
from pagellm.kernels.kv_cache import key_cache_size, store_scratch_size, value_cache_size
from pagellm.kernels.matmul import scratch_size as matmul_scratch_size
from pagellm.kernels.packing import BLOCK, GROUP, PANEL, aligned_zeros, num_blocks, padded, padded_rows
from pagellm.kernels.simd import LANES
from pagellm.kernels.threads import new_counters

# Rows of logits computed at a time: bounds their memory whatever the number of rows that are asked for.
LOGIT_ROWS = 4 * GROUP


class Cache(NamedTuple):
    """The paged KV cache of all layers: see kernels.kv_cache for a layer's layout."""

    keys: NDArray[np.float32]  # [all layers + LANES], the end so that a vector may begin anywhere
    values: NDArray[np.float32]  # [all layers + TILE_COLUMNS], nothing of layers with latent attention
    key_start: NDArray[np.int64]  # [num_layers + 1], where each layer's keys begin
    value_start: NDArray[np.int64]  # [num_layers + 1]
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
    windows: NDArray[np.int64]  # [num_windows], those that layers have: the work items of each are its own
    layer_window: NDArray[np.int64]  # [num_layers], which of them
    tile_sequence: NDArray[np.int32]  # [num_windows, max_tiles] of kernels.attention
    tile_start: NDArray[np.int32]  # [num_windows, max_tiles]
    tile_chunk: NDArray[np.int32]  # [num_windows, max_tiles]
    num_tiles: NDArray[np.int64]  # [num_windows]
    state_start: NDArray[np.int32]  # [num_windows, max_tokens + 1]
    states: NDArray[np.float32]  # [max_states * num_heads * state_words] of the layer with the most
    group_size: int  # query heads that share a KV head, in the layer with the most: tiles suit all layers


class WantedRow(NamedTuple):
    """What is asked of one row of logits."""

    token_row: int  # in the flat batch
    target: int  # the token that follows, or -1 to sample it
    num_logprobs: int  # top tokens that are wanted, or -1 for no log-probabilities
    logits_row: int  # of `Outputs.logits`, or -1
    mask_row: int  # of `Outputs.masks`, or -1
    top_k: int
    seed: int
    position: int  # of the token that is sampled
    prompt_len: int
    temperature: float
    top_p: float
    min_p: float
    repetition: float
    frequency: float
    presence: float


WANTED = np.dtype(
    [(name, np.float64 if kind is float else np.int64) for name, kind in WantedRow.__annotations__.items()],
    align=True,
)


class Outputs(NamedTuple):
    """What is asked of each row of logits, and where the answers go; R rows."""

    wanted: NDArray[np.void]  # [R] of WANTED
    history: NDArray[np.int32]  # all rows' tokens so far, where a penalty wants them
    history_start: NDArray[np.int32]  # [R + 1]
    bias_ids: NDArray[np.int32]  # all rows' biased tokens
    bias_values: NDArray[np.float32]
    bias_start: NDArray[np.int32]  # [R + 1]
    masks: NDArray[np.uint32]  # [masks, (vocab_size + 31) // 32], a bit for each token that may be sampled
    tokens: NDArray[np.int32]  # [R], out: sampled, or -1 where the logits name no token
    logprobs: NDArray[np.float32]  # [R], out: of the token or target
    top_ids: NDArray[np.int32]  # [R, max(num_logprobs)], out
    top_logprobs: NDArray[np.float32]  # [R, max(num_logprobs)], out
    logits: NDArray[np.float32]  # [at most R, vocab_size], out: whole rows


class Workspace(NamedTuple):
    """Buffers that a step writes first and reads afterwards; their content means nothing between steps."""

    rows: NDArray[np.int64]  # [max(max_tokens, LOGIT_ROWS)], scratch for the rows of a phase
    hidden: NDArray[np.float32]  # [rows, padded hidden_size], the residual stream
    branch: NDArray[np.float32]  # likewise, what is not added to it at once; no rows if no layer has such
    packed: NDArray[np.float32]  # activations on their way into a matmul, in the format of its weights
    wide: NDArray[np.float32]  # [rows, the widest of qkv and feed-forward], what a matmul wrote
    queries: NDArray[np.float32]  # [rows, num_heads, latent_query_stride]; no rows without latent attention
    router: NDArray[np.float32]  # [rows, padded logits of the router with the most]; of no rows without
    groups: Groups
    expert_out: NDArray[np.float32]  # [slots, padded hidden_size], what each slot's expert gives
    logits: NDArray[np.float32]  # [LOGIT_ROWS, padded vocab_size]
    scratch: NDArray[np.float32]  # [num_threads, one row of the widest activations or what a product needs]
    attention: NDArray[np.float32]  # [num_threads, per thread], working memory of kernels.attention
    vocab_scratch: NDArray[np.float32]  # [num_threads, 3, padded vocab_size]
    counts: NDArray[np.int32]  # [num_threads, vocab_size], zeros
    counters: NDArray[np.int64]  # of kernels.threads
    # Sums of the squares of the inputs of matrices, and where those of the matrix that begins at a panel are,
    # or -1; empty where nobody wants to know.
    squares: NDArray[np.float64]
    squares_start: NDArray[np.int64]  # [panels of all matrices]


def new_plan(arch: Architecture, max_tokens: int, max_seqs: int, num_chunks: int) -> Plan:
    """Room for the plans of batches whose longest context has at most `num_chunks` chunks of keys."""
    size = (max_tokens, max_seqs, num_chunks, arch.group_size)
    state = max(int(row["num_heads"]) * state_words(int(attended_dim(row))) for row in arch.layers)
    windows, layer_window = np.unique(arch.layers["window"], return_inverse=True)
    tiles = len(windows), max_tiles(*size)
    return Plan(
        positions=np.zeros(max_tokens, np.int32),
        slot_mapping=np.zeros(max_tokens, np.int64),
        seq_lens=np.zeros(max_seqs, np.int32),
        windows=windows,
        layer_window=layer_window,
        tile_sequence=np.zeros(tiles, np.int32),
        tile_start=np.zeros(tiles, np.int32),
        tile_chunk=np.zeros(tiles, np.int32),
        num_tiles=np.zeros(len(windows), np.int64),
        state_start=np.zeros((len(windows), max_tokens + 1), np.int32),
        states=aligned_zeros(max_states(*size) * state),
        group_size=arch.group_size,
    )


def _latent_widths(row: NDArray[np.void]) -> tuple[int, int, int]:
    """Of latent attention: what a row of `wide`, of `packed` and of `queries` takes."""
    heads, value_dim = int(row["num_heads"]), int(row["value_dim"])
    inputs = max(num_blocks(int(row["nope_dim"])), num_blocks(int(row["latent_dim"])))
    return (
        max(padded(heads * int(latent_query_dim(row))), heads * padded(value_dim)),
        BLOCK * max(heads * inputs, num_blocks(int(row["query_rank"]))),
        heads * int(latent_query_stride(row)),
    )


def new_workspace(arch: Architecture, max_tokens: int, num_threads: int) -> Workspace:
    """Buffers for steps of at most `max_tokens` tokens on `num_threads` threads."""
    rows, layers = padded_rows(max_tokens), arch.layers
    widest = max(padded(int(qkv_size(row))) for row in layers)
    widest_up = max(padded(int(row["intermediate_size"])) * (1 + int(row["gated"])) for row in layers)
    head_dim = int(layers["head_dim"].max())
    widest_input = int(max(arch.hidden_size, *map(heads_size, layers), layers["intermediate_size"].max()))
    widest_input = num_blocks(widest_input) * BLOCK
    of_latents = [_latent_widths(row) for row in layers if row["latent_dim"]]
    widest = max([widest, *(wide for wide, _, _ in of_latents)])
    widest_input = max([widest_input, *(packed for _, packed, _ in of_latents)])
    queries = max([0, *(queries for _, _, queries in of_latents)])
    num_experts, per_token = int(layers["num_experts"].max()), int(layers["experts_per_token"].max())
    slots, expert_size = max_slots(max_tokens, per_token, num_experts), int(layers["expert_size"].max())
    expert_input = num_blocks(max(arch.hidden_size, expert_size)) * BLOCK
    expert_up = max(padded(int(row["expert_size"])) * (1 + int(row["gated"])) for row in layers)
    routers = padded(int((layers["num_experts"] + layers["shared_gate"]).max()))
    per_thread = max(
        max(2 * widest_input, expert_input) + PANEL + BLOCK,
        store_scratch_size(head_dim),
        matmul_scratch_size(),
        router_scratch_size(num_experts),
    )
    per_thread = -(-per_thread // LANES) * LANES
    attention_scratch = -(-scratch_size(arch.group_size, head_dim) // LANES) * LANES
    return Workspace(
        rows=np.zeros(max(max_tokens, LOGIT_ROWS), np.int64),
        hidden=aligned_zeros(rows * padded(arch.hidden_size)),
        branch=aligned_zeros(0 if all(map(adds_at_once, layers)) else rows * padded(arch.hidden_size)),
        packed=aligned_zeros(max(max(rows, LOGIT_ROWS) * widest_input, slots * expert_input)),
        wide=aligned_zeros(max(rows * max(widest, widest_up), slots * expert_up) + LANES),
        queries=aligned_zeros(rows * queries),
        router=aligned_zeros(rows * routers),
        groups=new_groups(max_tokens, per_token, num_experts),
        expert_out=aligned_zeros(slots * padded(arch.hidden_size)),
        logits=aligned_zeros(LOGIT_ROWS * padded(arch.vocab_size)),
        scratch=aligned_zeros(num_threads * per_thread).reshape(num_threads, per_thread),
        attention=aligned_zeros(num_threads * attention_scratch).reshape(num_threads, attention_scratch),
        vocab_scratch=np.zeros((num_threads, 3, padded(arch.vocab_size)), np.float32),
        counts=np.zeros((num_threads, arch.vocab_size), np.int32),
        counters=new_counters(),
        squares=np.zeros(0, np.float64),
        squares_start=np.zeros(0, np.int64),
    )


def new_cache(arch: Architecture, format: int, num_blocks: int, block_size: int) -> Cache:
    """A zeroed KV cache; the operating system hands out its memory as blocks are first written."""

    def starts(size_of: Callable[..., int], dim: Callable[..., int]) -> NDArray[np.int64]:
        sizes = [
            size_of(format, num_blocks, block_size, int(row["num_kv_heads"]), int(dim(row)))
            for row in arch.layers
        ]
        return np.cumsum([0, *sizes], dtype=np.int64)

    key_start = starts(key_cache_size, lambda row: row["head_dim"])
    value_start = starts(value_cache_size, cached_value_dim)
    return Cache(
        keys=aligned_zeros(int(key_start[-1]) + LANES),
        values=aligned_zeros(int(value_start[-1]) + TILE_COLUMNS),
        key_start=key_start,
        value_start=value_start,
        format=format,
        block_size=block_size,
        num_blocks=num_blocks,
    )
