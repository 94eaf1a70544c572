"""ERNIE 4.5, the dense one: Llama whose rotary pairs are neighbours (Baidu 2025)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, MLP, HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 5e5,
    "use_bias": False,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type ernie4_5."""
    model = HubModel(checkpoint, _DEFAULTS)
    return model.spec(biases=model.biases(use_bias=ATTENTION + MLP), paired=True)


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture ernie4_5."""
    return GgufModel(checkpoint).spec(paired=True)
