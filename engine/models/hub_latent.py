"""Multi-head latent attention as a config.json describes it, by the keys and names of DeepSeek's classes."""

from typing import Any, NamedTuple

from pagellm.engine.models import hub_rope
from pagellm.engine.models.decoder import Names
from pagellm.engine.models.hub import ATTENTION, HubModel
from pagellm.engine.models.latent import Sizes
from pagellm.engine.models.rope import RopeTable

# Of the norms of what is compressed, in all of transformers' classes, whatever the configuration says.
_EPSILON = 1e-6
_NAMES: Names = {
    "query_norm": "self_attn.q_a_layernorm",
    "query_up": "self_attn.q_b_proj",
    "latent_norm": "self_attn.kv_a_layernorm",
    "key_up": "self_attn.kv_b_proj",
    "value_up": "self_attn.kv_b_proj",
}


class HubAttention(NamedTuple):
    """What a config.json says of latent attention; names: of its tensors."""

    features: dict[str, Any]
    names: Names
    rope: RopeTable
    biases: list[str]


def hub_attention(model: HubModel, **rope: Any) -> HubAttention:
    """Reads the keys of DeepSeek's classes. rope: of `hub_rope.table`. Raises `CheckpointError`."""
    fields = model.fields
    sizes = Sizes(
        num_heads=model.num_heads,
        query_rank=fields.integer_or_none("q_lora_rank"),
        latent_dim=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rotary_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer_or_none("v_head_dim") or model.hidden_size // model.num_heads,
    )
    sizes.check(fields, "num_attention_heads", model.num_layers, "qk_rope_head_dim")
    # The classes make these of the others, whatever they say, and each head has keys of its own.
    for name, value in (
        ("head_dim", sizes.rotary_dim),
        ("qk_head_dim", sizes.nope_dim + sizes.rotary_dim),
        ("num_key_value_heads", sizes.num_heads),
    ):
        fields.expect(name, value)
    table = hub_rope.table(fields, sizes.rotary_dim, model.max_positions, **rope)
    if table.rotary_dim != sizes.rotary_dim:
        raise fields.error("partial_rotary_factor", table.rotary_dim / sizes.rotary_dim, "1")
    biases = model.biases(attention_bias=ATTENTION)
    if biases and sizes.query_rank is None:
        raise fields.error("attention_bias", True, "false where q_lora_rank is null")
    first = "self_attn.q_proj" if sizes.query_rank is None else "self_attn.q_a_proj"
    names = {**_NAMES, "qkv": (first, "self_attn.kv_a_proj_with_mqa")}
    features = sizes.features(_EPSILON, hub_rope.score_factor(fields))
    return HubAttention(features, names, table, biases)
