"""A model as a smaller file: from a checkpoint to GGUF in one of the mixes.

Tensors are read, quantized and written a few rows at a time, so that no tensor is ever held.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import BLOCK_SIZES, Checkpoint, Tensor, bits_per_weight
from pagellm.engine.checkpoints.gguf import read_gguf, read_metadata_bytes
from pagellm.engine.checkpoints.gguf_writer import GgufWriter, TensorInfo, encode_value
from pagellm.engine.errors import CheckpointError
from pagellm.engine.execution.weights import pair, plain_rows
from pagellm.engine.models import ModelSpec, Source, gguf_rope, read_spec
from pagellm.engine.progress import progress
from pagellm.engine.quantization.gguf_form import WITHOUT_WINDOWS, check_same, gguf_form
from pagellm.engine.quantization.mixes import MIXES, Matrices, type_of
from pagellm.engine.quantization.pieces import PIECE_BYTES, in_turn, quantized
from pagellm.engine.tokenizer.to_gguf_metadata import tokenizer_metadata
from pagellm.kernels.architecture import PARTS, Kind

_QUANTIZATION_VERSION = 2
# Of a weight that may be rounded once more.
_FULL_BITS = 8

Importance = Mapping[str, NDArray[np.float32]]
Rows = Callable[[int, int], NDArray[np.float32]]


@dataclass(frozen=True)
class Written:
    """What was written. tensors: how many of each type; without_importance: matrices that have none; notes:
    what else there is to say."""

    architecture: str
    num_bytes: int
    weights: int
    tensors: Mapping[str, int]
    without_importance: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file."""
        return 8 * self.num_bytes / self.weights


class _Segment(NamedTuple):
    """Rows of a tensor to write that are made alike. unit: rows that belong together."""

    first: int
    end: int
    rows: Rows
    unit: int = 1


def write_gguf(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    file: io.FileIO,
    path: Path,
    mix: str,
    *,
    pure: bool = False,
    importance: Callable[[ModelSpec], Importance] = lambda _: {},
    provenance: Mapping[str, str | int] | None = None,
    num_threads: int = 1,
    show: bool = False,
) -> Written:
    """Writes a model to a file that is open at `path`.

    mix: of `MIXES`; pure: all matrices in one type. importance: how much the inputs of matrices count,
    by tensors of the model that is written: [inputs], or [experts, inputs]. provenance: keys to add.
    Raises `CheckpointError` for a model that GGUF has no form for, and `OSError`.
    """
    file_type, _ = MIXES[mix]
    keys = {"general.file_type": int(file_type), "general.quantization_version": _QUANTIZATION_VERSION}
    added = {key: encode_value(value) for key, value in {**keys, **(provenance or {})}.items()}
    is_gguf = checkpoint.format == "gguf"
    shapes: Mapping[str, tuple[tuple[int, ...], bool]]
    constants: Mapping[str, NDArray[np.float32]] = {}
    if is_gguf:
        matrices = {source.tensor for source in _matrix_sources(spec)}
        shapes = {name: (tensor.shape, name in matrices) for name, tensor in checkpoint.tensors.items()}
        entries = read_metadata_bytes(checkpoint.path)
        metadata = {key: value for key, value in entries.items() if not key.startswith("split.")} | added
        architecture = str(checkpoint.config["general.architecture"])
        tables = [checkpoint.tensors[name] for name in gguf_rope.TENSORS if name in checkpoint.tensors]
        constants = {table.name: table.rows(0, table.shape[0]) for table in tables if table.dtype == "F32"}
    else:
        form = gguf_form(checkpoint, spec)
        tokenizer = tokenizer_metadata(checkpoint.path, spec.vocab_size)
        metadata = {key: encode_value(value) for key, value in {**form.metadata, **tokenizer}.items()} | added
        architecture, shapes, constants = form.architecture, form.tensors, form.constants
    model = Matrices(
        architecture, spec.arch.num_layers, spec.arch.tied, _num_experts(checkpoint, architecture)
    )
    infos = []
    for name, (shape, is_matrix) in shapes.items():
        dtype = "F32" if not is_gguf else checkpoint.tensors[name].dtype
        if is_matrix and "ffn_gate_inp" not in name:
            dtype = type_of(mix, pure, model, name, shape[-1])
        infos.append(TensorInfo(name, shape, dtype))
    writer = GgufWriter(file, metadata, infos)
    for name, values in constants.items():
        writer.write(name, 0, values.tobytes())
    with read_gguf(path) as read:
        try:
            written = read_spec(read)
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise CheckpointError(
                f"{checkpoint.path}: has no form as GGUF's {architecture}: {reason}"
            ) from None
    check_same(checkpoint.path, spec, written)
    writer.reserve()
    counts = importance(written)
    for info in infos:
        _check_importance(checkpoint, info, counts.get(info.name))
    segments = _gguf_segments(checkpoint) if is_gguf else _hub_segments(checkpoint, spec, written)
    work = [(info, segment) for info in infos if info.name in segments for segment in segments[info.name]]
    total = sum(info.num_bytes for info in infos)
    with progress("Quantizing", total, "bytes", show) as advance, ThreadPoolExecutor(num_threads) as pool:
        jobs = (job for info, segment in work for job in _jobs(checkpoint, writer, info, segment, counts))
        for num_bytes in in_turn(pool, jobs, 2 * num_threads):
            advance(num_bytes)
    weights = sum(prod(info.shape) for info in infos)
    types = Counter(info.dtype for info in infos)
    missing = [
        info.name for info in infos if counts and BLOCK_SIZES[info.dtype][0] > 1 and info.name not in counts
    ]
    notes = []
    if not is_gguf and architecture in WITHOUT_WINDOWS and (spec.arch.layers["window"] > 0).any():
        notes.append(
            f"llama.cpp lets every layer of {architecture} see everything, this engine obeys the window"
        )
    return Written(architecture, writer.num_bytes, weights, dict(types), tuple(missing), tuple(notes))


