"""Qwen's mixtures of experts: Qwen2 and Qwen3 with experts in their layers (Yang et al. 2024, 2025)."""

from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.decoder import Names, some_with_experts
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, EXPERT_NAMES, MIXTURE_HARMLESS, HubModel
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import PER_HEAD, SOFTMAX

_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_QWEN2_DEFAULTS = {
    **_DEFAULTS,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_window_layers": 28,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
}
_QWEN3_DEFAULTS = {
    **_DEFAULTS,
    "intermediate_size": 6144,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
# What all experts' results are added to in Qwen2: one that every token passes through, times a gate.
_SHARED_NAMES: Names = {
    "router": ("mlp.gate", "mlp.shared_expert_gate"),
    "shared_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared_down": "mlp.shared_expert.down_proj",
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type qwen3_moe."""
    model = HubModel(checkpoint, _QWEN3_DEFAULTS)
    fields = model.fields
    windowed = fields.boolean("use_sliding_window")
    features = _experts(model, 128) | {
        "qk_norm": PER_HEAD,
        "window": model.windows() if windowed else 0,
    }
    for name in ("sliding_window", "max_window_layers"):
        fields.get(name)  # known where no window is in use, too
    biases = model.biases(attention_bias=ATTENTION)
    return model.spec(features, model.expert_names(), biases=biases, harmless=MIXTURE_HARMLESS)


def qwen2_from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type qwen2_moe, which has shared experts, too."""
    model = HubModel(checkpoint, _QWEN2_DEFAULTS)
    fields = model.fields
    features = _experts(model, 60, fields.integer("shared_expert_intermediate_size", 5632))
    features |= {"window": _qwen2_windows(model)}
    biases = ("qkv",) if fields.boolean("qkv_bias", True) else ()
    names = model.expert_names({**EXPERT_NAMES, **_SHARED_NAMES})
    return model.spec(features, names, biases=biases, harmless=MIXTURE_HARMLESS)


def _experts(model: HubModel, num_experts: int, shared: int = 0) -> dict[str, Any]:
    """The features of the layers: every so many have experts, but for those that are listed.

    num_experts: where the configuration does not say; shared: the width of the expert for all tokens.
    """
    fields = model.fields
    step, dense = fields.integer("decoder_sparse_step", 1), fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(index) is not int for index in dense):
        raise fields.error("mlp_only_layers", dense, "a list of layers' numbers")
    sparse = [index not in dense and (index + 1) % step == 0 for index in range(model.num_layers)]
    size, count = fields.integer("intermediate_size"), model.num_experts(num_experts)
    features = {
        "num_experts": count,
        "experts_per_token": fields.integer("num_experts_per_tok"),
        "expert_size": fields.integer("moe_intermediate_size"),
        "router": SOFTMAX,
        "renormalize": fields.boolean("norm_topk_prob", False),
        "shared_gate": shared > 0,
    }
    return some_with_experts(sparse, features, shared, size)


def _qwen2_windows(model: HubModel) -> list[int]:
    """The window of each layer: where windows are in use, of every second one before `max_window_layers`."""
    fields = model.fields
    end = fields.get("max_window_layers")
    if type(end) is not int:
        raise fields.error("max_window_layers", end, "an integer")
    if not fields.boolean("use_sliding_window"):
        fields.get("sliding_window")  # transformers writes 0
        model.layer_types(FULL)
        return [0] * model.num_layers
    slides = [index % 2 == 0 and index < end for index in range(model.num_layers)]
    return model.windows([SLIDING if one else FULL for one in slides])


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture qwen3moe."""
    model = GgufModel(checkpoint)
    return model.spec(model.experts(qk_norm=PER_HEAD, renormalize=True))


def qwen2_from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture qwen2moe."""
    model = GgufModel(checkpoint)
    fields = model.fields
    shared = fields.integer("expert_shared_feed_forward_length", fields.get("feed_forward_length"))
    features = model.experts(intermediate_size=shared, shared_gate=True)
    return model.spec(features, {"router": ("ffn_gate_inp", "ffn_gate_inp_shexp")})
