"""The default model's weights as GGUF files of several types, so that every engine reads the same numbers.

The published file is Q4_1 with a Q8_0 embedding. The others are made from it by `pagellm quantize`, once, and
kept in pagellm's cache directory; the one in Q4_0 has a Q8_0 embedding, too.
"""

from math import prod
from pathlib import Path

from pagellm.engine.cache import cache_dir
from pagellm.engine.checkpoints import open_checkpoint, resolve_model
from pagellm.engine.config import DEFAULT_MODEL
from pagellm.engine.models import read_spec

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


def matrix_sizes(path: Path, num_tokens: int = 1) -> tuple[int, float, int]:
    """Bytes of the weights that a step reads, and the multiply-adds of one token in layers and output matrix.

    Of an embedding that is not the output matrix, too, a step reads a few rows. Of a mixture's experts it
    reads those that so many tokens choose, if every choice is as likely as any other, as of random weights.
    """
    with open_checkpoint(path) as checkpoint:
        tensors, layers = checkpoint.tensors, read_spec(checkpoint).arch.layers
        output = OUTPUT if OUTPUT in tensors else EMBEDDING
        num_bytes, in_layers = 0.0, 0.0
        for tensor in tensors.values():
            if tensor.name == EMBEDDING != output:
                continue
            read = computed = 1.0
            if len(tensor.shape) == 3:
                row = layers[int(tensor.name.split(".")[1])]
                computed = row["experts_per_token"] / row["num_experts"]
                read = 1 - (1 - computed) ** num_tokens
            num_bytes += read * tensor.num_bytes
            if len(tensor.shape) > 1 and tensor.name != output:
                in_layers += computed * prod(tensor.shape)
        return round(num_bytes), in_layers, prod(tensors[output].shape)
