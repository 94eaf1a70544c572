"""What GGUF files of every architecture have in common: the keys under the architecture's prefix.

Defaults and meanings are llama.cpp's (`llama_model_base::load_hparams`).
"""

import re

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models.fields import Fields

# Of llama.cpp's keys, those that change no logits of these architectures.
HARMLESS = re.compile(
    r"vocab_size|tensor_data_layout|pooling_type|rope\.scaling\.(finetuned|original_context_length)"
)


def read_metadata(checkpoint: Checkpoint) -> Fields:
    """The fields under the architecture's prefix, once the file is known to be a whole model of a usual kind.

    Raises `CheckpointError` for a vocabulary without weights, experts and attention that is not causal.
    """
    if not checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.path}: a GGUF file of metadata alone (a vocabulary), expected one with the weights"
        )
    prefix = f"{checkpoint.config['general.architecture']}."
    values = {
        key.removeprefix(prefix): value for key, value in checkpoint.config.items() if key.startswith(prefix)
    }
    fields = Fields(checkpoint.path, values, prefix)
    fields.expect("attention.causal", True)
    for name in ("expert_count", "expert_used_count", "expert_group_count", "nextn_predict_layers"):
        fields.expect(name, 0)
    return fields


def vocabulary(checkpoint: Checkpoint, embedding: str) -> int:
    """The rows of the embedding, which is what decides."""
    tensor = checkpoint.tensors.get(embedding)
    if tensor is None:
        raise CheckpointError(f"{checkpoint.path}: tensor {embedding} is missing")
    return tensor.shape[0]
