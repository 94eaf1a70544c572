"""OLMo 2 and 3: norms after both halves alone, and of whole queries and keys (OLMo team 2025)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models import rope
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, HubModel
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import WHOLE

_DEFAULTS = {"vocab_size": 50304, "rms_norm_eps": 1e-5, "sliding_window": 4096}
_NAMES = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_FEATURES = {"pre_norm": False, "post_norm": True, "qk_norm": WHOLE}
# The class of OLMo 3 takes the top level's rope_theta for its full layers alone.
_THETAS: dict[str, str | float] = {FULL: "rope_theta", SLIDING: 5e5}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type olmo2."""
    model = HubModel(checkpoint, _DEFAULTS)
    return model.spec(_FEATURES, _NAMES, biases=model.biases(attention_bias=ATTENTION))


def olmo3_from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type olmo3: windows in three of four layers, and RoPE by kind of layer."""
    model = HubModel(checkpoint, {**_DEFAULTS, "rope_theta": 5e5})
    types = [SLIDING if (index + 1) % 4 else FULL for index in range(model.num_layers)]
    types = list(model.layer_types(FULL, SLIDING) or types)
    features = {
        **_FEATURES,
        "window": model.windows(types),
        "rope_table": [list(_THETAS).index(kind) for kind in types],
    }
    tables = model.rope_tables_by_type(_THETAS)
    return model.spec(features, _NAMES, biases=model.biases(attention_bias=ATTENTION), rope_tables=tables)


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture olmo2, which is OLMo 3's, too."""
    model = GgufModel(checkpoint)
    windows = model.windows(period=4)
    # Of layers with a window llama.cpp stretches nothing.
    theta = model.fields.number("rope.freq_base_swa", model.fields.number("rope.freq_base", 1e4))
    local = rope.plain(model.head_dim, theta)
    features = {
        **_FEATURES,
        "window": windows,
        "rope_table": [int(window > 0) for window in windows],
    }
    return model.spec(features, rope_tables=(model.rope_table(), local))
