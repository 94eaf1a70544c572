"""From a checkpoint's tensors to the one buffer that the kernels read.

Tensors are read a few rows at a time and go straight to their packed places, so loading never holds a second
copy of the weights.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import BLOCK_SIZES, Checkpoint, Tensor, bits_per_weight
from pagellm.engine.checkpoints.quantized import QuantizedTensor
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import ModelSpec, Source
from pagellm.engine.models.rope import RopeTable
from pagellm.engine.progress import progress
from pagellm.kernels.architecture import (
    PARTS,
    Architecture,
    Formats,
    Kind,
    Part,
    Run,
    Weights,
    cached_value_dim,
    lay_out,
)
from pagellm.kernels.encoding import GGUF_FORMATS, LEVEL_FORMATS, encode, from_gguf, from_levels
from pagellm.kernels.kv_cache import token_words
from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    FLOAT32,
    INT4_MIN,
    INT8,
    LAYOUTS,
    PANEL,
    Blocks,
    aligned_zeros,
    has_float_scales,
    pack_blocks,
    padded,
)

# Bytes that one piece of work may take beside the weights: large enough to be quick, small beside any model.
_READ_BYTES = 8 << 20

# What the formats are called in reports.
FORMAT_NAMES = {format: layout.name for format, layout in enumerate(LAYOUTS)}

# Matrices whose inputs may have an order of their own.
_ORDERED_PARTS = ("qkv", "query_up", "output", "up", "down", "lm_head")


def is_kept(dtype: str, format: int) -> bool:
    """Whether a format holds a checkpoint's type as it is, without conversion."""
    if dtype in LEVEL_FORMATS:
        return format in LEVEL_FORMATS[dtype]
    return ({"F32": FLOAT32, "BF16": BFLOAT16} | GGUF_FORMATS).get(dtype) == format


def _kept_format(tensor: Tensor) -> int:
    """The format that holds a matrix as it is; FLOAT32 where none does."""
    if not isinstance(tensor, QuantizedTensor):
        return GGUF_FORMATS.get(tensor.dtype, FLOAT32)
    for format in LEVEL_FORMATS[tensor.dtype] if tensor.is_kept else ():
        inputs = LAYOUTS[format].span * BLOCK
        if tensor.group_size % inputs == 0 or tensor.group_size == tensor.shape[1]:
            return format
    return FLOAT32


def formats_of(checkpoint: Checkpoint, spec: ModelSpec, quantization: str) -> Formats:
    """The formats of all matrices for a `quantization` of `EngineConfig`."""
    formats = []
    for row, parts in zip((*spec.arch.layers, None), (*spec.layers, spec.rest), strict=True):
        by_part = {}
        for name, sources in parts.items():
            if PARTS[name].kind is Kind.MATRIX:
                in_layer = row is not None
                by_source = [_format_of(checkpoint, source, quantization, in_layer) for source in sources]
                if name == "router":  # a rounded logit would choose another expert
                    by_source = [FLOAT32] * len(sources)
                runs = _runs(PARTS[name], row, sources, by_source)
                by_part[name] = _in_order(checkpoint, name, sources, runs)
        formats.append(by_part)
    return formats


def converted_types(checkpoint: Checkpoint, spec: ModelSpec, formats: Formats) -> dict[str, float]:
    """The quantized types of matrices that become float32, and their bits a weight.

    That is, because no format of the kernels holds them, or none that fits the matrices beside them.
    """
    types = {}
    for parts, by_part in zip((*spec.layers, spec.rest), formats, strict=True):
        for name, runs in by_part.items():
            if runs[0].format == FLOAT32:
                for source in parts[name]:
                    tensor = checkpoint.tensors[source.tensor]
                    if tensor.dtype not in BLOCK_SIZES or BLOCK_SIZES[tensor.dtype][0] > 1:
                        types[tensor.dtype] = bits_per_weight(tensor)
    return dict(sorted(types.items()))


def _format_of(checkpoint: Checkpoint, source: Source, quantization: str, in_layer: bool) -> int:
    """The format of the output columns that come from one tensor."""
    kept = _kept_format(tensor_of(checkpoint, source))
    if source.transposed or source.add:
        kept = FLOAT32
    if quantization == "auto":
        return kept
    if quantization == "int4":
        # Four bits are too few for the embedding and for the logits: llama.cpp keeps more for them, too.
        most = 4 if in_layer else 8
        layout = LAYOUTS[kept]
        if layout.low_bits + layout.high_bits <= most and layout.inputs == INT8:
            return kept
        return INT4_MIN if in_layer else INT8
    return {"none": FLOAT32, "bf16": BFLOAT16, "int8": INT8}[quantization]


