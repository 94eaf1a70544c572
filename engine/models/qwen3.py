"""Qwen3: Llama with an RMSNorm of each head of queries and keys (Yang et al. 2025).

Also of its embedding and reranking models, and of models distilled into its shape.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models import qwen2
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import PER_HEAD


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type qwen3."""
    model = HubModel(checkpoint, {**qwen2.DEFAULTS, "head_dim": 128})
    biases = model.biases(attention_bias=ATTENTION)
    return model.spec({"qk_norm": PER_HEAD, "window": qwen2.windows(model)}, biases=biases)


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture qwen3."""
    return GgufModel(checkpoint).spec({"qk_norm": PER_HEAD})
