"""Ministral 3: Llama with YaRN, and queries that grow with their position (Mistral AI 2025)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    "vocab_size": 131072,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
# What the class takes where the configuration has no section for RoPE.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type ministral3, or mistral3 with a text_config of it."""
    rope_parameters = None if checkpoint.config.get("rope_scaling") else _ROPE
    model = HubModel(checkpoint, {**_DEFAULTS, "rope_parameters": rope_parameters})
    rope = model.rope_table(scales_queries=True)
    return model.spec({"window": model.windows()}, rope_tables=(rope,))


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture mistral3."""
    model = GgufModel(checkpoint)
    return model.spec(rope_tables=(model.rope_table(scales_queries=True),), paired=True)