def _runs(part: Part, row: Any, sources: tuple[Source, ...], formats: list[int]) -> tuple[Run, ...]:
    """The formats of a part that is stacked from these sources.

    Its panels share their activations, and a panel has one format: where that cannot be, all is float32.
    """
    pieces = part.pieces(row)
    columns = [padded(source.outputs) if pieces > 1 else source.outputs for source in sources]
    mixes = all(LAYOUTS[format].inputs == INT8 for format in formats)
    if len(set(formats)) > 1 and (not mixes or any(size % PANEL for size in columns[:-1])):
        formats = [FLOAT32] * len(formats)
    if len(set(formats)) == 1:
        return (Run(sum(columns), formats[0]),)
    return tuple(Run(*run) for run in zip(columns, formats, strict=True))


def _in_order(
    checkpoint: Checkpoint, name: str, sources: tuple[Source, ...], runs: tuple[Run, ...]
) -> tuple[Run, ...]:
    """The runs, with an order of inputs where matrices that are kept as they are have one.

    All of a part share their activations: where their orders differ, all is float32.
    """
    orders = []
    for index, source in enumerate(sources):
        tensor, run = tensor_of(checkpoint, source), runs[index if len(runs) > 1 else 0]
        orders.append(
            tensor.order()
            if isinstance(tensor, QuantizedTensor) and is_kept(tensor.dtype, run.format)
            else None
        )
    if all(order is None for order in orders):
        return runs
    first = orders[0]
    same = all(order is not None and first is not None and np.array_equal(order, first) for order in orders)
    if name in _ORDERED_PARTS and same:
        return tuple(run._replace(ordered=True) for run in runs)
    return (Run(sum(run.columns for run in runs), FLOAT32),)


def kv_format(formats: Formats) -> int:
    """Of the KV cache: bfloat16 where the weights are rounded, too."""
    exact = all(run.format == FLOAT32 for by_part in formats for runs in by_part.values() for run in runs)
    return FLOAT32 if exact else BFLOAT16


def kv_bytes_per_token(arch: Architecture, format: int) -> int:
    """Bytes of keys and values that one token of context takes in all layers of a cache of this format."""
    return sum(
        4 * int(row["num_kv_heads"]) * token_words(format, int(row["head_dim"]), int(cached_value_dim(row)))
        for row in arch.layers
    )


