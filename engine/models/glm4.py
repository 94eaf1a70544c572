"""GLM-4: a fused gate and linear half, and rotary pairs in half of each head (GLM team 2024).

The later model_type, glm4, has norms after both halves, too.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}
_NAMES = {
    "up": "mlp.gate_up_proj",
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type glm or glm4."""
    model = HubModel(checkpoint, _DEFAULTS)
    return model.spec(
        {"post_norm": model.model_type == "glm4"},
        _NAMES,
        biases=model.biases(attention_bias=("qkv",)),
        rope_tables=(model.rope_table(partial=True),),
        paired=True,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture chatglm or glm4."""
    model = GgufModel(checkpoint)
    rope = model.rope_table(partial=True)
    return model.spec({"post_norm": model.architecture == "glm4"}, rope_tables=(rope,), paired=True)
