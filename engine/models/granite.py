"""Granite 3 and the dense ones of Granite 4: Llama with four multipliers (IBM 2024, 2025).

Granite 4's hybrid class holds dense models, too: without experts and with attention in every layer.
"""

from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.fields import REQUIRED
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, MLP, HubModel
from pagellm.engine.models.spec import ModelSpec

_HYBRID_NAMES = {"up": "shared_mlp.input_linear", "down": "shared_mlp.output_linear"}
# What the hybrid class says of recurrent layers and of experts, where it has none.
_RECURRENT = (
    r"mamba_.* | time_step_limit | num_experts_per_tok | output_router_logits | router_aux_loss_coef"
    r" | intermediate_size"
)


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type granite."""
    model = HubModel(checkpoint)
    features, scales = _multipliers(model)
    return model.spec(features, biases=model.biases(attention_bias=ATTENTION, mlp_bias=MLP), **scales)


def hybrid_from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type granitemoehybrid, without experts and recurrent layers."""
    old = checkpoint.config.get("layers_block_type")
    model = HubModel(checkpoint, {"layer_types": old or "mamba in all layers"})
    fields = model.fields
    if old is not None and fields.get("layer_types") != old:
        raise fields.error("layer_types", fields.get("layer_types"), "the same as layers_block_type")
    fields.get("layers_block_type")
    if fields.get("num_local_experts", 8) != 0:
        expected = "0; a mixture of experts is not supported"
        raise fields.error("num_local_experts", fields.get("num_local_experts", 8), expected)
    model.layer_types("full_attention")
    fields.expect("normalization_function", "rmsnorm")
    features, scales = _multipliers(model)
    # transformers rotates for "rope" alone; without the key nothing is rotated.
    kinds = {"rope": "rope", "nope": "nope"}
    name = "position_embedding_type"
    rotates = fields.has(name) and fields.choice(name, kinds) == "rope"
    features["rope_table"] = 0 if rotates else -1
    features["intermediate_size"] = fields.integer("shared_intermediate_size", 1024)
    biases = model.biases(attention_bias=ATTENTION)
    return model.spec(features, _HYBRID_NAMES, biases=biases, harmless=_RECURRENT, **scales)


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
    """Reads the metadata of a GGUF file of architecture granite or granitehybrid, of a dense model."""
    model = GgufModel(checkpoint)
    number = model.fields.number
    features = {"residual_scale": number("residual_scale", 1.0)}
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
