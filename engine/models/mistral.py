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
    for name in ("attention_bias", "mlp_bias"):
        model.fields.expect(name, False)
    for name in ("use_sliding_window", "max_window_layers"):
        model.fields.get(name)  # known, and passed over by the class
    window = model.fields.integer_or_none("sliding_window", maximum=1 << 30)
    types = model.layer_types("full_attention", "sliding_attention")
    if window is None and types is not None and "sliding_attention" in types:
        raise model.fields.error("layer_types", types, "full_attention alone where sliding_window is null")
    return model.spec(sliding_window=window)
