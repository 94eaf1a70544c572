"""A model as a smaller file: from a checkpoint to GGUF in one of the mixes.

Tensors are read, quantized and written a few rows at a time, so that no tensor is ever held; only a matrix of
which the checkpoint has the columns in the place of rows is read as a whole.
"""

import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import LlamaFileType
from numpy.typing import NDArray

from pagellm.engine.checkpoints import BLOCK_SIZES, Checkpoint, Tensor, bits_per_weight
from pagellm.engine.checkpoints.gguf import read_gguf, read_metadata_bytes
from pagellm.engine.checkpoints.gguf_writer import GgufWriter, TensorInfo, encode_value
from pagellm.engine.checkpoints.quantized import QuantizedTensor
from pagellm.engine.errors import CheckpointError
from pagellm.engine.execution.weights import pair, plain_rows, tensor_of
from pagellm.engine.models import ModelSpec, Source, gguf_rope, read_spec
from pagellm.engine.progress import progress
from pagellm.engine.quantization.gguf_form import KEPT, Shape, as_written, check_same, gguf_form
from pagellm.engine.quantization.mixes import MIXES, Matrices, type_of
from pagellm.engine.quantization.pieces import PIECE_BYTES, in_turn, quantized
from pagellm.engine.tokenizer.to_gguf_metadata import tokenizer_metadata
from pagellm.kernels.architecture import PARTS, Kind

_QUANTIZATION_VERSION = 2
# Of a weight that may be rounded once more.
_FULL_BITS = 8

Importance = Mapping[str, NDArray[np.float32]]
Rows = Callable[[int, int], NDArray[np.float32]]
Packed = Callable[[int, int], NDArray[np.uint8]]


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
    """Rows of a tensor to write that are made alike; of stacked matrices they are counted through.

    columns: numbers in a row. unit: rows that belong together. packed: the rows in the blocks that they are
    in already.
    """

    first: int
    end: int
    columns: int
    rows: Rows
    unit: int = 1
    packed: Packed | None = None


class _Piece(NamedTuple):
    """Outputs of a part, in the order of the kernels: some of those that come from one source."""

    source: Source
    first: int
    end: int


def write_gguf(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    file: io.FileIO,
    path: Path,
    mix: str,
    *,
    pure: bool = False,
    requantize: bool = False,
    importance: Callable[[ModelSpec], Importance] = lambda _: {},
    provenance: Mapping[str, str | int] | None = None,
    num_threads: int = 1,
    show: bool = False,
) -> Written:
    """Writes a model to a file that is open at `path`.

    mix: of `MIXES`; pure: all matrices in one type. requantize: whether matrices of MXFP4 get another type,
    too; else they stay as they are, as in llama.cpp's converter. importance: how much the inputs of matrices
    count, by tensors of the model that is written: [inputs], or [experts, inputs]. provenance: keys to add.
    Raises `CheckpointError` for a model that GGUF has no form for, and `OSError`.
    """
    is_gguf = checkpoint.format == "gguf"
    shapes: Mapping[str, Shape]
    constants: Mapping[str, NDArray[np.float32]] = {}
    notes: tuple[str, ...] = ()
    if is_gguf:
        matrices = {source.tensor for source in _matrix_sources(spec)}
        shapes = {
            name: Shape(tensor.shape, name in matrices, tensor.dtype == KEPT)
            for name, tensor in checkpoint.tensors.items()
        }
        entries = read_metadata_bytes(checkpoint.path)
        metadata = {key: value for key, value in entries.items() if not key.startswith("split.")}
        architecture = str(checkpoint.config["general.architecture"])
        tables = [checkpoint.tensors[name] for name in gguf_rope.TENSORS if name in checkpoint.tensors]
        constants = {table.name: table.rows(0, table.shape[0]) for table in tables if table.dtype == "F32"}
    else:
        if as_written(spec) is not spec:
            spec, notes = as_written(spec), ("the output matrix is a copy of the embedding",)
        form = gguf_form(checkpoint, spec)
        tokenizer = tokenizer_metadata(checkpoint.path, spec.vocab_size)
        metadata = {key: encode_value(value) for key, value in {**form.metadata, **tokenizer}.items()}
        architecture, shapes, constants = form.architecture, form.tensors, form.constants
        notes += form.notes + ((f"not written: {spec.left_alone}",) if spec.left_alone else ())
    num_experts = int(spec.arch.layers["num_experts"].max())
    model = Matrices(architecture, spec.arch.num_layers, spec.arch.tied, num_experts)
    infos = []
    for name, (shape, is_matrix, is_packed) in shapes.items():
        dtype = "F32" if not is_gguf else checkpoint.tensors[name].dtype
        if is_packed and not (pure or requantize):
            dtype = KEPT
        elif is_matrix and "ffn_gate_inp" not in name:
            dtype = type_of(mix, pure, model, name, shape[-1])
        infos.append(TensorInfo(name, shape, dtype))
    file_type = MIXES[mix][0]
    if any(shapes[info.name].is_matrix and info.dtype == KEPT for info in infos):
        file_type = LlamaFileType.MOSTLY_MXFP4_MOE
    added = {
        "general.file_type": int(file_type),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **(provenance or {}),
    }
    metadata |= {key: encode_value(value) for key, value in added.items()}
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
    notes += tuple(check_same(checkpoint, spec, written))
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
    return Written(architecture, writer.num_bytes, weights, dict(types), tuple(missing), notes)


