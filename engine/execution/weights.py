"""From a checkpoint's tensors to the one buffer that the kernels read.

Tensors are read a few rows at a time and go straight to their packed places, so loading never holds a second
copy of the weights.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import BLOCK_SIZES, Checkpoint, Tensor
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import ModelSpec, Source
from pagellm.engine.models.rope import RopeTable
from pagellm.engine.progress import progress
from pagellm.kernels.architecture import PARTS, Architecture, Formats, Kind, Weights, lay_out
from pagellm.kernels.kv_cache import token_words
from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    FLOAT32,
    INT4,
    INT4_MIN,
    INT8,
    aligned_zeros,
    encode,
    from_gguf,
    num_blocks,
    pack_blocks,
    padded,
)

# Bytes that one piece of work may take beside the weights: large enough to be quick, small beside any model.
_READ_BYTES = 8 << 20

# The formats that hold a quantized type of a checkpoint without a change of value, and what is made of a part
# whose tensors have these types when nothing else is asked for.
_QUANTIZED = {"Q8_0": (INT8,), "Q4_0": (INT4, INT4_MIN), "Q4_1": (INT4_MIN,)}
_KEPT_FORMATS = {
    frozenset({"Q8_0"}): INT8,
    frozenset({"Q4_0"}): INT4,
    frozenset({"Q4_1"}): INT4_MIN,
    frozenset({"Q4_0", "Q4_1"}): INT4_MIN,
}

# What the formats are called in reports.
FORMAT_NAMES = {
    FLOAT32: "float32",
    BFLOAT16: "bfloat16",
    INT8: "int8",
    INT4: "int4",
    INT4_MIN: "int4 with minimum",
}


def is_kept(dtype: str, format: int) -> bool:
    """Whether a format holds a checkpoint's type as it is, without conversion."""
    return format in _QUANTIZED.get(dtype, {"F32": (FLOAT32,), "BF16": (BFLOAT16,)}.get(dtype, ()))


def formats_of(checkpoint: Checkpoint, spec: ModelSpec, quantization: str) -> Formats:
    """The formats of all matrices for a `quantization` of `EngineConfig`."""
    formats = []
    for index, parts in enumerate((*spec.layers, spec.rest)):
        by_part = {}
        for name, sources in parts.items():
            if PARTS[name].kind is Kind.MATRIX:
                dtypes = {checkpoint.tensors[source.tensor].dtype for source in sources}
                by_part[name] = _format_of(dtypes, quantization, in_layer=index < len(spec.layers))
        formats.append(by_part)
    return formats


def converted_types(checkpoint: Checkpoint, spec: ModelSpec, formats: Formats) -> list[str]:
    """The quantized types of matrices that become float32, because no format of the kernels holds them."""
    types = set()
    for parts, by_part in zip((*spec.layers, spec.rest), formats, strict=True):
        for name, format in by_part.items():
            if format == FLOAT32:
                types |= {checkpoint.tensors[source.tensor].dtype for source in parts[name]}
    return sorted(dtype for dtype in types if BLOCK_SIZES[dtype][0] > 1)


def _format_of(dtypes: set[str], quantization: str, in_layer: bool) -> int:
    """The format of a matrix that is stacked from tensors of these types."""
    kept = _KEPT_FORMATS.get(frozenset(dtypes), FLOAT32)
    if quantization == "auto":
        return kept
    if quantization == "int4":
        if kept in (INT4, INT4_MIN):
            return kept
        # Four bits are too few for the embedding and for the logits: llama.cpp keeps more for them, too.
        return INT4_MIN if in_layer else INT8
    return {"none": FLOAT32, "bf16": BFLOAT16, "int8": INT8}[quantization]


def kv_format(formats: Formats) -> int:
    """Of the KV cache: bfloat16 where the weights are rounded, too."""
    exact = all(format == FLOAT32 for by_part in formats for format in by_part.values())
    return FLOAT32 if exact else BFLOAT16


def kv_bytes_per_token(arch: Architecture, format: int) -> int:
    """Bytes of keys and values that one token of context takes in all layers of a cache of this format."""
    return sum(
        4 * int(row["num_kv_heads"]) * token_words(format, int(row["head_dim"])) for row in arch.layers
    )


def load_weights(
    checkpoint: Checkpoint, spec: ModelSpec, formats: Formats, max_model_len: int, show: bool
) -> Weights:
    """Reads and packs all weights; raises `CheckpointError` if a tensor cannot be read."""
    layers, rest, size = lay_out(spec.arch, formats)
    values = aligned_zeros(size)
    total = sum(
        source.size for parts in (*spec.layers, spec.rest) for sources in parts.values() for source in sources
    )
    with progress("Loading weights", total * 4, "bytes", show) as advance:
        rows = zip((*spec.arch.layers, None), (*spec.layers, spec.rest), (*layers, *rest), strict=True)
        for row, parts, places in rows:
            for name, sources in parts.items():
                part, column = PARTS[name], 0
                start, format = places[name].tolist()
                for source in sources:
                    tensor = checkpoint.tensors[source.tensor]
                    if part.kind is Kind.MATRIX:
                        _load_matrix(tensor, source, format, values, start, column)
                    else:
                        _load_plain(tensor, source, values, start + column)
                    column += source.outputs
                    if part.pieces(row) > 1:
                        column = padded(column)
                    advance(4 * source.size)
    cos, sin, halves = _rotary_tables(spec.rope_tables, max_model_len)
    query_scale = _query_scales(spec.rope_tables, max_model_len)
    return Weights(values, layers, rest, cos, sin, halves, query_scale)


