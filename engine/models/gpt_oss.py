"""GPT-OSS: attention with sinks, in windows in every second layer, and experts with biases (OpenAI 2025)."""

from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.decoder import Names
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, MIXTURE_HARMLESS, HubModel
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.activation import CLAMPED_SWIGLU
from pagellm.kernels.architecture import TOP_SOFTMAX

_DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "rope_theta": 150000.0,
    "attention_bias": True,
}
# What the class takes where nothing is said of the rotary embeddings.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_NAMES: Names = {
    "sinks": "self_attn.sinks",
    "router": "mlp.router",
    "expert_up": "mlp.experts.gate_up_proj",
    "expert_up_b": "mlp.experts.gate_up_proj_bias",
    "expert_down": "mlp.experts.down_proj",
    "expert_down_b": "mlp.experts.down_proj_bias",
}
_BIASES = ("router", "expert_up", "expert_down")
_FEATURES: dict[str, Any] = {"router": TOP_SOFTMAX, "activation": CLAMPED_SWIGLU, "sinks": True}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gpt_oss; its experts are MXFP4, or bfloat16 and then transposed."""
    says_rope = any(checkpoint.config.get(name) for name in ("rope_parameters", "rope_scaling"))
    model = HubModel(checkpoint, _DEFAULTS if says_rope else {**_DEFAULTS, "rope_parameters": _YARN})
    fields = model.fields
    fields.expect("swiglu_limit", 7.0, 7)
    fields.expect("swiglu_alpha", 1.702)
    fields.get("initial_context_length")  # of the first, the original one of YaRN
    types = [FULL if index % 2 else SLIDING for index in range(model.num_layers)]
    per_token = fields.integer("num_experts_per_tok", 4)
    fields.expect("experts_per_token", per_token)
    features = {
        **_FEATURES,
        "window": model.windows(types),
        "num_experts": model.num_experts(128),
        "experts_per_token": per_token,
        "expert_size": fields.integer("intermediate_size"),
        "intermediate_size": 0,
    }
    whole = [tensor for name, tensor in checkpoint.tensors.items() if name.endswith("experts.down_proj")]
    transposed = () if any(tensor.dtype == "MXFP4" for tensor in whole) else ("expert_up", "expert_down")
    return model.spec(
        features,
        _NAMES,
        biases=[*_BIASES, *model.biases(attention_bias=ATTENTION)],
        transposed_experts=transposed,
        interleaved_experts=True,
        harmless=MIXTURE_HARMLESS,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture gpt-oss."""
    model = GgufModel(checkpoint)
    features = model.experts(**_FEATURES, window=model.windows(period=2))
    return model.spec(features, {"mlp_norm": "post_attention_norm"})
