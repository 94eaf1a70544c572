"""Phi-1, Phi-1.5 and Phi-2: attention beside the feed-forward, both behind one norm (Li et al. 2023)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import GELU_OR_RELU, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.activation import GELU_TANH

_DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "hidden_act": "gelu_new",
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
}
_KEYS = {"rms_norm_eps": "layer_norm_eps"}
_NAMES = {
    "final_norm": "final_layernorm",
    "output": "self_attn.dense",
    "mlp_norm": "input_layernorm",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_BIASES = ("attention_norm", "qkv", "output", "mlp_norm", "up", "down", "final_norm", "lm_head")


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type phi."""
    model = HubModel(checkpoint, _DEFAULTS, _KEYS)
    model.fields.expect("qk_layernorm", False)
    return model.spec(
        {"gated": False, "parallel": True},
        _NAMES,
        GELU_OR_RELU,
        rope_tables=(model.rope_table(partial=True),),
        layer_norm=True,
        biases=_BIASES,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture phi2."""
    model = GgufModel(checkpoint)
    return model.spec(
        {"activation": GELU_TANH, "gated": False, "parallel": True},
        {"mlp_norm": "attn_norm"},
        rope_tables=(model.rope_table(partial=True),),
        layer_norm=True,
        biases=_BIASES,
    )
