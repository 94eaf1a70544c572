"""Qwen2 and Qwen2.5: Llama with biases of Q, K and V (Yang et al. 2024)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import HubModel
from pagellm.engine.models.spec import ModelSpec

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type qwen2."""
    model = HubModel(checkpoint, DEFAULTS)
    model.fields.expect("attention_bias", False, True)
    model.fields.expect("mlp_bias", False)
    return model.spec(biases=("qkv",), sliding_window=window(model))


def window(model: HubModel) -> int | None:
    """The tokens that a layer with a sliding window sees, or None where all layers see everything."""
    fields = model.fields
    types = model.layer_types("full_attention", "sliding_attention")
    slides = types is not None and "sliding_attention" in types
    size = fields.integer_or_none("sliding_window", maximum=1 << 30)
    enabled = fields.boolean("use_sliding_window", False)
    first = fields.get("max_window_layers", 28)
    if size is None or not enabled:
        if slides:
            reason = "sliding_window is null" if size is None else "use_sliding_window is false"
            raise fields.error("layer_types", types, f"full_attention alone where {reason}")
        return None
    if types is None:
        if type(first) is not int:
            raise fields.error("max_window_layers", first, "an integer")
        slides = first < model.num_layers
    return size if slides else None


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture qwen2."""
    model = GgufModel(checkpoint)
    window = model.fields.integer_or_none("attention.sliding_window", maximum=1 << 30)
    return model.spec(sliding_window=window)
