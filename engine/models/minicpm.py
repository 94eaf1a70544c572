"""MiniCPM: Llama with multipliers that follow from its depth and width (Hu et al. 2024).

By the class that its repositories bring along (modeling_minicpm.py); transformers has none.
"""

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.gguf import GgufModel
from pagellm.engine.models.hub import ATTENTION, HubModel
from pagellm.engine.models.spec import ModelSpec

_DEFAULTS = {"tie_word_embeddings": True, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1}


def from_huggingface(checkpoint: Checkpoint) -> ModelSpec:
    """Reads a config.json of model_type minicpm."""
    model = HubModel(checkpoint, _DEFAULTS)
    number = model.fields.number
    return model.spec(
        {"residual_scale": number("scale_depth") / model.num_layers**0.5},
        biases=model.biases(attention_bias=ATTENTION),
        embedding_scale=number("scale_emb"),
        logits_scale=number("dim_model_base") / model.hidden_size,
        harmless="mup_denominator",  # of heads for speculation
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Reads the metadata of a GGUF file of architecture minicpm.

    Files of before the keys are of MiniCPM-2B, whose numbers llama.cpp takes; its divisor of logits, which
    it inverts, is meant as here.
    """
    model = GgufModel(checkpoint)
    number = model.fields.number
    return model.spec(
        {"residual_scale": number("residual_scale", 1.4 / model.num_layers**0.5)},
        paired=True,
        embedding_scale=number("embedding_scale", 12.0),
        logits_scale=1 / number("logit_scale", model.hidden_size / 256),
    )
