"""GPT-NeoX and Pythia: attention beside the feed-forward, RoPE in a part of each head (Black et al. 2022)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, GELU_OR_RELU, HubModel
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.activation import GELU

_DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "use_parallel_residual": True,
}
_KEYS = {
    "rms_norm_eps": "layer_norm_eps",
    "num_key_value_heads": None,
    "head_dim": None,
    "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
}
_NAMES = {
    "embedding": "embed_in",
    "final_norm": "final_layer_norm",
    "lm_head": "embed_out",
    "qkv": "attention.query_key_value",
    "output": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_BIASES = ("attention_norm", "mlp_norm", "up", "down", "final_norm")


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gpt_neox."""
    model = HubModel(checkpoint, _DEFAULTS, _KEYS)
    return model.spec(
        {"gated": False, "parallel": model.fields.boolean("use_parallel_residual")},
        _NAMES,
        GELU_OR_RELU,
        base="gpt_neox.",
        rope_tables=(model.rope_table(partial=True),),
        layer_norm=True,
        biases=[*_BIASES, *model.biases(attention_bias=ATTENTION)],
        grouped_qkv=True,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture gptneox.

    The activation, which the file does not say, is Pythia's; llama.cpp looks its approximation up in a table.
    """
    model = GgufModel(checkpoint)
    parallel = model.fields.boolean("use_parallel_residual")
    return model.spec(
        {"activation": GELU, "gated": False, "parallel": parallel},
        rope_tables=(model.rope_table(partial=True),),
        layer_norm=True,
    )
