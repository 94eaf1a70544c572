"""Mixtral: Mistral with experts in every layer (Jiang et al. 2024)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.decoder import Names
from pagellm.engine.models.hub import MIXTURE_HARMLESS, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import SOFTMAX

_DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "rope_theta": 1e6,
}
_NAMES: Names = {
    "router": "block_sparse_moe.gate",
    "expert_up": (
        "block_sparse_moe.experts.{}.w1.weight",
        "block_sparse_moe.experts.{}.w3.weight",
    ),
    "expert_down": "block_sparse_moe.experts.{}.w2.weight",
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type mixtral; GGUF files of it are of architecture llama."""
    model = HubModel(checkpoint, _DEFAULTS)
    fields = model.fields
    features = {
        "window": model.windows(),
        "num_experts": fields.integer("num_local_experts", 8),
        "experts_per_token": fields.integer("num_experts_per_tok", 2),
        "expert_size": fields.integer("intermediate_size"),
        "intermediate_size": 0,
        "router": SOFTMAX,
        "renormalize": True,
    }
    return model.spec(features, _NAMES, harmless=MIXTURE_HARMLESS)
