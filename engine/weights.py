"""From a checkpoint's tensors to the one buffer that the kernels read.

Tensors are read a few rows at a time and go straight to their packed places, so loading never holds a second
copy of the weights.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import BLOCK_SIZES, Checkpoint, Tensor
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import ModelSpec, Source
from pagellm.engine.progress import progress
from pagellm.kernels import activation, transformer
from pagellm.kernels.attention import token_words
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
from pagellm.kernels.transformer import Architecture, Weights

# Bytes of float32 that one read may take: large enough to be quick, small beside any model.
_READ_BYTES = 8 << 20

_LAYER_PARTS = {
    "attention_norm": transformer.ATTENTION_NORM,
    "attention_norm_b": transformer.ATTENTION_NORM_B,
    "qkv": transformer.QKV,
    "qkv_b": transformer.QKV_B,
    "output": transformer.OUTPUT,
    "output_b": transformer.OUTPUT_B,
    "mlp_norm": transformer.MLP_NORM,
    "mlp_norm_b": transformer.MLP_NORM_B,
    "up": transformer.UP,
    "up_b": transformer.UP_B,
    "down": transformer.DOWN,
    "down_b": transformer.DOWN_B,
}
_REST_PARTS = {
    "embedding": transformer.EMBEDDING,
    "position_embedding": transformer.POSITION_EMBEDDING,
    "final_norm": transformer.FINAL_NORM,
    "final_norm_b": transformer.FINAL_NORM_B,
    "lm_head": transformer.LM_HEAD,
}
_ACTIVATIONS = {
    "silu_gated": activation.SILU_GATED,
    "gelu_tanh": activation.GELU_TANH,
    "gelu": activation.GELU,
    "relu": activation.RELU,
}
# Parts that a product multiplies by; vectors and tables that are only looked up stay float32.
_MATRICES = {"qkv", "output", "up", "down", "embedding", "lm_head"}
# The formats that hold a quantized type of a checkpoint without a change of value, and what is made of a part
# whose tensors have these types when nothing else is asked for.
_QUANTIZED = {"Q8_0": (INT8,), "Q4_0": (INT4, INT4_MIN), "Q4_1": (INT4_MIN,)}
_KEPT_FORMATS = {
    frozenset({"Q8_0"}): INT8,
    frozenset({"Q4_0"}): INT4,
    frozenset({"Q4_1"}): INT4_MIN,
    frozenset({"Q4_0", "Q4_1"}): INT4_MIN,
}


def architecture_of(spec: ModelSpec) -> Architecture:
    """The numbers of a model that the compiled step needs."""
    return Architecture(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        layer_norm=spec.layer_norm,
        norm_epsilon=spec.norm_epsilon,
        activation=_ACTIVATIONS[spec.activation],
        rotary=spec.rope_frequencies is not None,
        attention_scale=spec.attention_scale,
    )


def formats_of(checkpoint: Checkpoint, spec: ModelSpec, quantization: str) -> NDArray[np.int64]:
    """The table of formats of `kernels.transformer.Weights` for a `quantization` of `EngineConfig`."""
    formats = np.full((spec.num_layers + 1, transformer.LAYER_PARTS), FLOAT32, np.int64)
    for row, parts in enumerate((*spec.layers, spec.rest)):
        in_layer = row < spec.num_layers
        for name in _MATRICES & parts.keys():
            dtypes = {checkpoint.tensors[source.tensor].dtype for source in parts[name]}
            index = (_LAYER_PARTS if in_layer else _REST_PARTS)[name]
            formats[row, index] = _format_of(dtypes, quantization, in_layer)
    if spec.tied:
        formats[-1, transformer.LM_HEAD] = formats[-1, transformer.EMBEDDING]
    return formats


def converted_types(checkpoint: Checkpoint, spec: ModelSpec, formats: NDArray[np.int64]) -> list[str]:
    """The quantized types of matrices that become float32, because no format of the kernels holds them."""
    types = set()
    for row, parts in enumerate((*spec.layers, spec.rest)):
        indices = _LAYER_PARTS if row < spec.num_layers else _REST_PARTS
        for name in _MATRICES & parts.keys():
            if formats[row, indices[name]] == FLOAT32:
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


def kv_format(formats: NDArray[np.int64]) -> int:
    """Of the KV cache: bfloat16 where the weights are rounded, too."""
    return FLOAT32 if (formats == FLOAT32).all() else BFLOAT16


def kv_bytes_per_token(spec: ModelSpec, formats: NDArray[np.int64]) -> int:
    """Bytes of keys and values that one token of context takes in all layers."""
    words = token_words(kv_format(formats), spec.head_dim)
    return spec.num_layers * spec.num_kv_heads * words * 4


def load_weights(
    checkpoint: Checkpoint, spec: ModelSpec, formats: NDArray[np.int64], max_model_len: int, show: bool
) -> Weights:
    """Reads and packs all weights; raises `CheckpointError` if a tensor cannot be read."""
    offsets, size = transformer.lay_out(architecture_of(spec), formats, spec.max_positions, spec.tied)
    values = aligned_zeros(size)
    total = sum(
        int(np.prod(source.shape))
        for parts in (*spec.layers, spec.rest)
        for sources in parts.values()
        for source in sources
    )
    with progress("Loading weights", total * 4, "bytes", show) as advance:
        for row, parts in enumerate((*spec.layers, spec.rest)):
            indices = _LAYER_PARTS if row < spec.num_layers else _REST_PARTS
            for name, sources in parts.items():
                column = 0
                for source in sources:
                    tensor = checkpoint.tensors[source.tensor]
                    start, format = int(offsets[row, indices[name]]), int(formats[row, indices[name]])
                    if name in _MATRICES:
                        _load_matrix(tensor, source, format, values, start, column)
                    else:
                        _load_plain(tensor, source, values, start + column)
                    column += source.shape[1 if source.transposed else 0]
                    if name in ("up", "up_b"):
                        column = padded(column)  # the gate and the linear half each begin on a panel
                    advance(4 * int(np.prod(source.shape)))
    cos, sin = _rotary_tables(spec.rope_frequencies, max_model_len)
    return Weights(values=values, offsets=offsets, formats=formats, cos=cos, sin=sin)


def _load_matrix(
    tensor: Tensor, source: Source, format: int, values: NDArray[np.float32], start: int, column: int
) -> None:
    """Puts one matrix into its part at `values[start:]`, as output columns from `column` on."""
    K = source.shape[0 if source.transposed else 1]
    head_dim = source.shape[0] // source.paired_heads if source.paired_heads else 1
    unit = BLOCK if source.transposed else head_dim  # rows that belong together
    step = max(1, _READ_BYTES // (4 * source.shape[1]) // unit) * unit
    for first in range(0, source.shape[0], step):
        last = min(first + step, source.shape[0])
        if tensor.dtype in _QUANTIZED and format in _QUANTIZED[tensor.dtype] and not source.transposed:
            raw = _unpair(tensor.quantized_rows(first, last), source, head_dim)
            words, halves = from_gguf(tensor.dtype, format, raw)
        else:
            rows = _unpair(tensor.rows(first, last), source, head_dim)
            words, halves = encode(format, rows.T if source.transposed else rows)
        if not np.isfinite(halves.view(np.float16)).all():
            raise CheckpointError(
                f"{tensor.file.path}: tensor {tensor.name} has a block whose scale or minimum is no finite "
                f"float16, in rows {first} to {last - 1}"
            )
        first_column, first_block = (column, first // BLOCK) if source.transposed else (column + first, 0)
        pack_blocks(words, halves, first_column, first_block, num_blocks(K), values.view(np.uint32), start)


def _load_plain(tensor: Tensor, source: Source, values: NDArray[np.float32], start: int) -> None:
    """Puts a vector, or a table that is only looked up, at `values[start:]` as it is."""
    width = source.shape[1] if len(source.shape) == 2 else 1
    head_dim = source.shape[0] // source.paired_heads if source.paired_heads else 1
    step = max(1, _READ_BYTES // (4 * width) // head_dim) * head_dim
    for first in range(0, source.shape[0], step):
        rows = _unpair(tensor.rows(first, min(first + step, source.shape[0])), source, head_dim)
        values[start + first * width : start + first * width + rows.size] = rows.reshape(-1)


def _unpair(rows: NDArray[Any], source: Source, head_dim: int) -> NDArray[Any]:
    """Rows of whole heads, stored as rotary pairs, in the half-split order that the kernels rotate."""
    if not source.paired_heads:
        return rows
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.size // len(rows))
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _rotary_tables(
    frequencies: tuple[float, ...] | None, max_model_len: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of position * frequency, [max_model_len, rotary_dim / 2] each."""
    if frequencies is None:
        empty = np.zeros((1, 1), np.float32)
        return empty, empty
    angles = np.outer(np.arange(max_model_len, dtype=np.float64), np.asarray(frequencies))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
