"""StarCoder 2: Llama with LayerNorm, a feed-forward without a gate, and biases (Lozhkov et al. 2024)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, GELU_OR_RELU, MLP, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.activation import GELU_TANH

_DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_bias": True,
    "sliding_window": None,
}
_KEYS = {"rms_norm_eps": "norm_epsilon"}
_NAMES = {"up": "mlp.c_fc", "down": "mlp.c_proj"}
_NORMS = ("attention_norm", "mlp_norm", "final_norm")
# What the first files have beside what the class knows.
_HARMLESS = "activation_function | layer_norm_epsilon | (scale_)?attention_softmax_in_fp32"


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type starcoder2."""
    model = HubModel(checkpoint, _DEFAULTS, _KEYS)
    for name, neutral in (("mlp_type", "default"), ("norm_type", "layer_norm"), ("scale_attn_weights", True)):
        model.fields.expect(name, neutral)
    return model.spec(
        {"window": model.windows(), "gated": False},
        _NAMES,
        GELU_OR_RELU,
        harmless=_HARMLESS,
        layer_norm=True,
        biases=[*_NORMS, *model.biases(use_bias=ATTENTION + MLP)],
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture starcoder2."""
    model = GgufModel(checkpoint)
    return model.spec({"activation": GELU_TANH, "gated": False}, layer_norm=True)
