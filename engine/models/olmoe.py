"""OLMoE: Llama with experts in every layer and norms of whole queries and keys (Muennighoff et al. 2024)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, MIXTURE_HARMLESS, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import SOFTMAX, WHOLE

_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type olmoe."""
    model = HubModel(checkpoint, _DEFAULTS)
    fields = model.fields
    features = {
        "qk_norm": WHOLE,
        "qkv_clip": fields.number_or_none("clip_qkv") or 0.0,
        "num_experts": model.num_experts(64),
        "experts_per_token": fields.integer("num_experts_per_tok", 8),
        "expert_size": fields.integer("intermediate_size"),
        "intermediate_size": 0,
        "router": SOFTMAX,
        "renormalize": fields.boolean("norm_topk_prob", False),
    }
    biases = model.biases(attention_bias=ATTENTION)
    return model.spec(features, model.expert_names(), biases=biases, harmless=MIXTURE_HARMLESS)


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture olmoe."""
    model = GgufModel(checkpoint)
    return model.spec(model.experts(qk_norm=WHOLE))
