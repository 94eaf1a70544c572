"""Multi-head latent attention as a GGUF file describes it, by the keys and names of llama.cpp.

Newer files have the matrices that widen keys and values apart, those of keys transposed, and say how large
heads are under keys of their own; older ones have both in one tensor, as config.json's checkpoints do.
"""

from typing import Any, NamedTuple

from pagellm.engine.models import gguf_rope
from pagellm.engine.models.decoder import Names
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.latent import Sizes
from pagellm.engine.models.rope import RopeTable

_NAMES: Names = {
    "query_norm": "attn_q_a_norm",
    "query_up": "attn_q_b",
    "latent_norm": "attn_kv_a_norm",
}


def latent_names(compressed: bool, split: bool) -> Names:
    """The names of the tensors. compressed: whether queries are; split: whether what widens keys and values
    is in tensors apart."""
    return {
        **_NAMES,
        "qkv": ("attn_q_a" if compressed else "attn_q", "attn_kv_a_mqa"),
        "key_up": "attn_k_b" if split else "attn_kv_b",
        "value_up": "attn_v_b" if split else "attn_kv_b",
    }


class GgufAttention(NamedTuple):
    """What a file says of latent attention; names: of its tensors."""

    features: dict[str, Any]
    names: Names
    rope: RopeTable


def gguf_attention(model: GgufModel, scales_scores: bool = False) -> GgufAttention:
    """Reads the keys of latent attention. scales_scores: of `gguf_rope.table`. Raises `CheckpointError`."""
    fields = model.fields
    of_key, of_value = "attention.key_length_mla", "attention.value_length_mla"
    split = fields.has(of_key) or fields.has(of_value)
    if not split:
        of_key, of_value = "attention.key_length", "attention.value_length"
    per_head = max(1, model.hidden_size // model.num_heads)
    rotary, key_dim = fields.integer("rope.dimension_count"), fields.integer(of_key, per_head)
    if key_dim <= rotary:
        raise fields.error(of_key, key_dim, f"more than rope.dimension_count, {rotary}")
    sizes = Sizes(
        num_heads=model.num_heads,
        query_rank=fields.integer_or_none("attention.q_lora_rank"),
        latent_dim=fields.integer("attention.kv_lora_rank"),
        nope_dim=key_dim - rotary,
        rotary_dim=rotary,
        value_dim=fields.integer(of_value, per_head),
    )
    sizes.check(fields, "attention.head_count", model.num_layers, "rope.dimension_count")
    kept = {
        "attention.key_length": sizes.latent_dim + rotary,
        "attention.value_length": sizes.latent_dim,
        "attention.head_count_kv": 1,
    }
    for name, value in kept.items() if split else [("attention.head_count_kv", sizes.num_heads)]:
        fields.expect(name, value)
    table = gguf_rope.table(
        model.checkpoint, fields, rotary, model.max_positions, scales_scores=scales_scores
    )
    names = latent_names(compressed=sizes.query_rank is not None, split=split)
    # In all of llama.cpp's norms.
    epsilon = fields.number("attention.layer_norm_rms_epsilon")
    score_factor = gguf_rope.score_factor(fields, table) if scales_scores else 1.0
    return GgufAttention(sizes.features(epsilon, score_factor), names, table)
