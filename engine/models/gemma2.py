"""Gemma 2: norms before and after both halves, softcaps, and windows in every other layer (2024)."""

from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, GELU_OR_RELU, HubModel
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.activation import GELU_TANH

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
KEYS = {"hidden_act": "hidden_activation"}
NAMES = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gemma2."""
    model = HubModel(checkpoint, DEFAULTS, KEYS)
    cap = model.fields.number_or_zero("attn_logit_softcapping")
    types = [(SLIDING, FULL)[index % 2] for index in range(model.num_layers)]
    return hub_spec(model, {"attention_softcap": cap, "window": model.windows(types)})


def hub_spec(model: HubModel, features: dict[str, Any], **how: Any) -> ModelSpec:
    """What Gemma 2 and 3 have in common."""
    fields = model.fields
    fields.expect("use_bidirectional_attention", False)
    features = {
        "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
        "post_norm": True,
        **features,
    }
    return model.spec(
        features,
        NAMES,
        GELU_OR_RELU,
        biases=model.biases(attention_bias=ATTENTION),
        norm_add=1.0,
        embedding_scale=model.hidden_size**0.5,
        logits_softcap=fields.number_or_zero("final_logit_softcapping"),
        **how,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture gemma2."""
    model = GgufModel(checkpoint)
    cap = model.fields.number_or_zero("attn_logit_softcapping", 50.0)
    windows = model.windows(period=2, default=4096)
    theta = model.fields.number("rope.freq_base", 10000.0)
    model.fields.expect("rope.freq_base_swa", theta)
    return gguf_spec(model, 46, 30.0, {"attention_softcap": cap, "window": windows})


def gguf_spec(
    model: GgufModel, layers_of_27b: int, softcap: float, features: dict[str, Any], **how: Any
) -> ModelSpec:
    """What Gemma 2 and 3 have in common; the files have the norms' 1 + w and no query_pre_attn_scalar."""
    # llama.cpp knows the 27B models, whose scale differs, by their number of layers.
    is_27b = model.num_layers == layers_of_27b
    scalar = model.hidden_size // model.num_heads if is_27b else model.head_dim
    features = {
        "attention_scale": scalar**-0.5,
        "activation": GELU_TANH,
        "post_norm": True,
        **features,
    }
    return model.spec(
        features,
        embedding_scale=model.hidden_size**0.5,
        logits_softcap=model.fields.number_or_zero("final_logit_softcapping", softcap),
        **how,
    )
