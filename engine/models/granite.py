"""Granite 3, and 4 without recurrent layers: Llama with four multipliers, some with experts (IBM 2024, 2025).

The classes of mixtures have a feed-forward beside the experts, or none; Granite 4's hybrid class holds dense
models, too.
"""

from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.fields import REQUIRED
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, MIXTURE_HARMLESS, MLP, HubModel
from pagellm.engine.models.hub_rope import FULL
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.architecture import TOP_SOFTMAX

_NAMES = {
    "up": "shared_mlp.input_linear",
    "down": "shared_mlp.output_linear",
    "router": "block_sparse_moe.router.layer",
    "expert_up": "block_sparse_moe.input_linear.weight",
    "expert_down": "block_sparse_moe.output_linear.weight",
}
# What the hybrid class says of recurrent layers, and of experts where it has none.
_RECURRENT = r"mamba_.* | time_step_limit | num_experts_per_tok | intermediate_size"


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type granite."""
    model = HubModel(checkpoint)
    features, scales = _multipliers(model)
    return model.spec(features, biases=model.biases(attention_bias=ATTENTION, mlp_bias=MLP), **scales)


def mixture_from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type granitemoe or granitemoeshared."""
    model = HubModel(checkpoint)
    features, scales = _multipliers(model)
    features |= _experts(model, model.fields.integer("num_local_experts", 8))
    if model.model_type == "granitemoeshared":
        features |= _shared(model, 0)
    biases = model.biases(attention_bias=ATTENTION)
    return model.spec(features, _NAMES, biases=biases, harmless=MIXTURE_HARMLESS, **scales)


def hybrid_from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type granitemoehybrid, without recurrent layers."""
    old = checkpoint.config.get("layers_block_type")
    model = HubModel(checkpoint, {"layer_types": old or "mamba in all layers"})
    fields = model.fields
    if old is not None and fields.get("layer_types") != old:
        raise fields.error("layer_types", fields.get("layer_types"), "the same as layers_block_type")
    fields.get("layers_block_type")
    model.layer_types(FULL)
    fields.expect("normalization_function", "rmsnorm")
    features, scales = _multipliers(model)
    # transformers rotates for "rope" alone; without the key nothing is rotated.
    kinds = {"rope": "rope", "nope": "nope"}
    name = "position_embedding_type"
    rotates = fields.has(name) and fields.choice(name, kinds) == "rope"
    features["rope_table"] = 0 if rotates else -1
    if fields.get("num_local_experts", 8) != 0:
        features |= _experts(model, fields.integer("num_local_experts", 8))
    features |= _shared(model, 1024)
    biases = model.biases(attention_bias=ATTENTION)
    harmless = f"{_RECURRENT} | {MIXTURE_HARMLESS}"
    return model.spec(features, _NAMES, biases=biases, harmless=harmless, **scales)


def _experts(model: HubModel, num_experts: int) -> dict[str, Any]:
    """The features of a mixture in every layer: a softmax of the chosen experts' logits alone."""
    return {
        "num_experts": num_experts,
        "experts_per_token": model.fields.integer("num_experts_per_tok", 2),
        "expert_size": model.fields.integer("intermediate_size"),
        "intermediate_size": 0,
        "router": TOP_SOFTMAX,
    }


def _shared(model: HubModel, default: int) -> dict[str, Any]:
    """The width of the feed-forward that all tokens pass through; there may be none beside experts."""
    return {"intermediate_size": model.fields.whole_number("shared_intermediate_size", default)}


def _multipliers(model: HubModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The features of the layers, and what the model as a whole is multiplied by."""
    number = model.fields.number
    features = {
        "attention_scale": number("attention_multiplier", 1.0),
        "residual_scale": number("residual_multiplier", 1.0),
    }
    return features, {
        "embedding_scale": number("embedding_multiplier", 1.0),
        "logits_scale": 1 / number("logits_scaling", 1.0),
    }


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture granite, granitemoe or granitehybrid."""
    model = GgufModel(checkpoint)
    number = model.fields.number
    features: dict[str, Any] = {"residual_scale": number("residual_scale", 1.0)}
    if model.has_experts():
        features |= model.experts(renormalize=True)
        if model.fields.has("expert_shared_feed_forward_length"):
            features["intermediate_size"] = model.fields.integer("expert_shared_feed_forward_length")
    if scale := model.fields.number_or_zero("attention.scale"):
        features["attention_scale"] = scale
    if not model.fields.boolean("rope.scaling.finetuned", True):  # a switch here
        features["rope_table"] = -1
    return model.spec(
        features,
        paired=True,
        embedding_scale=number("embedding_scale", 1.0),
        logits_scale=1 / number("logit_scale", 1.0 if model.architecture == "granitehybrid" else REQUIRED),
        harmless=r"ssm\..*|expert_shared_feed_forward_length",
    )
