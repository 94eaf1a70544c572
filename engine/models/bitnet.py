"""BitNet b1.58: norms before the products that end attention and feed-forward, ReLU squared (Ma et al. 2024).

Weights are what the tensors say, ternary or not, and activations are not rounded to 8 bits.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, SILU, HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 30,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}
_NAMES = {"attention_sub_norm": "self_attn.attn_sub_norm", "mlp_sub_norm": "mlp.ffn_sub_norm"}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type bitnet."""
    model = HubModel(checkpoint, _DEFAULTS)
    return model.spec(
        {"sub_norm": True},
        _NAMES,
        {"relu2": "relu_squared", **SILU},
        biases=model.biases(attention_bias=ATTENTION),
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture bitnet, which is the first one's, with SiLU."""
    return GgufModel(checkpoint).spec({"sub_norm": True})
