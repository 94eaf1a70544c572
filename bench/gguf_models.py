"""The default model's weights as GGUF files of several types, so that every engine reads the same numbers.

The published file is Q4_1 with a Q8_0 embedding. The others are made from it by `pagellm quantize`, once, and
kept in pagellm's cache directory; the one in Q4_0 has a Q8_0 embedding, too.
"""

from math import prod
from pathlib import Path

from pagellm.engine.cache import cache_dir
from pagellm.engine.checkpoints import open_checkpoint, resolve_model
from pagellm.engine.config import DEFAULT_MODEL

PUBLISHED = "Q4_1"
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"  # where there is none, the embedding is it


def model_file(file_type: str) -> Path:
    """The default model with its matrices in a type of `quantize`, or as it was published, `PUBLISHED`."""
    # Here, as what only asks for names need not load the engine.
    from pagellm.engine.quantization.model import Settings, quantize_model

    if file_type == PUBLISHED:
        return resolve_model(DEFAULT_MODEL)
    target = cache_dir() / "bench" / f"{DEFAULT_MODEL}.{file_type}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        quantize_model(DEFAULT_MODEL, target, Settings(file_type, text_tokens=0, allow_requantize=True))
    return target


def matrix_sizes(path: Path) -> tuple[int, int, int]:
    """Bytes of the weights that a step reads, and the multiply-adds of one token in layers and output matrix.

    Of an embedding that is not the output matrix, too, a step reads a few rows.
    """
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.tensors
        output = OUTPUT if OUTPUT in tensors else EMBEDDING
        read = [tensor for tensor in tensors.values() if output == EMBEDDING or tensor.name != EMBEDDING]
        in_layers = [prod(t.shape) for t in read if len(t.shape) == 2 and t.name != output]
        return sum(tensor.num_bytes for tensor in read), sum(in_layers), prod(tensors[output].shape)
