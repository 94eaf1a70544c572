"""Checkpoints of models that see: the language model in them, by the text_config beside the vision_config."""

import re
from dataclasses import replace

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.fields import Fields
from pagellm.engine.models.hub import HARMLESS
from pagellm.engine.models.hub_quantization import refuse_quantized

# What the model_type of the whole means for a text_config that says none of its own.
TEXT_TYPES = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "mistral3": "mistral"}

# Tensors of what is not the language model, and why they are left alone.
OTHER_TENSORS = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector|embed_vision|audio_tower|embed_audio)\..*"
)
LEFT_ALONE = "the vision tower and what else is not of the language model is left alone: prompts are text"

# Keys about images and sound.
_NOT_OF_TEXT = (
    r"vision_.* | image_token_.* | (boi|eoi)_token_.* | mm_tokens_per_image | multimodal_projector_bias"
    r"| projector_hidden_act | spatial_merge_size | audio_config"
)


def text_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the configuration of its language model alone.

    Raises `CheckpointError` if there is none, or if the whole's configuration has keys that are about
    neither images nor sound and may change what is computed.
    """
    fields = Fields(checkpoint.path / "config.json", checkpoint.config)
    refuse_quantized(fields, checkpoint)
    model_type = str(fields.get("model_type"))
    text = fields.section("text_config")
    if text is None:
        raise fields.error("text_config", fields.get("text_config"), "the language model's configuration")
    tied = fields.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    also = re.compile(f"{HARMLESS.pattern} | {_NOT_OF_TEXT}", re.VERBOSE)
    fields.refuse_others(also, f"model_type {model_type}")
    own = {"model_type": TEXT_TYPES[model_type], **text.values, "tie_word_embeddings": tied}
    return replace(checkpoint, config=own)
