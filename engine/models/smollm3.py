"""SmolLM3: Llama without rotary embeddings in every fourth layer (2025)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, MLP, HubModel
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.spec import ModelSpec

_INTERVAL = 4
_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 2e6,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layer_interval": _INTERVAL,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type smollm3."""
    model = HubModel(checkpoint, _DEFAULTS)
    rotated = _rotated_layers(model)
    enabled = model.fields.boolean("use_sliding_window")
    types = [FULL if one or not enabled else SLIDING for one in rotated]
    features = {"rope_table": [one - 1 for one in rotated], "window": model.windows(types)}
    return model.spec(
        features,
        biases=model.biases(attention_bias=ATTENTION, mlp_bias=MLP),
    )


def _rotated_layers(model: HubModel) -> list[int]:
    """1 for each layer with rotary embeddings and 0 for each without."""
    fields = model.fields
    interval = fields.integer("no_rope_layer_interval")
    listed = fields.get("no_rope_layers")
    if listed is None:
        return [int((index + 1) % interval != 0) for index in range(model.num_layers)]
    if not isinstance(listed, list) or len(listed) < model.num_layers or any(n not in (0, 1) for n in listed):
        expected = f"a list of at least {model.num_layers}, each one of 0 and 1"
        raise fields.error("no_rope_layers", listed, expected)
    return [int(one) for one in listed[: model.num_layers]]


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture smollm3."""
    model = GgufModel(checkpoint)
    tables = [0 if (index + 1) % _INTERVAL else -1 for index in range(model.num_layers)]
    return model.spec({"rope_table": tables}, paired=True)
