"""From a checkpoint's tensors to the one buffer that the kernels read.

Tensors are read a few rows at a time and go straight to their packed places, so loading never holds a second
copy of the weights.
"""

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints import Checkpoint, Tensor
from engine.models import ModelSpec, Source
from engine.progress import progress
from kernels import activation, transformer
from kernels.packing import pack_columns, pack_inputs, padded
from kernels.transformer import Architecture, Weights

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
# A table that is only looked up: its rows stay as they are, like vectors.
_PLAIN_PARTS = ("position_embedding",)


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


def load_weights(checkpoint: Checkpoint, spec: ModelSpec, max_model_len: int, show: bool) -> Weights:
    """Reads and packs all weights; raises `CheckpointError` if a tensor cannot be read."""
    offsets, size = transformer.lay_out(architecture_of(spec), spec.max_positions, spec.tied)
    values = np.zeros(size, np.float32)
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
                    start = int(offsets[row, indices[name]])
                    _load(tensor, source, values, start, column, plain=name in _PLAIN_PARTS)
                    column += source.shape[1 if source.transposed else 0]
                    if name in ("up", "up_b"):
                        column = padded(column)  # the gate and the linear half each begin on a panel
                    advance(4 * int(np.prod(source.shape)))
    cos, sin = _rotary_tables(spec.rope_frequencies, max_model_len)
    return Weights(values=values, offsets=offsets, cos=cos, sin=sin)


def _load(
    tensor: Tensor, source: Source, values: NDArray[np.float32], start: int, column: int, plain: bool
) -> None:
    """Puts one tensor into its part at `values[start:]`, as output columns from `column` on."""
    width = source.shape[1] if len(source.shape) == 2 else 1
    head_dim = source.shape[0] // source.paired_heads if source.paired_heads else 1
    step = max(1, _READ_BYTES // (4 * width) // head_dim) * head_dim
    for first in range(0, source.shape[0], step):
        rows = tensor.rows(first, min(first + step, source.shape[0]))
        if source.paired_heads:
            rows = _unpair(rows, head_dim)
        if len(source.shape) == 1 or plain:
            begin = start + (column + first) * width
            values[begin : begin + rows.size] = rows.reshape(-1)
        elif source.transposed:
            pack_inputs(rows, first, source.shape[0], values, start)
        else:
            pack_columns(rows, column + first, values, start)


def _unpair(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of whole heads, stored as rotary pairs, in the half-split order that the kernels rotate."""
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
