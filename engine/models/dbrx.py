"""DBRX: LayerNorm without biases, clipped queries, keys and values, and experts (Databricks 2024)."""

from dataclasses import replace
from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.decoder import Names
from pagellm.engine.models.fields import Fields
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import MIXTURE_HARMLESS, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import SOFTMAX

_KEYS = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": None,
    "head_dim": None,
}
_DEFAULTS = {
    "hidden_size": 2048,
    "intermediate_size": 3584,
    "num_attention_heads": 16,
    "num_key_value_heads": 1,
    "num_hidden_layers": 24,
    "rms_norm_eps": 1e-5,
}
_NAMES: Names = {
    "embedding": "wte",
    "final_norm": "norm_f",
    "layer": "blocks.{}.",
    "attention_norm": "norm_attn_norm.norm_1",
    "qkv": "norm_attn_norm.attn.Wqkv",
    "output": "norm_attn_norm.attn.out_proj",
    "mlp_norm": "norm_attn_norm.norm_2",
    "router": "ffn.router.layer",
    "expert_up": ("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"),
    "expert_down": "ffn.experts.mlp.w2",
}
# What config.json has in sections of its own, by Llama's names of it.
_ATTENTION = {"kv_n_heads": "num_key_value_heads"}
_FEED_FORWARD = {"ffn_hidden_size": "intermediate_size"}
# What every section says for itself.
_SECTION_KEYS = ("model_type", "transformers_version", "dtype", "torch_dtype", "architectures")


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type dbrx."""
    model = HubModel(replace(checkpoint, config=_without_sections(checkpoint)), _DEFAULTS, _KEYS)
    fields = model.fields
    # The power of the norm that the scores of a token's experts are divided by: their sum, or none.
    power = fields.get("moe_normalize_expert_weights", 1.0)
    if power not in (None, 1) or isinstance(power, bool):
        raise fields.error("moe_normalize_expert_weights", power, "1 or null")
    features = {
        "qkv_clip": fields.number_or_none("clip_qkv") or 0.0,
        "num_experts": fields.integer("moe_num_experts", 4),
        "experts_per_token": fields.integer("moe_top_k", 1),
        "expert_size": fields.integer("intermediate_size"),
        "intermediate_size": 0,
        "router": SOFTMAX,
        "renormalize": power is not None,
    }
    return model.spec(
        features,
        _NAMES,
        base="transformer.",
        layer_norm=True,
        transposed_experts=("expert_down",),
        harmless=f"{MIXTURE_HARMLESS} | moe_jitter_eps | moe_loss_weight",
    )


def _without_sections(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration with what its sections say beside what stands there itself."""
    whole = Fields(checkpoint.path / "config.json", checkpoint.config)
    config = {key: value for key, value in whole.values.items() if key not in ("attn_config", "ffn_config")}
    for name, names in (("attn_config", _ATTENTION), ("ffn_config", _FEED_FORWARD)):
        section = whole.section(name)
        for key, value in (section.values if section else {}).items():
            if key == "ffn_act_fn":
                key, value = "hidden_act", value.get("name", "silu") if isinstance(value, dict) else value
            if key not in _SECTION_KEYS and config.setdefault(names.get(key, key), value) != value:
                raise whole.error(f"{name}.{key}", value, f"the same as {names.get(key, key)}")
    return config


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture dbrx."""
    model = GgufModel(checkpoint)
    features = model.experts(renormalize=True, qkv_clip=model.fields.number_or_zero("attention.clamp_kqv"))
    return model.spec(features, {"mlp_norm": "attn_output_norm"}, layer_norm=True)
