"""The GPT-2 family: LayerNorm, learned positions, one fused QKV projection (Radford et al. 2019).

GPT-3-shaped configurations are the same architecture at other sizes.
"""

from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import GELU_OR_RELU, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.activation import GELU_TANH

DEFAULTS = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "intermediate_size": None,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_act": "activation_function",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "num_key_value_heads": None,
    "head_dim": None,
}
NAMES = {
    "embedding": "wte",
    "position_embedding": "wpe",
    "final_norm": "ln_f",
    "layer": "h.{}.",
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
BIASES = ("attention_norm", "qkv", "output", "mlp_norm", "up", "down", "final_norm")


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gpt2."""
    model = HubModel(checkpoint, DEFAULTS, KEYS)
    model.fields.expect("scale_attn_by_inverse_layer_idx", False)
    # Published checkpoints hold the bare decoder; saved from a language model it has a prefix.
    return model.spec(
        features(model),
        NAMES,
        GELU_OR_RELU,
        base="transformer.",
        rope_tables=(),
        num_positions=model.max_positions,
        layer_norm=True,
        biases=BIASES,
        transposed=True,
    )


def features(model: HubModel) -> dict[str, Any]:
    """How its layers differ from Llama's, by a config.json of GPT-2 or of its relatives."""
    fields = model.fields
    if model.hidden_size % model.num_heads:
        raise fields.error("hidden_size", model.hidden_size, f"a multiple of n_head, {model.num_heads}")
    return {
        "attention_scale": model.head_dim**-0.5 if fields.boolean("scale_attn_weights", True) else 1.0,
        "rope_table": -1,
        "intermediate_size": fields.integer_or_none("intermediate_size") or 4 * model.hidden_size,
        "gated": False,
    }


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture gpt2."""
    model = GgufModel(checkpoint)
    if model.hidden_size % model.num_heads:
        expected = f"a multiple of attention.head_count, {model.num_heads}"
        raise model.fields.error("embedding_length", model.hidden_size, expected)
    return model.spec(
        {"rope_table": -1, "activation": GELU_TANH, "gated": False},
        {"qkv": "attn_qkv", "up": "ffn_up"},
        rope_tables=(),
        num_positions=model.max_positions,
        layer_norm=True,
        biases=BIASES,
    )