def load_weights(
    checkpoint: Checkpoint, spec: ModelSpec, formats: Formats, max_model_len: int, show: bool
) -> Weights:
    """Reads and packs all weights; raises `CheckpointError` if a tensor cannot be read."""
    layers, rest, panels, size = lay_out(spec.arch, formats)
    values = aligned_zeros(size)
    total = sum(
        source.size for parts in (*spec.layers, spec.rest) for sources in parts.values() for source in sources
    )
    with progress("Loading weights", total * 4, "bytes", show) as advance:
        rows = zip((*spec.arch.layers, None), (*spec.layers, spec.rest), (*layers, *rest), strict=True)
        for row, parts, places in rows:
            for name, sources in parts.items():
                part, column = PARTS[name], 0
                start, _, first_panel, order = places[name].tolist()
                if order >= 0:
                    _load_order(checkpoint.tensors[sources[0].tensor], order, values)
                for source in sources:
                    tensor = tensor_of(checkpoint, source)
                    if part.kind is Kind.MATRIX:
                        first, format = panels[first_panel + column // PANEL].tolist()
                        _load_matrix(tensor, source, first, format, values, column % PANEL)
                    else:
                        _load_plain(tensor, source, values, start + column)
                    column += source.outputs
                    if part.pieces(row) > 1:
                        column = padded(column)
                    advance(4 * source.size)
    cos, sin, halves = _rotary_tables(spec.rope_tables, max_model_len)
    query_scale = _query_scales(spec.rope_tables, max_model_len)
    return Weights(values, layers, rest, panels, cos, sin, halves, query_scale)


def _load_matrix(
    tensor: Tensor, source: Source, start: int, format: int, values: NDArray[np.float32], column: int
) -> None:
    """Puts one matrix into the panels at `values[start:]`, as output columns from `column` on."""
    for first, last, offset in _chunks(source):
        as_it_is = is_kept(tensor.dtype, format) and not source.transposed and source.add == 0.0
        if as_it_is and isinstance(tensor, QuantizedTensor):
            blocks = _kept_blocks(tensor, source, first, last, format)
        elif as_it_is and tensor.dtype in GGUF_FORMATS:
            blocks = from_gguf(
                tensor.dtype, _unpair(tensor.quantized_rows(first, last)[:: source.step], source)
            )
        elif source.transposed:
            [(begin, end)] = source.ranges
            blocks = encode(format, plain_rows(tensor, source, first, last).T[begin : end : source.step])
        else:
            blocks = encode(format, plain_rows(tensor, source, first, last))
        halves = blocks.halves.view(np.float32 if has_float_scales(format) else np.float16)
        if not np.isfinite(halves).all():
            raise CheckpointError(
                f"{tensor.file.path}: tensor {tensor.name} has a block whose scale or minimum is no finite "
                f"float16, in rows {first} to {last - 1}"
            )
        first_column, first_block = (column, offset // BLOCK) if source.transposed else (column + offset, 0)
        pack_blocks(
            format, *blocks, first_column, first_block, source.inputs or 1, values.view(np.uint32), start
        )


def _kept_blocks(tensor: QuantizedTensor, source: Source, first: int, last: int, format: int) -> Blocks:
    """Rows of a matrix of levels as they are, their inputs in the order of their groups."""
    levels, scales, zeros = tensor.pieces(first, last)
    order = tensor.order()
    if order is not None:
        levels = levels[:, order]
    words, bytes, halves = from_levels(format, levels, scales, zeros, tensor.group_size)
    return Blocks(
        _unpair(words, source), _unpair(bytes, source) if bytes.size else bytes, _unpair(halves, source)
    )


def _load_order(tensor: Tensor, start: int, values: NDArray[np.float32]) -> None:
    """Puts the order of a matrix's inputs at `values[start:]`."""
    assert isinstance(tensor, QuantizedTensor)
    order = tensor.order()
    assert order is not None
    values.view(np.int32)[start : start + len(order)] = order


def _load_plain(tensor: Tensor, source: Source, values: NDArray[np.float32], start: int) -> None:
    """Puts a vector, or a table that is only looked up, at `values[start:]` as it is."""
    width = source.inputs or 1
    for first, last, offset in _chunks(source):
        rows = plain_rows(tensor, source, first, last)
        values[start + offset * width : start + offset * width + rows.size] = rows.reshape(-1)


def _chunks(source: Source) -> Iterator[tuple[int, int, int]]:
    """Rows of the tensor, first and end, that are read at a time, and the output that the first becomes.

    Of a transposed tensor rows are inputs, which all outputs have: it is the input.
    """
    ranges = (source.input_range,) if source.transposed else source.ranges
    width = source.shape[1] if len(source.shape) == 2 else 1
    head_dim = source.outputs // source.paired_heads if source.paired_heads else 1
    every = 1 if source.transposed else source.step
    unit = BLOCK if source.transposed else max(head_dim, every)  # rows that belong together
    step = max(1, _READ_BYTES // (4 * width) // unit) * unit
    offset = 0
    for begin, end in ranges:
        for first in range(begin, end, step):
            last = min(first + step, end)
            yield first, last, offset + (first - begin) // every
        offset += -(-(end - begin) // every)


def tensor_of(checkpoint: Checkpoint, source: Source) -> Tensor:
    """The tensor of a source in the shape that the source says, one of several where they are stacked."""
    tensor = checkpoint.tensors[source.tensor]
    if tensor.shape != source.shape:
        tensor = tensor.part(source.shape, source.stack[0] if source.stack else 0)
    return tensor


def plain_rows(tensor: Tensor, source: Source, first: int, last: int) -> NDArray[np.float32]:
    """Rows of a tensor in float32, in the order and with the summand that the source says."""
    rows = tensor.rows(first, last)
    rows = _unpair(rows if source.transposed else rows[:: source.step], source)
    with np.errstate(invalid="ignore"):  # what is no number, of a damaged file, stays none
        return rows + np.float32(source.add) if source.add else rows


def _unpair(rows: NDArray[Any], source: Source) -> NDArray[Any]:
    """Rows of whole heads with each rotated part in half-split order, if the source has rotary pairs."""
    return _by_head(rows, source, _half_split(source)) if source.paired_heads else rows


def pair(rows: NDArray[Any], source: Source) -> NDArray[Any]:
    """Rows of whole heads in half-split order, as the source stores them: the reverse of `_unpair`."""
    return _by_head(rows, source, np.argsort(_half_split(source))) if source.paired_heads else rows


def _half_split(source: Source) -> NDArray[np.intp]:
    """The dimensions of a head that the source stores, in half-split order."""
    order = np.arange(source.outputs // source.paired_heads)
    rotated = order[source.rotary_start :][: source.rotary_dim or None]
    rotated[:] = rotated.reshape(-1, 2).T.reshape(-1)
    return order


def _by_head(rows: NDArray[Any], source: Source, order: NDArray[np.intp]) -> NDArray[Any]:
    """Rows of whole heads, those of each head in an order."""
    heads = rows.reshape(-1, len(order), rows.size // len(rows))
    return heads[:, order].reshape(rows.shape)


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
