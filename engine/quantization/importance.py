"""How much the inputs of a model's matrices count: their mean squares over a text, computed by the engine.

An input that is large makes an error of its weights large, too; llama.cpp calls these means an importance
matrix, and a file of its own with them is read as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints.gguf import read_gguf
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.llm import LLM
from pagellm.engine.models import ModelSpec
from pagellm.engine.progress import progress
from pagellm.kernels.architecture import PARTS, Architecture, Kind, Weights

# By layer, -1 for what belongs to none, and part: [inputs].
MeanSquares = Mapping[tuple[int, str], NDArray[np.float32]]
_SUMS, _COUNTS = ".in_sum2", ".counts"


def mean_squares(llm: LLM, texts: Sequence[Sequence[int]], show: bool = False) -> MeanSquares:
    """Of the inputs of each matrix that every token is multiplied by. llm: computes in float32 throughout."""
    runner = llm.engine.runner
    places, size, starts = {}, 0, np.full(len(runner.weights.panels), -1, np.int64)
    for where, panel, inputs in _matrices(runner.arch, runner.weights):
        places[where] = size, inputs
        starts[panel] = size
        size += inputs
    workspace = runner.workspace
    runner.workspace = workspace._replace(squares=np.zeros(size, np.float64), squares_start=starts)
    num_tokens = sum(map(len, texts))
    try:
        with progress("Measuring the inputs of matrices", num_tokens, show=show) as advance:
            for token_ids in texts:
                llm.logits(token_ids)
                advance(len(token_ids))
        means = (runner.workspace.squares / num_tokens).astype(np.float32)
    finally:
        runner.workspace = workspace
    return {where: means[start : start + inputs] for where, (start, inputs) in places.items()}


def _matrices(arch: Architecture, weights: Weights) -> Iterator[tuple[tuple[int, str], int, int]]:
    """Layer and part of each, its first panel, and its inputs."""
    for layer, row in enumerate(arch.layers):
        for part in PARTS.values():
            if part.kind is Kind.MATRIX and part.name in (weights.layers.dtype.names or ()):
                outputs, inputs = part.shape(arch, row)[0], part.shape(arch, row)[-1]
                if outputs:
                    yield (layer, part.name), int(weights.layers[layer][part.name]["panel"]), inputs
    yield (-1, "lm_head"), int(weights.rest[0]["lm_head"]["panel"]), arch.hidden_size


def by_tensor(means: MeanSquares, spec: ModelSpec) -> dict[str, NDArray[np.float32]]:
    """The same by the tensors of a model; an embedding has those of the output matrix, if it is it."""
    counts: dict[str, NDArray[np.float32]] = {}
    for layer, parts in enumerate((*spec.layers, spec.rest)):
        for part, sources in parts.items():
            in_layer = parts is not spec.rest
            name = "lm_head" if part == "embedding" and spec.arch.tied else part
            mean = means.get((layer if in_layer else -1, name))
            if mean is not None:
                counts |= {source.tensor: mean for source in sources}
    return counts


def read_importance(path: Path) -> dict[str, NDArray[np.float32]]:
    """An importance matrix of llama.cpp's, a GGUF file: by tensor [inputs], or [experts, inputs].

    Raises `CheckpointError` for another file.
    """
    with read_gguf(path) as checkpoint:
        kind = checkpoint.config.get("general.type")
        if kind != "imatrix":
            raise CheckpointError(f"{path}: general.type: found {found(kind)}, expected 'imatrix'")
        counts = {}
        for name, tensor in checkpoint.tensors.items():
            if not name.endswith(_SUMS):
                continue
            of_matrix = checkpoint.tensors.get(name.removesuffix(_SUMS) + _COUNTS)
            if tensor.dtype != "F32" or of_matrix is None or of_matrix.dtype != "F32":
                raise CheckpointError(f"{path}: tensor {name}: found no float32 sums with counts beside them")
            sums = tensor.rows(0, tensor.shape[0]).reshape(-1, tensor.shape[-1])
            numbers = of_matrix.rows(0, of_matrix.shape[0]).reshape(-1, 1)
            if len(numbers) not in (1, len(sums)):
                raise CheckpointError(
                    f"{path}: tensor {name}: found {len(numbers)} counts, expected one for each of "
                    f"{len(sums)} matrices"
                )
            with np.errstate(divide="ignore", invalid="ignore"):
                means = np.where(numbers > 0, sums / numbers, 0).astype(np.float32)
            counts[name.removesuffix(_SUMS)] = means if len(means) > 1 else means[0]
    return counts
