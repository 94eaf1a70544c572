"""OPT: GPT-2 with ReLU, and learned positions that begin at row 2 (Zhang et al. 2022).

Not OPT-350M, which has its norms behind the sums, and an embedding of another width.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.hub import ATTENTION, GELU_OR_RELU, MLP, HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "relu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "enable_bias": True,
}
_KEYS = {
    "intermediate_size": "ffn_dim",
    "hidden_act": "activation_function",
    "rms_norm_eps": None,
    "num_key_value_heads": None,
    "head_dim": None,
}
_NAMES = {
    "position_embedding": "embed_positions",
    "final_norm": "final_layer_norm",
    "attention_norm": "self_attn_layer_norm",
    "output": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}
_NORMS = ("attention_norm", "mlp_norm", "final_norm")


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type opt; llama.cpp does not know this architecture."""
    model = HubModel(checkpoint, _DEFAULTS, _KEYS)
    for name, neutral in (
        ("do_layer_norm_before", True),
        ("layer_norm_elementwise_affine", True),
        ("_remove_final_layer_norm", False),
        ("word_embed_proj_dim", model.hidden_size),
    ):
        model.fields.expect(name, neutral)
    return model.spec(
        {"rope_table": -1, "gated": False},
        _NAMES,
        GELU_OR_RELU,
        base="model.decoder.",
        harmless="layerdrop | init_std",
        rope_tables=(),
        num_positions=model.max_positions,
        first_position=2,
        layer_norm=True,
        biases=[*_NORMS, *model.biases(enable_bias=ATTENTION + MLP)],
    )
