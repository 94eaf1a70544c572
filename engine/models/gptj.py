"""GPT-J: attention beside the feed-forward, both behind one norm (Wang and Komatsuzaki 2021)."""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models import gpt2, rope
from pagellm.engine.models.decoder import Names
from pagellm.engine.models.hub import GELU_OR_RELU, HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {
    **gpt2.DEFAULTS,
    "vocab_size": 50400,
    "hidden_size": 4096,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_NAMES: Names = {
    "embedding": "wte",
    "final_norm": "ln_f",
    "layer": "h.{}.",
    "attention_norm": "ln_1",
    "qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "output": "attn.out_proj",
    "mlp_norm": "ln_1",
    "up": "mlp.fc_in",
    "down": "mlp.fc_out",
}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type gptj; llama.cpp does not know this architecture."""
    model = HubModel(checkpoint, _DEFAULTS, gpt2.KEYS)
    for name in ("rotary", "scale_attn_weights"):  # of the first files; the class passes them over
        model.fields.expect(name, True)
    intermediate = model.fields.integer_or_none("intermediate_size") or 4 * model.hidden_size
    return model.spec(
        {"intermediate_size": intermediate, "gated": False, "parallel": True},
        _NAMES,
        GELU_OR_RELU,
        base="transformer.",
        rope_tables=(rope.plain(model.fields.integer("rotary_dim", 64), rope.DEFAULT_THETA),),
        layer_norm=True,
        biases=("attention_norm", "mlp_norm", "up", "down", "final_norm", "lm_head"),
        paired=True,
    )
