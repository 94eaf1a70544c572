"""Qwen2 and Qwen2.5: Llama with biases of Q, K and V (Yang et al. 2024)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import HubModel
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.spec import ModelSpec

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type qwen2."""
    model = HubModel(checkpoint, DEFAULTS)
    model.fields.expect("attention_bias", False, True)
    return model.spec({"window": windows(model)}, biases=("qkv",))


def windows(model: HubModel) -> list[int]:
    """The window of each layer: of those from `max_window_layers` on, where windows are in use."""
    fields = model.fields
    enabled = fields.boolean("use_sliding_window")
    first = fields.get("max_window_layers")
    if type(first) is not int:
        raise fields.error("max_window_layers", first, "an integer")
    slides = [enabled and index >= first for index in range(model.num_layers)]
    return model.windows([SLIDING if one else FULL for one in slides])


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture qwen2."""
    return GgufModel(checkpoint).spec()
