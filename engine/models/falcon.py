"""Falcon: attention beside the feed-forward, one KV head or groups of them (Almazrouei et al. 2023).

7B has one norm for both; 40B has one for each, and queries, key and value by group.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, GELU_OR_RELU, MLP, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.activation import GELU

_DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "intermediate_size": None,
    "num_attention_heads": 71,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bias": False,
}
_KEYS = {
    "intermediate_size": "ffn_hidden_size",
    "hidden_act": "activation",
    "rms_norm_eps": "layer_norm_epsilon",
    "num_key_value_heads": None,
    "head_dim": None,
}
_NAMES = {
    "embedding": "word_embeddings",
    "final_norm": "ln_f",
    "layer": "h.{}.",
    "qkv": "self_attention.query_key_value",
    "output": "self_attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_NORMS = ("attention_norm", "mlp_norm", "final_norm")


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type falcon."""
    model = HubModel(checkpoint, _DEFAULTS, _KEYS)
    fields = model.fields
    for name in ("alibi", "apply_residual_connection_post_layernorm"):
        fields.expect(name, False)
    parallel = fields.boolean("parallel_attn", True)
    kv_heads = fields.integer_or_none("num_kv_heads") or model.num_heads
    grouped = fields.boolean("new_decoder_architecture", False)
    if fields.boolean("multi_query", True) and not grouped:
        kv_heads = 1
    num_norms = fields.integer_or_none("num_ln_in_parallel_attn", maximum=2) or (2 if grouped else 1)
    if (grouped and not parallel) or (num_norms == 2 and not grouped):
        expected = "true beside parallel_attn true and, where num_ln_in_parallel_attn is 2, alone"
        raise fields.error("new_decoder_architecture", grouped, expected)
    names = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"} if num_norms == 2 else {}
    if parallel and num_norms == 1:
        names = {"mlp_norm": "input_layernorm"}
    return model.spec(
        {
            "num_kv_heads": kv_heads,
            "intermediate_size": fields.integer_or_none("intermediate_size") or 4 * model.hidden_size,
            "gated": False,
            "parallel": parallel,
        },
        {**_NAMES, **names},
        GELU_OR_RELU,
        base="transformer.",
        layer_norm=True,
        biases=[*_NORMS, *model.biases(bias=ATTENTION + MLP)],
        grouped_qkv=True,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture falcon; the norm of attention is the second, if any.

    GELU is not llama.cpp's approximation of it.
    """
    model = GgufModel(checkpoint)
    two = "blk.0.attn_norm_2.weight" in checkpoint.tensors
    return model.spec(
        {"activation": GELU, "gated": False, "parallel": True},
        {"attention_norm": "attn_norm_2" if two else "attn_norm", "mlp_norm": "attn_norm"},
        layer_norm=True,
    )
