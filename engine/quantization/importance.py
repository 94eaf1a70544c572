"""How much the inputs of a model's matrices count: their mean squares over a text, computed by the engine.

An input that is large makes an error of its weights large, too; llama.cpp calls these means an importance
matrix, and a file of its own with them is read as well. Each expert has those of the tokens that were routed
to it; one that no token reached has the mean of all others, which is nearer than that all inputs count alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints.gguf import read_gguf
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.llm import LLM
from pagellm.engine.models import ModelSpec
from pagellm.engine.progress import progress
from pagellm.kernels.architecture import PARTS, Architecture, Kind, Weights

# By layer, -1 for what belongs to none, and part: [inputs], or [matrices, inputs] of experts and heads.
MeanSquares = Mapping[tuple[int, str], NDArray[np.float32]]
_SUMS, _COUNTS = ".in_sum2", ".counts"


class _Matrix(NamedTuple):
    """A part of a layer whose inputs are measured: matrices of so many inputs each, from a panel on.

    of_experts: whether a token passes through some of the matrices, so that their rows are counted.
    """

    layer: int
    part: str
    panel: int
    number: int
    inputs: int
    of_experts: bool = False


def mean_squares(llm: LLM, texts: Sequence[Sequence[int]], show: bool = False) -> MeanSquares:
    """Of the inputs of each matrix of the model. llm: computes in float32 throughout."""
    runner = llm.engine.runner
    places, size, starts = [], 0, np.full(len(runner.weights.panels), -1, np.int64)
    for matrix in _matrices(runner.arch, runner.weights):
        places.append((matrix, size))
        starts[matrix.panel] = size
        size += matrix.number * (matrix.inputs + matrix.of_experts)
    workspace = runner.workspace
    runner.workspace = workspace._replace(squares=np.zeros(size, np.float64), squares_start=starts)
    num_tokens = sum(map(len, texts))
    try:
        with progress("Measuring the inputs of matrices", num_tokens, show=show) as advance:
            for token_ids in texts:
                llm.logits(token_ids)
                advance(len(token_ids))
        squares = runner.workspace.squares
    finally:
        runner.workspace = workspace
    return {(one.layer, one.part): _means(one, squares[start:], num_tokens) for one, start in places}


def _means(matrix: _Matrix, squares: NDArray[np.float64], num_tokens: int) -> NDArray[np.float32]:
    """The means of a part's matrices, from its sums and, behind those of experts, their counts."""
    size = matrix.number * matrix.inputs
    sums = squares[:size].reshape(matrix.number, matrix.inputs)
    if matrix.of_experts:
        return _of_experts(sums, squares[size : size + matrix.number])
    means: NDArray[np.float32] = (sums / num_tokens).astype(np.float32)
    return means if matrix.number > 1 else means.reshape(-1)


def _of_experts(sums: NDArray[np.floating], counts: NDArray[np.floating]) -> NDArray[np.float32]:
    """Means [experts, inputs] of sums over so many tokens of each; those without have the mean of all."""
    overall = sums.sum(axis=0) / max(1, counts.sum())
    each = sums / np.maximum(counts, 1)[:, None]
    means: NDArray[np.float32] = np.where(counts[:, None] > 0, each, overall).astype(np.float32)
    return means


def _matrices(arch: Architecture, weights: Weights) -> Iterator[_Matrix]:
    for layer, row in enumerate(arch.layers):
        for part in PARTS.values():
            if part.kind is Kind.MATRIX and part.name in (weights.layers.dtype.names or ()):
                outputs, inputs = part.shape(arch, row)[0], part.shape(arch, row)[-1]
                panel = int(weights.layers[layer][part.name]["panel"])
                count = int(row["num_experts"]) if part.of_experts else 1
                if part.name in ("key_up", "value_up"):
                    count = int(row["num_heads"])
                if outputs:
                    yield _Matrix(layer, part.name, panel, count, inputs, part.of_experts)
    yield _Matrix(-1, "lm_head", int(weights.rest[0]["lm_head"]["panel"]), 1, arch.hidden_size)


def by_tensor(means: MeanSquares, spec: ModelSpec) -> dict[str, NDArray[np.float32]]:
    """The same by the tensors of a model; an embedding has those of the output matrix, if it is it.

    Nothing is known of a tensor that has the matrices of several parts, or inputs in the place of rows.
    """
    counts: dict[str, NDArray[np.float32]] = {}
    for layer, parts in enumerate((*spec.layers, spec.rest)):
        for part, sources in parts.items():
            in_layer = parts is not spec.rest
            name = "lm_head" if part == "embedding" and spec.arch.tied else part
            mean = means.get((layer if in_layer else -1, name))
            if mean is None or any(source.transposed for source in sources):
                continue
            for index, source in enumerate(sources):
                # Sources of several matrices are stacked in a tensor, or each is one's own.
                is_one = mean.ndim > 1 and source.stack is None
                counts[source.tensor] = mean[index * len(mean) // len(sources)] if is_one else mean
    shared = {source.tensor for parts in spec.layers for source in parts.get("key_up", ())}
    shared &= {source.tensor for parts in spec.layers for source in parts.get("value_up", ())}
    return {tensor: mean for tensor, mean in counts.items() if tensor not in shared}


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
            means = _of_experts(sums, np.broadcast_to(numbers, (len(sums), 1))[:, 0])
            counts[name.removesuffix(_SUMS)] = means if len(means) > 1 else means[0]
    return counts
