"""How checkpoints of one architecture name their tensors: prefixes of wrappers, tied heads, layers."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import BLOCK_SIZES, Checkpoint, Tensor
from pagellm.engine.errors import named
from pagellm.engine.models.fields import REQUIRED, Fields

# What torch.compile and data-parallel training put before every name.
_WRAPPERS = re.compile(r"((_orig_mod|module)\.)*")

_COMPARE_BYTES = 8 << 20
_LISTED = 3
_MAX_LAYERS = 1 << 14


def hub_prefixes(checkpoint: Checkpoint, base: str, anchor: str) -> tuple[str, str]:
    """What stands before the decoder's tensors, and before the output matrix's.

    base: what a language model puts before its decoder; a bare decoder lacks the first word of it, one beside
    a vision tower has a second prefix, which older files put first. anchor: a tensor that every decoder has.
    """
    towers = {
        f"{base}language_model.": "",
        f"language_model.{base}": "language_model.",
        "language_model.": "",
    }
    bare = base.partition(".")[2]
    known = {"": "", bare: "", base: "", **towers}
    for name in checkpoint.tensors:
        if name.endswith(anchor):
            decoder = name.removesuffix(anchor)
            for prefix, before_head in sorted(known.items(), key=lambda item: -len(item[0])):
                wrapper = decoder.removesuffix(prefix)
                if decoder.endswith(prefix) and _WRAPPERS.fullmatch(wrapper):
                    return decoder, wrapper + before_head
    return base, ""


def embedding_and_head(
    checkpoint: Checkpoint, embedding: str, head: str, tied: bool
) -> tuple[str, str | None, tuple[str, ...]]:
    """The tensors of the embedding and of the output matrix, and those that repeat another one.

    Tied, one of the two is enough, and the output matrix is None; where both are there and differ, each is
    itself, as in transformers.
    """
    tensors = checkpoint.tensors
    if not tied:
        return embedding, head, ()
    if embedding not in tensors and head in tensors:
        return head, None, ()
    if embedding in tensors and head in tensors:
        if not (checkpoint.headers_only or _same(tensors[embedding], tensors[head])):
            return embedding, head, ()
        return embedding, None, (head,)
    return embedding, None, ()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices hold the same values."""
    if a.shape != b.shape or len(a.shape) != 2:
        return False
    as_they_are = a.dtype == b.dtype and a.dtype in BLOCK_SIZES

    def read(tensor: Tensor, start: int, stop: int) -> NDArray[Any]:
        return tensor.quantized_rows(start, stop) if as_they_are else tensor.rows(start, stop)

    step = max(1, _COMPARE_BYTES // (4 * max(1, a.shape[1])))
    starts = range(0, a.shape[0], step)
    ends = (min(start + step, a.shape[0]) for start in starts)
    return all(np.array_equal(read(a, i, j), read(b, i, j)) for i, j in zip(starts, ends, strict=True))


def count_layers(fields: Fields, name: str, checkpoint: Checkpoint, default: Any = REQUIRED) -> int:
    """The number of layers, each of which takes some tensors: a hostile one cannot ask for endless work."""
    num_layers = fields.integer(name, default, _MAX_LAYERS)
    if num_layers > len(checkpoint.tensors) and not checkpoint.config_only:
        raise fields.error(
            name, num_layers, f"tensors for so many layers, but there are only {names_of(checkpoint)}"
        )
    return num_layers


def names_of(checkpoint: Checkpoint) -> str:
    """How many tensors there are, and the first of them, as an error message lists them."""
    names = list(checkpoint.tensors)
    more = ", ..." if len(names) > _LISTED else ""
    return f"{len(names)} ({', '.join(named(name) for name in names[:_LISTED])}{more})"
