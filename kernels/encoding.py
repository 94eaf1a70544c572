"""Blocks of weights in the formats of kernels.packing, from floats and from GGUF's quantized types, in NumPy.

Nothing that a GGUF file says is rounded: its levels, scales and minima are only put in other places. What the
types mean is defined by https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    FLOAT4,
    FLOAT8,
    FLOAT32,
    FP4,
    INT2,
    INT2_K,
    INT3_K,
    INT4,
    INT4_K,
    INT4_MIN,
    INT4_ZERO,
    INT4_ZERO_32,
    INT5,
    INT5_K,
    INT5_MIN,
    INT6_K,
    INT8,
    INT8_127,
    INT8_ROW,
    LAYOUTS,
    NF4,
    TABLE4,
    TABLE4_K,
    Blocks,
)
from pagellm.kernels.simd import INT8_OFFSET

Bytes = NDArray[np.uint8]

# The format that holds a quantized type of GGUF without a change of value.
GGUF_FORMATS = {
    "Q8_0": INT8,
    "Q4_0": INT4,
    "Q4_1": INT4_MIN,
    "Q5_0": INT5,
    "Q5_1": INT5_MIN,
    "Q2_K": INT2_K,
    "Q3_K": INT3_K,
    "Q4_K": INT4_K,
    "Q5_K": INT5_K,
    "Q6_K": INT6_K,
    "IQ4_NL": TABLE4,
    "IQ4_XS": TABLE4_K,
    "TQ1_0": INT2,
    "TQ2_0": INT2,
    "MXFP4": FLOAT4,
}

# Those that hold levels of a quantizer's directory, by what they stand for (`engine.checkpoints.quantized`);
# of several the first one whose spans are no longer than a group.
LEVEL_FORMATS = {
    "INT4": (INT4,),
    "INT4_ZERO": (INT4_ZERO, INT4_ZERO_32),
    "INT8": (INT8_ROW,),
    "INT8_127": (INT8_127,),
    "E4M3": (FLOAT8,),
    "NF4": (NF4,),
    "FP4": (FP4,),
}


def bits_per_weight(format: int) -> float:
    """What a weight takes in memory in this format, scales and minima included."""
    layout = LAYOUTS[format]
    block = 32 * (layout.low_bits + layout.high_bits) + 8 * layout.num_bytes
    return (block + 16 * layout.num_halves / layout.span) / BLOCK


@np.errstate(divide="ignore", over="ignore", invalid="ignore")
def encode(format: int, weights: NDArray[np.float32]) -> Blocks:
    """Weight rows [N, K] as blocks of a format, each value rounded to the nearest that the format has.

    INT8 and INT4 scale a block by its greatest magnitude, INT4_MIN spreads it from its least to its greatest
    value, as GGUF's Q8_0, Q4_0 and Q4_1 do. A block that float16 cannot scale gets an infinite scale.
    """
    N, K = weights.shape
    if K % BLOCK:
        weights = np.pad(weights, ((0, 0), (0, -K % BLOCK)))
    blocks = np.ascontiguousarray(weights, np.float32).reshape(N, -1, BLOCK)
    none = np.zeros((*blocks.shape[:2], 0), np.uint8)
    if format == FLOAT32:
        return Blocks(blocks.view(np.uint32), none, none.view(np.uint16))
    if format == BFLOAT16:
        bits = blocks.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        shorts = np.where(np.isnan(blocks), 0x7FC0, rounded).astype(np.uint16)
        return Blocks(shorts.view(np.uint32), none, none.view(np.uint16))
    if format == INT4_MIN:
        least = blocks.min(axis=2).astype(np.float16)
        scale = ((blocks.max(axis=2) - least) / 15).astype(np.float16)
        halves = np.stack([scale, least], axis=2).view(np.uint16)
        shifted, offset, highest = blocks - least[..., None].astype(np.float32), 0, 15
    elif format == INT4:
        # The value of greatest magnitude becomes -8 exactly, whatever its sign.
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
        scale = (extreme[..., 0] / -8).astype(np.float16)
        halves = scale[..., None].view(np.uint16)
        shifted, offset, highest = blocks, 8, 15
    else:
        scale = (np.abs(blocks).max(axis=2) / 127).astype(np.float16)
        halves = scale[..., None].view(np.uint16)
        shifted, offset, highest = blocks, 128, 255
    inverse = np.where(scale == 0, np.float32(0), 1 / scale.astype(np.float32))
    levels = np.rint(shifted * inverse[..., None]) + np.float32(offset)
    return Blocks(_planes(format, levels.clip(0, highest).astype(np.uint8)), none, halves)


def _planes(format: int, levels: Bytes) -> NDArray[np.uint32]:
    """The words [N, blocks, words] that hold levels [N, blocks, BLOCK]."""
    layout = LAYOUTS[format]
    if format in (INT8, INT8_ROW):
        return (levels ^ np.uint8(128 ^ INT8_OFFSET)).view(np.uint32)
    planes = [_plane(layout.low_bits, levels & np.uint8((1 << layout.low_bits) - 1))]
    if layout.high_bits:
        planes.append(_plane(layout.high_bits, levels >> np.uint8(layout.low_bits)))
    return np.concatenate(planes, axis=2).view(np.uint32)


def _plane(num_bits: int, levels: Bytes) -> Bytes:
    """The bytes [N, blocks, 4 * num_bits] of a plane: word i % num_bits holds what input word i has."""
    parts = np.split(levels, 8 // num_bits, axis=2)
    plane = parts[0].copy()
    for i, part in enumerate(parts[1:], 1):
        plane |= part << np.uint8(i * num_bits)
    return plane


def _shifted(bytes: Bytes, num_bits: int, run: int) -> Bytes:
    """The fields of `num_bits` bits, lowest first, of bytes [..., size], `run` bytes at a time: [..., more].

    All lowest fields of a run come first, then its next ones: GGUF's way of storing levels.
    """
    runs = bytes.reshape(*bytes.shape[:-1], -1, 1, run)
    shifts = np.arange(0, 8, num_bits, dtype=np.uint8)[:, None]
    fields = (runs >> shifts) & np.uint8((1 << num_bits) - 1)
    return fields.reshape(*bytes.shape[:-1], -1)


def from_levels(
    format: int,
    levels: Bytes,
    scales: NDArray[np.float32],
    zeros: Bytes | None,
    group_size: int,
) -> Blocks:
    """Levels [N, K] as whole spans of blocks of a format that has a scale and perhaps a zero point a column.

    scales, zeros: [N, groups] of `group_size` inputs each, which are whole spans, or one group; signed levels
    are as two's complement has them. Nothing is rounded: for INT4 the scales are float16 already.
    """
    layout, (N, K) = LAYOUTS[format], levels.shape
    inputs = layout.span * BLOCK
    num_spans = -(-K // inputs)
    if format == INT8_ROW:
        levels = levels ^ np.uint8(128)
    if K % inputs:
        levels = np.pad(levels, ((0, 0), (0, -K % inputs)), constant_values=layout.zero)
    blocks = np.ascontiguousarray(levels).reshape(N, -1, BLOCK)
    kept = scales.astype(np.float32 if layout.float_scale else np.float16)
    halves = _spread(kept, group_size, inputs, num_spans).view(np.uint16)
    halves = halves.reshape(N, num_spans, layout.num_halves)
    if layout.num_bytes:
        assert zeros is not None
        bytes = _spread(zeros, group_size, BLOCK, blocks.shape[1]).reshape(N, -1, 1)
    else:
        bytes = np.zeros((N, blocks.shape[1], 0), np.uint8)
    return Blocks(_planes(format, blocks), bytes, halves)


def _spread(of_groups: NDArray[Any], group_size: int, inputs: int, count: int) -> NDArray[Any]:
    """What each of `count` runs of so many inputs has of the group that it begins in, [N, count]."""
    groups = np.minimum(np.arange(count) * inputs // group_size, of_groups.shape[1] - 1)
    return np.ascontiguousarray(of_groups[:, groups])


def from_gguf(dtype: str, raw: Bytes) -> Blocks:
    """Blocks [N, blocks of GGUF, bytes] of a type of `GGUF_FORMATS`, in its format: not a value changes."""
    format, N = GGUF_FORMATS[dtype], len(raw)
    levels, scales, halves = _READERS[dtype](raw)
    blocks = np.ascontiguousarray(levels).reshape(N, -1, BLOCK)
    num_bytes, num_halves = LAYOUTS[format].num_bytes, LAYOUTS[format].num_halves
    spans = -(-blocks.shape[1] // LAYOUTS[format].span)
    return Blocks(
        _planes(format, blocks),
        np.ascontiguousarray(scales).view(np.uint8).reshape(*blocks.shape[:2], num_bytes),
        np.ascontiguousarray(halves).view(np.uint16).reshape(N, spans, num_halves),
    )


# Readers of raw blocks [N, blocks, bytes]: levels, and what becomes the bytes and the halves of our blocks.
_Parts = tuple[Bytes, Bytes, Bytes]


def _simple(num_halves: int, high_bits: int = 0) -> Callable[[Bytes], _Parts]:
    """For Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL: halves, a word of fifth bits perhaps, nibbles."""

    def read(raw: Bytes) -> _Parts:
        halves, rest = raw[..., : 2 * num_halves], raw[..., 2 * num_halves :]
        levels = _shifted(rest[..., 4 * high_bits :], 4, BLOCK // 2)
        if high_bits:
            levels |= np.unpackbits(rest[..., :4], axis=-1, bitorder="little") << np.uint8(4)
        return levels, raw[..., :0], halves

    return read


def _q8_0(raw: Bytes) -> _Parts:
    return raw[..., 2:] ^ np.uint8(128), raw[..., :0], raw[..., :2]


def _scales_and_minima(packed: Bytes) -> Bytes:
    """The 6-bit scales and minima, in turns [..., 16], of the 12 bytes of a Q4_K or Q5_K block."""
    low, high, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    found = np.empty((*packed.shape[:-1], 8, 2), np.uint8)
    found[..., :4, 0], found[..., :4, 1] = low & 0x3F, high & 0x3F
    found[..., 4:, 0] = (rest & 0x0F) | ((low >> 2) & 0x30)
    found[..., 4:, 1] = (rest >> 4) | ((high >> 2) & 0x30)
    return found.reshape(*packed.shape[:-1], 16)


def _q4_k(raw: Bytes) -> _Parts:
    return _shifted(raw[..., 16:], 4, BLOCK), _scales_and_minima(raw[..., 4:16]), raw[..., :4]


def _q5_k(raw: Bytes) -> _Parts:
    levels = _shifted(raw[..., 48:], 4, BLOCK) | (_shifted(raw[..., 16:48], 1, BLOCK) << np.uint8(4))
    return levels, _scales_and_minima(raw[..., 4:16]), raw[..., :4]


def _q6_k(raw: Bytes) -> _Parts:
    levels = _shifted(raw[..., :128], 4, 64) | (_shifted(raw[..., 128:192], 2, BLOCK) << np.uint8(4))
    return levels, raw[..., 192:208], raw[..., 208:]


def _q3_k(raw: Bytes) -> _Parts:
    levels = _shifted(raw[..., 32:96], 2, BLOCK) | (_shifted(raw[..., :32], 1, BLOCK) << np.uint8(2))
    low, high = _shifted(raw[..., 96:104], 4, 8), _shifted(raw[..., 104:108], 2, 4)
    return levels, (low | (high << np.uint8(4))) - np.uint8(32), raw[..., 108:]


def _q2_k(raw: Bytes) -> _Parts:
    return _shifted(raw[..., 16:80], 2, BLOCK), raw[..., :16], raw[..., 80:]


def _iq4_xs(raw: Bytes) -> _Parts:
    low = _shifted(raw[..., 4:8], 4, 1)
    high = _shifted(raw[..., 2:4], 2, 1)
    scales = (low | (high << np.uint8(4))) - np.uint8(32)
    return _shifted(raw[..., 8:], 4, BLOCK // 2), scales, raw[..., :2]


def _tq1_0(raw: Bytes) -> _Parts:
    parts = []
    for bytes, run, digits in ((raw[..., :32], 32, 5), (raw[..., 32:48], 16, 5), (raw[..., 48:52], 4, 4)):
        powers = (3 ** np.arange(digits)).astype(np.uint8)[:, None]
        turned = bytes.reshape(*bytes.shape[:-1], -1, 1, run) * powers  # modulo 256: a digit comes to the top
        parts.append(((turned.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(*bytes.shape[:-1], -1))
    return np.concatenate(parts, axis=-1), raw[..., :0], raw[..., 52:]


def _mxfp4(raw: Bytes) -> _Parts:
    return _shifted(raw[..., 1:], 4, BLOCK // 2), raw[..., :1], raw[..., :0]


def _tq2_0(raw: Bytes) -> _Parts:
    return _shifted(raw[..., :64], 2, BLOCK), raw[..., :0], raw[..., 64:]


_READERS: dict[str, Callable[[Bytes], _Parts]] = {
    "Q8_0": _q8_0,
    "Q4_0": _simple(1),
    "Q4_1": _simple(2),
    "Q5_0": _simple(1, high_bits=1),
    "Q5_1": _simple(2, high_bits=1),
    "IQ4_NL": _simple(1),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
}