def _check_importance(checkpoint: Checkpoint, info: TensorInfo, count: NDArray[np.float32] | None) -> None:
    shapes = ((info.shape[-1],), (*info.shape[:-2], info.shape[-1]))
    if count is not None and count.shape not in shapes:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {info.name}: found an importance of {list(count.shape)}, expected "
            f"{list(shapes[-1])}, one for each input"
        )


def requantized(checkpoint: Checkpoint, spec: ModelSpec) -> list[str]:
    """The types of matrices that are of few bits already: rounded again they lose again."""
    tensors = [checkpoint.tensors[source.tensor] for source in _matrix_sources(spec)]
    return sorted({tensor.dtype for tensor in tensors if bits_per_weight(tensor) < _FULL_BITS})


def _matrix_sources(spec: ModelSpec) -> Iterator[Source]:
    for parts in (*spec.layers, spec.rest):
        for part, sources in parts.items():
            if PARTS[part].kind is Kind.MATRIX:
                yield from sources


def _num_experts(checkpoint: Checkpoint, architecture: str) -> int:
    value = checkpoint.config.get(f"{architecture}.expert_count", 0)
    return value if type(value) is int else 0


def _gguf_segments(checkpoint: Checkpoint) -> dict[str, list[_Segment]]:
    """Of each tensor its rows as they are, expert by expert."""
    segments = {}
    for name, tensor in checkpoint.tensors.items():
        columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        flat = replace(tensor, shape=(prod(tensor.shape) // columns, columns)) if columns > 1 else tensor
        size = tensor.shape[-2] if len(tensor.shape) > 2 else flat.shape[0]
        segments[name] = [_Segment(i, i + size, flat.rows) for i in range(0, flat.shape[0], size)]
    return segments


def _hub_segments(checkpoint: Checkpoint, spec: ModelSpec, written: ModelSpec) -> dict[str, list[_Segment]]:
    """Of each tensor of the file, which rows of which parts of the model become its rows."""
    segments: dict[str, list[_Segment]] = {}
    made_from: dict[str, tuple[Source, ...]] = {}
    for own_parts, parts in zip((*spec.layers, spec.rest), (*written.layers, written.rest), strict=True):
        for part, sources in parts.items():
            own, names = own_parts[part], {source.tensor for source in sources}
            if names <= made_from.keys():  # that two parts share, as one norm before both halves
                if any(made_from[name] != own for name in names):
                    raise CheckpointError(
                        f"{checkpoint.path}: {part}: found a tensor of its own, {own[0].tensor}, which "
                        f"GGUF's {written.architecture} has no place for"
                    )
                continue
            made_from |= dict.fromkeys(names, own)
            begin = 0
            for source in sources:
                unit = max(_head_size(one) for one in (source, *own))
                for first, end in source.ranges:
                    rows = partial(_converted_rows, checkpoint, own, source, begin - first)
                    segments.setdefault(source.tensor, []).append(_Segment(first, end, rows, unit))
                    begin += end - first
    return segments


def _head_size(source: Source) -> int:
    """Rows whose order depends on each other."""
    return source.outputs // source.paired_heads if source.paired_heads else 1


def _converted_rows(
    checkpoint: Checkpoint, sources: Sequence[Source], target: Source, shift: int, first: int, end: int
) -> NDArray[np.float32]:
    """Rows of a tensor to write, which are the outputs `[first + shift, end + shift)` of a part."""
    rows = pair(_outputs(checkpoint, sources, first + shift, end + shift), target)
    return rows - np.float32(target.add) if target.add else rows


def _outputs(checkpoint: Checkpoint, sources: Sequence[Source], first: int, end: int) -> NDArray[np.float32]:
    """Outputs of a part, in the order in which the kernels have them."""
    pieces, begin = [], 0
    for source in sources:
        tensor = checkpoint.tensors[source.tensor]
        for low, high in source.ranges:
            start, stop = max(first, begin) - begin + low, min(end, begin + high - low) - begin + low
            begin += high - low
            if start < stop and source.transposed:
                pieces.append(plain_rows(tensor, source, 0, source.shape[0]).T[start:stop])
            elif start < stop:
                pieces.append(plain_rows(tensor, source, start, stop))
    return np.concatenate(pieces)


def _jobs(
    checkpoint: Checkpoint, writer: GgufWriter, info: TensorInfo, segment: _Segment, counts: Importance
) -> Iterator[Callable[[], int]]:
    """Pieces of work that each give the bytes that they wrote."""
    columns = info.shape[-1] if len(info.shape) > 1 else 1
    step = max(1, PIECE_BYTES // (4 * columns) // segment.unit) * segment.unit
    own = checkpoint.tensors.get(info.name)
    copied = own if checkpoint.format == "gguf" and own is not None and own.dtype == info.dtype else None
    count = counts.get(info.name)
    if count is not None and count.ndim == 2:
        count = count[segment.first // (segment.end - segment.first)]
    for first in range(segment.first, segment.end, step):
        end = min(first + step, segment.end)
        if copied is not None:
            yield partial(_copy, writer, info, copied, columns, first, end)
        else:
            yield partial(_quantize, checkpoint, writer, info, segment.rows, columns, first, end, count)


def _place(info: TensorInfo, columns: int, row: int) -> int:
    """Where a row begins, in bytes from the tensor's first."""
    block, block_bytes = BLOCK_SIZES[info.dtype]
    return row * columns // block * block_bytes


def _copy(writer: GgufWriter, info: TensorInfo, tensor: Tensor, columns: int, first: int, end: int) -> int:
    start, stop = _place(info, columns, first), _place(info, columns, end)
    writer.write(info.name, start, tensor.file.read(tensor.offset + start, stop - start))
    return stop - start


def _quantize(
    checkpoint: Checkpoint, writer: GgufWriter, info: TensorInfo, rows: Rows, columns: int, first: int,
    end: int, importance: NDArray[np.float32] | None,
) -> int:  # fmt: skip
    values = rows(first, end).reshape(-1, columns)
    data = quantized(f"{checkpoint.path}: tensor {info.name}", info.dtype, values, first, importance)
    writer.write(info.name, _place(info, columns, first), data)
    return data.nbytes
