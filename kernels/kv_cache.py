"""The paged KV cache of one layer: where its keys and values lie, and how those of a new token are written.

The cache of one layer, in words: keys [num_blocks, num_kv_heads, key words, block_size], so that neighbouring
words are neighbouring keys; values [num_blocks, num_kv_heads, block_size, value words]. A word is one
dimension as float32 or two as bfloat16. With latent attention (`kernels.latent`) values are a part of the
keys, and are not kept a second time.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.jit import kernel, shared
from pagellm.kernels.packing import FLOAT32
from pagellm.kernels.simd import LANES, load, prefetch, store, store_bfloat16


class LayerCache(NamedTuple):
    """One layer's keys and values, which lie among those of all layers."""

    format: int  # FLOAT32 or BFLOAT16
    block_size: int
    keys: NDArray[np.float32]  # flat
    values: NDArray[np.float32]  # flat
    layer_k: int  # where this layer's keys begin, in words
    layer_v: int


@shared
def key_words(format: int, head_dim: int) -> int:
    """Words of one key."""
    return head_dim if format == FLOAT32 else -(-head_dim // 2)


@shared
def value_words(format: int, head_dim: int) -> int:
    """Words of one value: whole vectors."""
    return -(-head_dim // LANES) * (LANES if format == FLOAT32 else LANES // 2)


def token_words(format: int, head_dim: int, value_dim: int) -> int:
    """Words of one token's key and value for one KV head; value_dim: 0 where values are a part of keys."""
    return key_words(format, head_dim) + value_words(format, value_dim)


@shared
def key_cache_size(format: int, cache_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """Words of one layer's keys."""
    return cache_blocks * num_kv_heads * key_words(format, head_dim) * block_size


@shared
def value_cache_size(
    format: int, cache_blocks: int, block_size: int, num_kv_heads: int, value_dim: int
) -> int:
    """Words of one layer's values."""
    return cache_blocks * num_kv_heads * block_size * value_words(format, value_dim)


def store_scratch_size(head_dim: int) -> int:
    """Words of working memory of `store_kv`: a head as floats and as bfloat16, both whole vectors."""
    return -(-head_dim // LANES) * (LANES + LANES // 2)


@kernel
def store_kv(
    format, k, k_start, v, v_start, head_dim, value_dim, num_kv_heads, block_size, slot, keys, values,
    layer_k, layer_v, scratch
):  # fmt: skip
    """Writes one token's keys [num_kv_heads, head_dim] and values into cache slot `slot`.

    value_dim: of the values, [num_kv_heads, value_dim]; 0 for none. scratch: `store_scratch_size` words.
    """
    block, offset = slot // block_size, slot % block_size
    words, stride = key_words(format, head_dim), value_words(format, value_dim)
    converted = -(-head_dim // LANES) * LANES
    for head in range(num_kv_heads):  # a decode's slots are far apart and in no cache: ask for all at once
        key = layer_k + (block * num_kv_heads + head) * words * block_size + offset
        value = layer_v + ((block * num_kv_heads + head) * block_size + offset) * stride
        for w in range(words):
            prefetch(keys, key + w * block_size)
        for i in range(0, stride, LANES):
            prefetch(values, value + i)
    for head in range(num_kv_heads):
        key = layer_k + (block * num_kv_heads + head) * words * block_size + offset
        value = layer_v + ((block * num_kv_heads + head) * block_size + offset) * stride
        for d in range(value_dim):
            scratch[d] = v[v_start + head * value_dim + d]
        for d in range(value_dim, converted):
            scratch[d] = 0.0
        for d in range(0, value_dim, LANES):
            if format == FLOAT32:
                store(values, value + d, load(scratch, d))
            else:
                store_bfloat16(values, value + d // 2, load(scratch, d))
        for d in range(head_dim):
            scratch[d] = k[k_start + head * head_dim + d]
        source = 0
        if format != FLOAT32:
            source = converted
            for d in range(0, head_dim, LANES):
                store_bfloat16(scratch, converted + d // 2, load(scratch, d))
        for w in range(words):
            keys[key + w * block_size] = scratch[source + w]
