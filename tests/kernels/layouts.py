"""Plain matrices to the kernels' packed layouts and back, slowly: what the kernels' tests share."""

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    FLOAT32,
    GROUP,
    INT4,
    INT4_MIN,
    INT8,
    PANEL,
    Blocks,
    encode,
    num_blocks,
    pack_blocks,
    padded,
    panels_size,
)
from pagellm.kernels.simd import INT4_PAIRS, INT8_OFFSET, PAIR_WORDS
from tests import oracles

Matrix = NDArray[np.float32]
Exact = NDArray[np.float64]

FORMATS = {FLOAT32: "float32", BFLOAT16: "bfloat16", INT8: "int8", INT4: "int4", INT4_MIN: "int4_min"}
# A NaN as a float32, and two of them as bfloat16 or as float16.
POISON = np.array([0xFFFFFFFF], np.uint32).view(np.float32)[0]


def random_matrix(rng: np.random.Generator, *shape: int) -> Matrix:
    return rng.standard_normal(shape).astype(np.float32)


def poisoned(num_words: int) -> Matrix:
    """A buffer that spoils whatever is computed from it, in every format."""
    return np.full(num_words, POISON)


def is_poison(words: Matrix) -> bool:
    """Whether nobody wrote to such a buffer."""
    return bool((words.view(np.uint32) == 0xFFFFFFFF).all())


def whole_panels(num_columns: int) -> int:
    return -(-num_columns // PANEL) * PANEL


# Weights


def dequantized(format: int, blocks: Blocks) -> Exact:
    """The values [N, blocks * BLOCK] of encoded weight rows, without any rounding."""
    scaled, minima = _scaled_and_minima(format, blocks)
    return (scaled + minima).reshape(len(scaled), -1)


def int8_values(bytes: NDArray[np.integer]) -> NDArray[np.int64]:
    """What the weights of an int8 product stand for."""
    unsigned = bytes.astype(np.int64)
    return unsigned - 128 if INT8_OFFSET else (unsigned + 128) % 256 - 128


def magnitudes(format: int, blocks: Blocks) -> Exact:
    """How large the parts of each value are: a minimum is multiplied apart from the rest."""
    scaled, minima = _scaled_and_minima(format, blocks)
    return (np.abs(scaled) + np.abs(minima)).reshape(len(scaled), -1)


def _scaled_and_minima(format: int, blocks: Blocks) -> tuple[Exact, Exact]:
    words, halves = blocks
    scales = halves.view(np.float16).astype(np.float64)
    none = np.zeros((1, 1, 1))
    if format == FLOAT32:
        return words.view(np.float32).astype(np.float64), none
    if format == BFLOAT16:
        upper = words.view(np.uint16).astype(np.uint32) << 16
        return upper.view(np.float32).astype(np.float64), none
    levels = words.view(np.uint8).astype(np.int64)
    if format == INT8:
        return scales[..., :1] * int8_values(levels), none
    levels = np.concatenate([levels & 15, levels >> 4], axis=2)
    if format == INT4:
        return scales[..., :1] * (levels - 8), none
    return scales[..., :1] * levels, scales[..., 1:]


def packed_weights(format: int, weights: Matrix, bias: Matrix) -> tuple[Matrix, int, int]:
    """One buffer with the panels of [N, K] and a bias [N] somewhere inside, and where the two begin."""
    N, K = weights.shape
    size = panels_size(format, N, K)
    start, bias_start = 16, 16 + size + 16
    values = poisoned(bias_start + padded(N))
    values[start : start + size] = 0.0
    values[bias_start:] = 0.0
    words, halves = encode(format, weights)
    pack_blocks(words, halves, 0, 0, num_blocks(K), values.view(np.uint32), start)
    values[bias_start : bias_start + N] = bias
    return values, start, bias_start


# Activations


def are_floats(format: int) -> bool:
    """Whether activations stay floats: bfloat16 ones are for machines that multiply them."""
    return format == FLOAT32 or (format == BFLOAT16 and PAIR_WORDS == 2)


def multiplied(format: int, x: Matrix) -> Exact:
    """The activations [M, K] as a matrix of this format sees them."""
    if are_floats(format):
        return x.astype(np.float64)
    if format == BFLOAT16:
        return oracles.bfloat16(x)
    levels, scales = oracles.quantized_blocks(x)
    return (levels * scales[..., None]).reshape(len(x), -1)[:, : x.shape[1]]


def chunks(format: int, x: Matrix) -> NDArray[np.uint32]:
    """Rows [M, K] as the words [M, chunks, words of a chunk] that their activations are packed into."""
    M, K = x.shape
    whole = np.pad(x, ((0, 0), (0, -K % BLOCK)))
    if are_floats(format):
        return whole.reshape(M, -1, 16).view(np.uint32)
    if format == BFLOAT16:
        upper = oracles.bfloat16(whole).astype(np.float32).view(np.uint32) >> 16
        return upper.astype(np.uint16).view(np.uint32).reshape(M, -1, 16)
    levels, scales = oracles.quantized_blocks(x)
    with np.errstate(invalid="ignore"):  # what is no number has a scale that tells
        totals = levels.sum(axis=2).astype(np.int64)
        bytes = np.ascontiguousarray(levels.astype(np.int8))
    floats = np.stack([scales, scales * totals], axis=2).astype(np.float32)
    starts = np.stack([-128 * totals, int4_starts(-8 * totals), 0 * totals], axis=2).astype(np.int32)
    return np.concatenate([bytes.view(np.uint32), floats.view(np.uint32), starts.view(np.uint32)], axis=2)


def int4_starts(sums: NDArray[np.int64]) -> NDArray[np.int32]:
    """Even sums as `dot_int4` keeps them: where it adds pairs of int16, a half in each."""
    halves = (sums // 2).astype(np.int16)
    return np.stack([halves, halves], axis=-1).view(np.int32)[..., 0] if INT4_PAIRS else sums.astype(np.int32)


def packed_rows(format: int, x: Matrix) -> Matrix:
    """Rows [M, K] as packed activations; what belongs to no row is poison."""
    by_row = chunks(format, x)
    M, num_chunks, words = by_row.shape
    groups = poisoned(-(-M // GROUP) * GROUP * num_chunks * words).view(np.uint32)
    groups = groups.reshape(-1, num_chunks, GROUP, words)
    for row in range(M):
        groups[row // GROUP, :, row % GROUP] = by_row[row]
    return groups.reshape(-1).view(np.float32)
