"""Cohere's Command R and R7B: attention beside the feed-forward behind one norm without a bias (2024).

The later model_type, cohere2, has windows in three of four layers, and RoPE in those alone.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, HubModel
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_KEYS = {"rms_norm_eps": "layer_norm_eps"}
_NAMES = {"mlp_norm": "input_layernorm"}
# What the files of R7B say in other words.
_HUB = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
}
_PERIOD = 4


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type cohere."""
    model = HubModel(checkpoint, {**_DEFAULTS, "rope_theta": 5e5}, _KEYS)
    model.fields.expect("use_qk_norm", False)
    return _spec(model, {})


def cohere2_from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type cohere2."""
    model = HubModel(checkpoint, {**_DEFAULTS, "sliding_window": 4096}, _KEYS)
    # The class makes heads of this size whatever the key says.
    head_dim = model.hidden_size // model.num_heads
    for name, value in {"head_dim": head_dim, **_HUB}.items():
        model.fields.expect(name, value)
    period = model.fields.integer("sliding_window_pattern", _PERIOD)
    model.fields.expect("layer_switch", period)
    model.fields.integer("sliding_window", maximum=1 << 30)
    types = [SLIDING if (index + 1) % period else FULL for index in range(model.num_layers)]
    windows = model.windows(types)
    return _spec(model, {"window": windows, "rope_table": [0 if window else -1 for window in windows]})


def _spec(model: HubModel, features: dict[str, object]) -> ModelSpec:
    scale = model.fields.number("logit_scale", 0.0625)
    return model.spec(
        {"parallel": True, **features},
        _NAMES,
        layer_norm=True,
        biases=model.biases(attention_bias=ATTENTION),
        logits_scale=scale,
        paired=True,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture command-r or cohere2."""
    model = GgufModel(checkpoint)
    features: dict[str, object] = {"parallel": True}
    if model.architecture == "cohere2":
        windows = model.windows(period=_PERIOD)
        features |= {"window": windows, "rope_table": [0 if window else -1 for window in windows]}
    return model.spec(
        features,
        {"mlp_norm": "attn_norm"},
        layer_norm=True,
        logits_scale=model.fields.number("logit_scale", 1.0),
        paired=True,
    )