def _load_matrix(
    tensor: Tensor, source: Source, format: int, values: NDArray[np.float32], start: int, column: int
) -> None:
    """Puts one matrix into its part at `values[start:]`, as output columns from `column` on."""
    blocks = num_blocks(source.inputs or 1)
    for first, last, offset in _chunks(source):
        kept = tensor.dtype in _QUANTIZED and format in _QUANTIZED[tensor.dtype]
        if kept and not source.transposed and source.add == 0.0:
            raw = _unpair(tensor.quantized_rows(first, last), source)
            words, halves = from_gguf(tensor.dtype, format, raw)
        elif source.transposed:
            [(begin, end)] = source.ranges
            words, halves = encode(format, _plain_rows(tensor, source, first, last).T[begin:end])
        else:
            words, halves = encode(format, _plain_rows(tensor, source, first, last))
        if not np.isfinite(halves.view(np.float16)).all():
            raise CheckpointError(
                f"{tensor.file.path}: tensor {tensor.name} has a block whose scale or minimum is no finite "
                f"float16, in rows {first} to {last - 1}"
            )
        first_column, first_block = (column, first // BLOCK) if source.transposed else (column + offset, 0)
        pack_blocks(words, halves, first_column, first_block, blocks, values.view(np.uint32), start)


def _load_plain(tensor: Tensor, source: Source, values: NDArray[np.float32], start: int) -> None:
    """Puts a vector, or a table that is only looked up, at `values[start:]` as it is."""
    width = source.inputs or 1
    for first, last, offset in _chunks(source):
        rows = _plain_rows(tensor, source, first, last)
        values[start + offset * width : start + offset * width + rows.size] = rows.reshape(-1)


def _chunks(source: Source) -> Iterator[tuple[int, int, int]]:
    """Rows of the tensor, first and end, that are read at a time, and the output that the first becomes.

    A transposed tensor is read whole, some of its inputs at a time: then the output is 0.
    """
    ranges = ((0, source.shape[0]),) if source.transposed else source.ranges
    width = source.shape[1] if len(source.shape) == 2 else 1
    head_dim = source.outputs // source.paired_heads if source.paired_heads else 1
    unit = BLOCK if source.transposed else head_dim  # rows that belong together
    step = max(1, _READ_BYTES // (4 * width) // unit) * unit
    offset = 0
    for begin, end in ranges:
        for first in range(begin, end, step):
            last = min(first + step, end)
            yield first, last, 0 if source.transposed else offset + first - begin
        offset += end - begin


def _plain_rows(tensor: Tensor, source: Source, first: int, last: int) -> NDArray[np.float32]:
    """Rows in float32, in the order and with the summand that the source says."""
    rows = _unpair(tensor.rows(first, last), source)
    return rows + np.float32(source.add) if source.add else rows


def _unpair(rows: NDArray[Any], source: Source) -> NDArray[Any]:
    """Rows of whole heads, stored as rotary pairs, in the half-split order that the kernels rotate."""
    if not source.paired_heads:
        return rows
    head_dim = source.outputs // source.paired_heads
    rotary_dim = source.rotary_dim or head_dim
    heads = rows.reshape(-1, head_dim, rows.size // len(rows))
    pairs = heads[:, :rotary_dim].reshape(len(heads), rotary_dim // 2, 2, -1)
    halves = pairs.swapaxes(1, 2).reshape(len(heads), rotary_dim, -1)
    return np.concatenate([halves, heads[:, rotary_dim:]], axis=1).reshape(rows.shape)


def _rotary_tables(
    tables: tuple[RopeTable, ...], max_model_len: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """`Weights.cos`, `sin` and `rope_halves`."""
    halves = np.array([len(table.frequencies) for table in tables], np.int64)
    shape = (len(tables), max_model_len, max(halves, default=0))
    cos, sin = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for index, table in enumerate(tables):
        half, factor = len(table.frequencies), table.attention_factor
        step = max(1, _READ_BYTES // (8 * max(1, half)))
        for first in range(0, max_model_len, step):
            rows = np.arange(first, min(first + step, max_model_len), dtype=np.float64)
            angles = np.outer(rows, np.asarray(table.frequencies))
            cos[index, first : first + step, :half] = np.cos(angles) * factor
            sin[index, first : first + step, :half] = np.sin(angles) * factor
    return cos, sin, halves


def _query_scales(tables: tuple[RopeTable, ...], max_model_len: int) -> NDArray[np.float32]:
    """`Weights.query_scale`."""
    scales = np.ones((len(tables), max_model_len), np.float32)
    for index, table in enumerate(tables):
        if table.query_scale is not None:
            beta, original = table.query_scale
            scales[index] = 1 + beta * np.log1p(np.arange(max_model_len) // original)
    return scales
