"""Rows of floats as blocks of GGUF's types, in the bytes of the file.

Q8_0, and without an importance Q4_0 and Q5_0, are what llama.cpp's reference quantizers make of them, bit for
bit. The others, and these two with an importance, choose their scales so that the squared error is least, in
which a value counts as llama.cpp has it: more where it is large, and as its input is important. What the
types mean is defined by https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.packing import BLOCK, K_SPAN
from pagellm.kernels.scale_search import round_spans, search_steps, search_steps_and_offsets

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Importance = NDArray[np.float32] | None
# From rows to blocks [blocks, bytes], and to the floats in them that must be finite.
_Quantizer = Callable[[Floats, Importance], tuple[Bytes, NDArray[Any]]]

_SPAN = BLOCK * K_SPAN
# More than a float16 scales in any type, and small enough for sums of its powers.
_LARGEST = 1e9
_TOO_LARGE = "too large for a float16 to scale them"
_SEARCHED = ("Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K")


class UnscalableError(ValueError):
    """A block whose scale no float16 holds, or with values that are no numbers."""


def quantize(dtype: str, rows: Floats, importance: Importance = None) -> Bytes:
    """Rows [N, K] as [N, bytes of a row] of a type of `QUANTIZERS`.

    K: a multiple of the type's block. importance: [K], how much the inputs count, none below zero; None: all
    alike. Raises `UnscalableError`.
    """
    if importance is not None:
        # Where nothing was ever put in, nothing counts; there all alike is better than anything at all.
        importance = np.where(np.isfinite(importance) & (importance > 0), importance, 0).astype(np.float32)
        if not importance.any():
            importance = None
    if not np.isfinite(rows).all():
        raise UnscalableError("infinite or no numbers")
    if dtype in _SEARCHED and np.abs(rows).max(initial=0) > _LARGEST:
        raise UnscalableError(_TOO_LARGE)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        blocks, halves = QUANTIZERS[dtype](np.ascontiguousarray(rows, np.float32), importance)
    if not np.isfinite(halves).all():
        raise UnscalableError(_TOO_LARGE)
    return blocks.reshape(len(rows), -1)


def _bytes_of(*parts: NDArray[Any]) -> Bytes:
    """Blocks [blocks, bytes] whose bytes are those of the parts [blocks, ...], one after the other."""
    return np.concatenate(
        [np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1) for part in parts], axis=1
    )


def _inverse(scale: Floats) -> Floats:
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _plain(dtype: str) -> _Quantizer:
    """For F32, F16 and BF16: each value rounded to the nearest, halves to even."""

    def quantizer(rows: Floats, _: Importance) -> tuple[Bytes, NDArray[Any]]:
        if dtype == "F32":
            return rows.view(np.uint8), rows[:0]
        if dtype == "F16":
            values = rows.astype(np.float16)
            return values.view(np.uint8), values
        bits = rows.view(np.uint32)
        shorts = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return shorts.view(np.uint8), (shorts.astype(np.uint32) << 16).view(np.float32)

    return quantizer


def _q8_0(rows: Floats, _: Importance) -> tuple[Bytes, NDArray[Any]]:
    blocks = rows.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    # Halves away from zero, as C's roundf.
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    levels = np.copysign(whole + np.floor(2 * (magnitude - whole)), scaled).astype(np.int8)
    halves = scale.astype(np.float16)
    return _bytes_of(halves, levels), halves


def _nibbles(levels: Bytes) -> Bytes:
    """Levels [blocks, BLOCK] of four bits, half a block apart in a byte."""
    return levels[:, : BLOCK // 2] | (levels[:, BLOCK // 2 :] << np.uint8(4))


def _symmetric(lowest: int) -> _Quantizer:
    """For Q4_0 and Q5_0, whose levels are from `lowest` to `-lowest - 1`."""

    def quantizer(rows: Floats, importance: Importance) -> tuple[Bytes, NDArray[Any]]:
        blocks = rows.reshape(-1, BLOCK)
        if importance is None:
            at = np.abs(blocks).argmax(axis=1, keepdims=True)
            scale = np.take_along_axis(blocks, at, axis=1) / np.float32(lowest)
            shifted = blocks * _inverse(scale) + np.float32(0.5 - lowest)
            levels = np.trunc(shifted).clip(0, -2 * lowest - 1).astype(np.uint8)
            halves = scale.astype(np.float16)
        else:
            mean_square = np.square(rows).mean(axis=1, keepdims=True)
            weights = importance * np.sqrt(mean_square + np.square(rows))
            steps = np.empty(len(blocks), np.float32)
            search_steps(rows.reshape(-1), weights.reshape(-1), BLOCK, lowest, steps)
            halves = steps.astype(np.float16)[:, None]
            units = np.concatenate([halves, np.zeros_like(halves)], axis=1).astype(np.float32)
            bounds, column = (lowest, -lowest - 1, 1, 1, 0, 0), steps[:, None]
            found = _rounded(rows, weights, bounds, units, column, np.zeros_like(column))
            levels = (found.levels - lowest).astype(np.uint8).reshape(-1, BLOCK)
        if lowest == -8:
            return _bytes_of(halves, _nibbles(levels)), halves
        fifth = np.packbits(levels >> np.uint8(4), axis=1, bitorder="little")
        return _bytes_of(halves, fifth, _nibbles(levels & np.uint8(15))), halves

    return quantizer


class _Rounded(NamedTuple):
    """What `round_spans` found for spans of blocks."""

    levels: NDArray[np.int16]  # [all values]
    multiples: NDArray[np.int16]  # [spans, blocks]
    offsets: NDArray[np.int16]  # [spans, blocks]
    losses: NDArray[np.float64]  # [spans]
    sums: NDArray[np.float64]  # [spans, 5]


def _rounded(
    values: Floats, weights: Floats, bounds: tuple[int, ...], units: Floats, steps: Floats, offsets: Floats
) -> _Rounded:
    """values, weights: of the same size; bounds, units, steps, offsets: as `round_spans` has them."""
    found = _Rounded(
        np.empty(values.size, np.int16),
        np.empty(steps.shape, np.int16),
        np.empty(steps.shape, np.int16),
        np.empty(len(steps), np.float64),
        np.empty((len(steps), 5), np.float64),
    )
    round_spans(
        values.reshape(-1), weights.reshape(-1), values.size // steps.size, np.array(bounds, np.int64),
        units, steps, offsets, *found,
    )  # fmt: skip
    return found


def _best_rounded(
    values: Floats, weights: Floats, bounds: tuple[int, ...], units: Floats, steps: Floats, offsets: Floats
) -> tuple[NDArray[np.float16], _Rounded]:
    """The units as float16 [spans, 2], and what is rounded with them; then once more with better units.

    Better are those with which the levels that were found lose least, by least squares.
    """
    halves = units.astype(np.float16)
    best = _rounded(values, weights, bounds, halves.astype(np.float32), steps, offsets)
    aa, ab, bb, ax, bx = best.sums.T
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-6 * aa * bb
    unit = np.where(solvable, ax * bb - ab * bx, ax) / np.where(solvable, determinant, aa)
    offset_unit = np.where(solvable, (ab * ax - aa * bx) / determinant, halves[:, 1])
    better = np.nan_to_num(np.stack([unit, offset_unit], axis=1)).astype(np.float16)
    better[:, 1] = np.maximum(better[:, 1], 0)
    better = np.where(np.isfinite(better), better, halves)
    found = _rounded(values, weights, bounds, better.astype(np.float32), steps, offsets)
    wins = found.losses < best.losses
    halves = np.where(wins[:, None], better, halves)
    both: Any = zip(found, best, strict=True)
    return halves, _Rounded(*(_chosen(wins, new, old) for new, old in both))


def _chosen(wins: NDArray[np.bool_], new: NDArray[Any], old: NDArray[Any]) -> NDArray[Any]:
    """Span by span the new or the old one."""
    by_span = np.where(wins[:, None], new.reshape(len(wins), -1), old.reshape(len(wins), -1))
    return by_span.reshape(new.shape)


def _with_minima(high_bits: int) -> _Quantizer:
    """For Q4_K, and with a fifth bit Q5_K."""
    highest = (16 << high_bits) - 1

    def quantizer(rows: Floats, importance: Importance) -> tuple[Bytes, NDArray[Any]]:
        spans = rows.reshape(-1, K_SPAN, BLOCK)
        if importance is None:
            weights = np.sqrt(np.square(spans).mean(axis=2, keepdims=True)) + np.abs(spans)
        else:
            mean_square = np.square(spans).mean(axis=(1, 2), keepdims=True)
            by_span = np.broadcast_to(importance, rows.shape).reshape(spans.shape)
            weights = by_span * np.sqrt(np.float32(2) * mean_square + np.square(spans))
        steps, offsets = (np.empty(spans.shape[:2], np.float32) for _ in range(2))
        search_steps_and_offsets(
            spans.reshape(-1), weights.reshape(-1), BLOCK, highest, steps.reshape(-1), offsets.reshape(-1)
        )
        greatest = np.stack([steps.max(axis=1), offsets.max(axis=1)], axis=1)
        units = (greatest / 63).astype(np.float32)
        halves, found = _best_rounded(spans, weights, (0, highest, 0, 63, 0, 63), units, steps, offsets)
        levels = found.levels.astype(np.uint8).reshape(-1, K_SPAN, BLOCK)
        by_pair = (levels & np.uint8(15)).reshape(-1, K_SPAN // 2, 2, BLOCK)
        planes: list[Bytes] = [by_pair[:, :, 0] | (by_pair[:, :, 1] << np.uint8(4))]
        if high_bits:
            planes.insert(0, np.packbits(levels >> 4, axis=1, bitorder="little"))
        return _bytes_of(halves, _six_bits(found), *planes), halves

    return quantizer


def _six_bits(found: _Rounded) -> Bytes:
    """The multiples of a span's steps and offsets [spans, 8], in 12 bytes."""
    scales, minima = found.multiples.astype(np.uint8), found.offsets.astype(np.uint8)
    return np.concatenate(
        [
            scales[:, :4] | (scales[:, 4:] >> 4 << 6),
            minima[:, :4] | (minima[:, 4:] >> 4 << 6),
            (scales[:, 4:] & 15) | (minima[:, 4:] << 4),
        ],
        axis=1,
    )


