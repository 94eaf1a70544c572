"""The Llama family: RMSNorm, rotary embeddings, SwiGLU, grouped-query attention (Touvron et al. 2023).

What every other reader says differences from: Llama's names, defaults and features are those of `hub` and
`gguf`.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, MLP, HubModel
from pagellm.engine.models.hub_rope import FULL
from pagellm.engine.models.spec import ModelSpec


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type llama."""
    model = HubModel(checkpoint)
    biases = model.biases(attention_bias=ATTENTION, mlp_bias=MLP)
    model.layer_types(FULL)
    for name in ("use_sliding_window", "max_window_layers", "sliding_window"):
        model.fields.get(name)  # known, and passed over by the class
    return model.spec(biases=biases)


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture llama."""
    model = GgufModel(checkpoint)
    experts = model.experts(renormalize=True) if model.has_experts() else {}  # Mixtral
    # llama.cpp's converter stores the rotary dimensions as neighbouring pairs.
    return model.spec({"window": model.window(), **experts}, paired=True)