def _check_importance(checkpoint: Checkpoint, info: TensorInfo, count: NDArray[np.float32] | None) -> None:
    shapes = ((info.shape[-1],), (*info.shape[:-2], info.shape[-1]))
    if count is not None and count.shape not in shapes:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {info.name}: found an importance of {list(count.shape)}, expected "
            f"{list(shapes[-1])}, one for each input"
        )


def requantized(checkpoint: Checkpoint, spec: ModelSpec, pure: bool = False) -> list[str]:
    """The types of matrices that are of few bits already: rounded again they lose again.

    pure: of `write_gguf`, where those that stay as they are without it are among them.
    """
    tensors = {source.tensor: checkpoint.tensors[source.tensor] for source in _matrix_sources(spec)}
    few = {tensor.dtype for tensor in tensors.values() if bits_per_weight(tensor) < _FULL_BITS}
    return sorted(few if pure else few - {KEPT})


def _matrix_sources(spec: ModelSpec) -> Iterator[Source]:
    for parts in (*spec.layers, spec.rest):
        for part, sources in parts.items():
            if PARTS[part].kind is Kind.MATRIX:
                yield from sources


def _gguf_segments(checkpoint: Checkpoint) -> dict[str, list[_Segment]]:
    """Of each tensor its rows as they are, expert by expert."""
    segments = {}
    for name, tensor in checkpoint.tensors.items():
        columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        flat = replace(tensor, shape=(prod(tensor.shape) // columns, columns)) if columns > 1 else tensor
        size = tensor.shape[-2] if len(tensor.shape) > 2 else flat.shape[0]
        starts = range(0, flat.shape[0], size)
        segments[name] = [_Segment(i, i + size, columns, flat.rows) for i in starts]
    return segments


def _hub_segments(checkpoint: Checkpoint, spec: ModelSpec, written: ModelSpec) -> dict[str, list[_Segment]]:
    """Of each tensor of the file, which rows of which parts of the model become its rows."""
    segments: dict[str, list[_Segment]] = {}
    made_from: dict[Any, list[_Piece]] = {}
    for own_parts, parts in zip((*spec.layers, spec.rest), (*written.layers, written.rest), strict=True):
        for part, targets in parts.items():
            own, begin = own_parts[part], 0
            ends = list(accumulate(source.outputs for source in own))
            for target in targets:
                pieces = _pieces(own, ends, begin, begin + target.outputs)
                begin += target.outputs
                rows = (target.input_range,) if target.transposed else target.ranges
                place = (target.tensor, target.stack, rows)
                if place in made_from:  # that two parts share, as one norm before both halves
                    if made_from[place] != pieces:
                        raise CheckpointError(
                            f"{checkpoint.path}: {part}: found a tensor of its own, "
                            f"{pieces[0].source.tensor}, which GGUF's {written.architecture} has no place for"
                        )
                    continue
                made_from[place] = pieces
                segments.setdefault(target.tensor, []).extend(_segments(checkpoint, pieces, target, rows))
    return segments


def _pieces(own: Sequence[Source], ends: Sequence[int], first: int, end: int) -> list[_Piece]:
    """What a part's outputs from first to end come from. ends: the output after each source's last."""
    pieces = []
    for index in range(bisect_right(ends, first), len(own)):
        begin = ends[index] - own[index].outputs
        if begin >= end:
            break
        pieces.append(_Piece(own[index], max(first, begin) - begin, min(end, ends[index]) - begin))
    return pieces


def _segments(
    checkpoint: Checkpoint, pieces: Sequence[_Piece], target: Source, ranges: Sequence[tuple[int, int]]
) -> Iterator[_Segment]:
    """The rows of a target's tensor, which come from these pieces. ranges: the rows."""
    skipped = target.stack[0] * target.shape[0] if target.stack is not None else 0
    as_columns = target.transposed or any(_is_read_whole(checkpoint, piece.source) for piece in pieces)
    unit, begin = max(_head_size(one) for one in (target, *(piece.source for piece in pieces))), 0
    for first, end in ranges:
        # From a row of the tensor to an output, or an input, of the part.
        shift = begin - first - skipped
        rows = partial(_converted_rows, checkpoint, pieces, target, shift)
        packed = partial(_packed_rows, checkpoint, pieces, shift)
        whole = end - first if as_columns else unit
        columns = target.shape[1] if len(target.shape) > 1 else 1
        yield _Segment(skipped + first, skipped + end, columns, rows, whole, packed)
        begin += end - first


def _is_read_whole(checkpoint: Checkpoint, source: Source) -> bool:
    """Whether a few outputs of it cannot be read without all others."""
    tensor = checkpoint.tensors[source.tensor]
    return source.transposed or (isinstance(tensor, QuantizedTensor) and tensor.by_columns)


def _head_size(source: Source) -> int:
    """Rows whose order depends on each other."""
    return source.outputs // source.paired_heads if source.paired_heads else 1


def _converted_rows(
    checkpoint: Checkpoint, pieces: Sequence[_Piece], target: Source, shift: int, first: int, end: int
) -> NDArray[np.float32]:
    """Rows of a tensor to write, which are outputs, or inputs, `[first + shift, end + shift)` of a part."""
    first, end = first + shift, end + shift
    if target.transposed:
        return _outputs(checkpoint, pieces, 0, target.outputs).T[first:end]
    rows = pair(_outputs(checkpoint, pieces, first, end), target)
    return rows - np.float32(target.add) if target.add else rows


def _outputs(checkpoint: Checkpoint, pieces: Sequence[_Piece], first: int, end: int) -> NDArray[np.float32]:
    """Outputs of a part, in the order in which the kernels have them."""
    found = []
    for source, start, stop, step in _rows_of(pieces, first, end):
        tensor = tensor_of(checkpoint, source)
        if source.transposed:
            found.append(plain_rows(tensor, source, *source.input_range).T[start:stop:step])
        else:
            found.append(plain_rows(tensor, source, start, stop))
    return np.concatenate(found)


def _packed_rows(
    checkpoint: Checkpoint, pieces: Sequence[_Piece], shift: int, first: int, end: int
) -> NDArray[np.uint8]:
    """The same in the blocks that they are in."""
    return np.concatenate(
        [
            tensor_of(checkpoint, source).quantized_rows(start, stop)[::step]
            for source, start, stop, step in _rows_of(pieces, first + shift, end + shift)
        ]
    )


def _rows_of(pieces: Sequence[_Piece], first: int, end: int) -> Iterator[tuple[Source, int, int, int]]:
    """Which rows of which tensors outputs come from: of each run the source, start, stop and step."""
    begin = 0
    for source, low, high in pieces:
        start, stop = max(first - begin, 0) + low, min(end - begin, high - low) + low
        begin += high - low
        skipped = 0
        for row, last in source.ranges:
            count = -(-(last - row) // source.step)
            own, own_end = max(start - skipped, 0), min(stop - skipped, count)
            skipped += count
            if own < own_end:
                yield source, row + own * source.step, row + (own_end - 1) * source.step + 1, source.step


def _jobs(
    checkpoint: Checkpoint, writer: GgufWriter, info: TensorInfo, segment: _Segment, counts: Importance
) -> Iterator[Callable[[], int]]:
    """Pieces of work that each give the bytes that they wrote."""
    columns = segment.columns
    step = max(1, PIECE_BYTES // (4 * columns) // segment.unit) * segment.unit
    own = checkpoint.tensors.get(info.name)
    copied = own if checkpoint.format == "gguf" and own is not None and own.dtype == info.dtype else None
    count = counts.get(info.name)
    if count is not None and count.ndim == 2:
        count = count[segment.first // info.shape[-2]]
    for first in range(segment.first, segment.end, step):
        end = min(first + step, segment.end)
        if copied is not None:
            yield partial(_copy, writer, info, copied, columns, first, end)
        elif info.dtype == KEPT and segment.packed is not None:
            yield partial(_copy_packed, writer, info, segment.packed, columns, first, end)
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


def _copy_packed(
    writer: GgufWriter, info: TensorInfo, packed: Packed, columns: int, first: int, end: int
) -> int:
    data = packed(first, end)
    writer.write(info.name, _place(info, columns, first), data)
    return data.nbytes


def _quantize(
    checkpoint: Checkpoint, writer: GgufWriter, info: TensorInfo, rows: Rows, columns: int, first: int,
    end: int, importance: NDArray[np.float32] | None,
) -> int:  # fmt: skip
    values = rows(first, end).reshape(-1, columns)
    data = quantized(f"{checkpoint.path}: tensor {info.name}", info.dtype, values, first, importance)
    writer.write(info.name, _place(info, columns, first), data)
    return data.nbytes