def _q6_k(rows: Floats, importance: Importance) -> tuple[Bytes, NDArray[Any]]:
    size = BLOCK // 2
    spans = rows.reshape(-1, _SPAN // size, size)
    if importance is None:
        weights = np.square(spans)
    else:
        weights = np.ascontiguousarray(np.broadcast_to(importance, rows.shape)).reshape(spans.shape)
    steps = np.empty(spans.shape[:2], np.float32)
    search_steps(spans.reshape(-1), weights.reshape(-1), size, -32, steps.reshape(-1))
    extreme = np.take_along_axis(steps, np.abs(steps).argmax(axis=1, keepdims=True), axis=1)
    units = np.concatenate([extreme / np.float32(-128), np.zeros_like(extreme)], axis=1)
    halves, found = _best_rounded(
        spans, weights, (-32, 31, -128, 127, 0, 0), units, steps, np.zeros_like(steps)
    )
    levels = (found.levels + 32).astype(np.uint8).reshape(-1, 2, 4, BLOCK)
    low, high = levels & 15, levels >> 4
    nibbles = low[:, :, :2] | (low[:, :, 2:] << 4)
    pairs = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    halves = halves[:, :1]
    return _bytes_of(nibbles, pairs, found.multiples.astype(np.int8), halves), halves


QUANTIZERS: dict[str, _Quantizer] = {
    "F32": _plain("F32"),
    "F16": _plain("F16"),
    "BF16": _plain("BF16"),
    "Q8_0": _q8_0,
    "Q4_0": _symmetric(-8),
    "Q5_0": _symmetric(-16),
    "Q4_K": _with_minima(0),
    "Q5_K": _with_minima(1),
    "Q6_K": _q6_k,
}
