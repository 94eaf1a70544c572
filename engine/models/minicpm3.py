"""MiniCPM3: MiniCPM with multi-head latent attention (OpenBMB 2024)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.gguf_latent import gguf_attention
from pagellm.engine.models.hub import MLP, HubModel
from pagellm.engine.models.hub_latent import hub_attention
from pagellm.engine.models.spec import ModelSpec

# Of the one published model.
_MULTIPLIERS = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
_DEFAULTS = {
    "vocab_size": 73448,
    "hidden_size": 2560,
    "intermediate_size": 6400,
    "num_hidden_layers": 62,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "kv_lora_rank": 256,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": None,
    **_MULTIPLIERS,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type minicpm3."""
    model = HubModel(checkpoint, _DEFAULTS)
    attention, fields = hub_attention(model), model.fields
    depth, base = fields.number_or_none("scale_depth"), fields.number_or_none("dim_model_base")
    return model.spec(
        {**attention.features, "residual_scale": 1.0 if depth is None else depth / model.num_layers**0.5},
        attention.names,
        biases=attention.biases + model.biases(mlp_bias=MLP),
        embedding_scale=fields.number("scale_emb"),
        logits_scale=1.0 if base is None else base / model.hidden_size,
        rope_tables=(attention.rope,),
        harmless="mup_denominator",  # of heads for speculation
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture minicpm3.

    llama.cpp takes the published model's multipliers for all.
    """
    model = GgufModel(checkpoint)
    attention = gguf_attention(model)
    return model.spec(
        {**attention.features, "residual_scale": _MULTIPLIERS["scale_depth"] / model.num_layers**0.5},
        attention.names,
        embedding_scale=_MULTIPLIERS["scale_emb"],
        logits_scale=_MULTIPLIERS["dim_model_base"] / model.hidden_size,
        rope_tables=(attention.rope,),
    )
