"""Checkpoints: bytes on disk become named tensors, and a model's name becomes a path.

Two formats are read, Hugging Face directories with safetensors and GGUF files; both give the same
`Checkpoint`. This package checks that a file is what it claims to be before anything is read from it. It
knows nothing of architectures, of tokenizers or of how weights are laid out for the kernels.
"""

from pathlib import Path

from pagellm.engine.checkpoints.base import (
    BLOCK_SIZES,
    SUPPORTED_DTYPES,
    Checkpoint,
    Tensor,
    bits_per_weight,
)
from pagellm.engine.checkpoints.gguf_parts import gguf_in, open_gguf
from pagellm.engine.checkpoints.huggingface import has_weights, open_huggingface
from pagellm.engine.checkpoints.resolve import resolve_model
from pagellm.engine.errors import CheckpointError

__all__ = [
    "BLOCK_SIZES",
    "SUPPORTED_DTYPES",
    "Checkpoint",
    "Tensor",
    "bits_per_weight",
    "open_checkpoint",
    "resolve_model",
]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Hugging Face directory or a GGUF file; headers are read and checked, weights are not.

    A GGUF file may be any part of a model that was split, or the only model of a directory. Raises
    `CheckpointError` if the path holds no model, a broken one, or one in another format.
    """
    path = Path(path)
    if path.is_dir():
        file = None if has_weights(path) else gguf_in(path)
        return open_huggingface(path) if file is None else open_gguf(file)
    if path.is_file():
        return open_gguf(path)
    reason = "neither a directory nor a plain file" if path.exists() else "not found"
    raise CheckpointError(f"{path}: {reason}; expected a directory with config.json or a .gguf file")
