"""Mistral 7B and its relatives: Llama with a sliding window in all layers (Jiang et al. 2023)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.hub import HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type mistral; GGUF files of it are of architecture llama."""
    model = HubModel(checkpoint, _DEFAULTS)
    return model.spec({"window": model.windows()})
