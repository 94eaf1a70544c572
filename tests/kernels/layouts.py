"""Plain matrices to the kernels' packed layouts and back, slowly: what the kernels' tests share."""

import platform
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.encoding import encode
from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    FLOAT4,
    FLOAT4_TABLE,
    FLOAT8,
    FLOAT32,
    FP4,
    FP4_TABLE,
    GROUP,
    INT2_K,
    INT4_K,
    INT4_MIN,
    INT4_ZERO,
    INT4_ZERO_32,
    INT5_K,
    INT8,
    INT8_127,
    INT8_ROW,
    INT8_STEP,
    LAYOUTS,
    NF4,
    NF4_TABLE,
    PANEL,
    TABLE,
    TABLE4,
    TABLE4_K,
    Blocks,
    num_blocks,
    pack_blocks,
    padded,
    panels_size,
)
from pagellm.kernels.simd import INT4_PAIRS, INT8_OFFSET, PAIR_WORDS, host_has
from tests import oracles

Matrix = NDArray[np.float32]
Exact = NDArray[np.float64]

FORMATS = {format: layout.name.replace(" ", "_") for format, layout in enumerate(LAYOUTS)}
ENCODED = {format: FORMATS[format] for format in range(INT4_MIN + 1)}  # what floats can be made to
# Those that multiply activations as integers, and of these the ones that scale blocks of activations.
INTEGER_FORMATS = tuple(format for format, layout in enumerate(LAYOUTS) if layout.inputs in (INT8, INT8_ROW))
BLOCKWISE_FORMATS = tuple(format for format in INTEGER_FORMATS if format != INT8_ROW)
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


def blocks_of(format: int, weights: Matrix) -> Blocks:
    """Weight rows [N, K] in a format; if floats cannot be made to it, any blocks, by the row alone."""
    if format in ENCODED:
        return encode(format, weights)
    seeds = [zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in weights]
    rows = [random_blocks(format, np.random.default_rng(seed), 1, weights.shape[1]) for seed in seeds]
    return Blocks(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def random_blocks(format: int, rng: np.random.Generator, N: int, K: int) -> Blocks:
    """Every level and byte that there is, times scales and minima of either sign."""
    layout, blocks = LAYOUTS[format], num_blocks(K)
    words = rng.integers(0, 1 << 32, (N, blocks, layout.low_bits + layout.high_bits), np.uint32)
    if format == FLOAT8:  # whose last two are no numbers
        levels = words.view(np.uint8)
        levels[levels & 127 == 127] -= 1
    most = 64 if format in (INT4_K, INT5_K) else 17 if format in (INT4_ZERO, INT4_ZERO_32) else 256
    bytes = rng.integers(0, most, (N, blocks, layout.num_bytes)).astype(np.uint8)
    spans = -(-blocks // layout.span)
    if layout.float_scale:
        scales = rng.standard_normal((N, 1 if format == INT8_ROW else spans, 1)) / 100
        scales = np.broadcast_to(scales.astype(np.float32), (N, spans, 1))
        return Blocks(words, bytes, np.ascontiguousarray(scales).view(np.uint16))
    if format == FLOAT4:  # around 1; a byte more or less is twice or half as much
        bytes = bytes % 8 + np.uint8(122)
    halves = rng.standard_normal((N, spans, layout.num_halves)) / 100
    return Blocks(words, bytes, halves.astype(np.float16).view(np.uint16))


def dequantized(format: int, blocks: Blocks) -> Exact:
    """The values [N, blocks * BLOCK] of blocks of weight rows, without any rounding."""
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
    none = np.zeros((1, 1, 1))
    if format == FLOAT32:
        return blocks.words.view(np.float32).astype(np.float64), none
    if format == BFLOAT16:
        upper = blocks.words.view(np.uint16).astype(np.uint32) << 16
        return upper.view(np.float32).astype(np.float64), none
    scales, minima = scales_of(format, blocks)
    if format == INT8_127:  # rounded twice, as bitsandbytes has it
        once = (levels_of(format, blocks) * scales.repeat(BLOCK // 2, axis=2)).astype(np.float32)
        return (once * np.float32(INT8_STEP)).astype(np.float64), none
    scaled = levels_of(format, blocks) * scales.repeat(BLOCK // 2, axis=2)
    return scaled, minima.repeat(BLOCK // 2, axis=2) if minima.size else none


def levels_of(format: int, blocks: Blocks) -> NDArray[Any]:
    """What is multiplied by the scales, [N, blocks, BLOCK]: levels less their zero, or of the table."""
    layout, bytes = LAYOUTS[format], blocks.words.view(np.uint8).astype(np.int64)
    if format in (INT8, INT8_ROW):
        return int8_values(bytes)
    if format == INT8_127:
        return (bytes + 128) % 256 - 128
    if format == FLOAT8:
        return oracles.e4m3(bytes)
    levels = np.zeros((*bytes.shape[:2], BLOCK), np.int64)
    planes = (
        (layout.low_bits, 0, bytes),
        (layout.high_bits, layout.low_bits, bytes[..., 4 * layout.low_bits :]),
    )
    for num_bits, position, plane in planes:
        for i in range(BLOCK if num_bits else 0):
            word, byte = i // 4, i % 4
            field = plane[..., word % num_bits * 4 + byte] >> word // num_bits * num_bits
            levels[..., i] |= (field & ((1 << num_bits) - 1)) << position
    if format in (INT4_ZERO, INT4_ZERO_32):
        return levels - blocks.bytes.astype(np.int64)
    tables = {TABLE4: TABLE, TABLE4_K: TABLE, NF4: NF4_TABLE, FP4: FP4_TABLE, FLOAT4: FLOAT4_TABLE}
    return np.array(tables[format])[levels] if format in tables else levels - layout.zero


def scales_of(format: int, blocks: Blocks) -> tuple[Exact, Exact]:
    """The scales of the halves of the blocks, [N, blocks, 2], and their minima, or none."""
    layout = LAYOUTS[format]
    if format == FLOAT4:
        return np.ldexp(1.0, blocks.bytes.astype(np.int64) - 128).repeat(2, axis=2), np.zeros(0)
    kind = np.float32 if layout.float_scale else np.float16
    halves = blocks.halves.view(kind).astype(np.float64).repeat(layout.span, axis=1)
    halves = halves[:, : blocks.words.shape[1]]
    scales, minima = halves[..., :1].repeat(2, axis=2), halves[..., 1:].repeat(2, axis=2)
    bytes = blocks.bytes.view(np.int8).astype(np.float64)
    if format in (INT4_K, INT5_K):
        return scales * bytes[..., :1], -minima * bytes[..., 1:]
    if format == INT2_K:
        return scales * (blocks.bytes & 15), -minima * (blocks.bytes >> 4)
    return scales * bytes if layout.num_bytes and not layout.float_scale else scales, minima


def packed_weights(format: int, weights: Matrix | Blocks, bias: Matrix, K: int) -> tuple[Matrix, int, int]:
    """One buffer with the panels of [N, K] and a bias [N] somewhere inside, and where the two begin."""
    N = len(bias)
    size = panels_size(format, N, K)
    blocks = weights if isinstance(weights, Blocks) else blocks_of(format, weights)
    start, bias_start = 16, 16 + size + 16
    values = poisoned(bias_start + padded(N))
    values[start : start + size] = 0.0
    values[bias_start:] = 0.0
    pack_blocks(format, *blocks, 0, 0, K, values.view(np.uint32), start)
    values[bias_start : bias_start + N] = bias
    return values, start, bias_start


# Activations


def are_floats(format: int) -> bool:
    """Whether activations stay floats: bfloat16 ones are for machines that multiply them."""
    inputs = LAYOUTS[format].inputs
    return inputs == FLOAT32 or (inputs == BFLOAT16 and PAIR_WORDS == 2)


def multiplied(format: int, x: Matrix) -> Exact:
    """The activations [M, K] as a matrix of this format sees them."""
    if are_floats(format):
        return x.astype(np.float64)
    if format == BFLOAT16:
        return oracles.bfloat16(x)
    if format == INT8_ROW:
        row_levels, row_scales = oracles.quantized_rows(x)
        return row_levels * row_scales[:, None]
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
    if format == INT8_ROW:
        return _row_chunks(whole)
    levels, scales = oracles.quantized_blocks(x)
    with np.errstate(invalid="ignore"):  # what is no number has a scale that tells
        totals = levels.sum(axis=2).astype(np.int64)
        bytes = np.ascontiguousarray(levels.astype(np.int8))
        first = levels[..., : BLOCK // 2].sum(axis=2).astype(np.int64)
        floats = np.stack([scales, scales * totals, scales * first, scales * (totals - first)], axis=2)
    floats = floats.astype(np.float32)
    offsets = [-INT8_OFFSET * total for total in (totals, first, totals - first)]
    starts = np.stack([*offsets, int4_starts(-8 * totals)], axis=2).astype(np.int32)
    return np.concatenate([bytes.view(np.uint32), floats.view(np.uint32), starts.view(np.uint32)], axis=2)


def _row_chunks(x: Matrix) -> NDArray[np.uint32]:
    """For INT8_ROW: the first chunk of a row has its scale and its sum; other words mean nothing."""
    levels, scales = oracles.quantized_rows(x)
    words = np.full((len(x), x.shape[1] // BLOCK, 16), 0xFFFFFFFF, np.uint32)
    with np.errstate(invalid="ignore"):
        words[..., :8] = levels.astype(np.int8).view(np.uint32).reshape(len(x), -1, 8)
        words[:, 0, 8] = scales.astype(np.float32).view(np.uint32)
        words[:, 0, 12] = (
            (-INT8_OFFSET * levels.sum(axis=1).astype(np.int64)).astype(np.int32).view(np.uint32)
        )
    return words


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


# Products

# Whether a product is added before it is rounded.
FUSED = host_has("fma") or host_has("avx512f") or platform.machine().lower() in ("aarch64", "arm64")


def multiply_add(a: Matrix, b: Matrix, c: Matrix) -> Matrix:
    """a * b + c in float32, as the machine does it."""
    if not FUSED:
        return a * b + c
    # A product has 48 bits, and a sum that is rounded to odd in 53 bits rounds to the nearest float32 (Boldo
    # and Melquiond 2008).
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    moved = total - product
    error = (product - (total - moved)) + (addend - moved)
    is_even = total.view(np.uint64) & 1 == 0
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & is_even, np.nextafter(total, towards), total).astype(np.float32)


def chained_product(format: int, x: Matrix, blocks: Blocks, bias: Matrix) -> Matrix:
    """[M, K] times the blocks of [N, K], plus [N], by the chain of operations that the kernels are held to.

    Block by block, or half by half where halves have scales of their own: the exact sum of the integers'
    products, times the product of the scales, and then the sum of the activations times the minimum.
    """
    by_row = chunks(format, x)
    if format == INT8_ROW:
        activations = by_row[..., :8].copy().view(np.int8).reshape(len(x), -1).astype(np.int64)
        sums = (activations @ levels_of(format, blocks).reshape(len(bias), -1).T).astype(np.float32)
        of_rows = by_row[:, :1, 8].copy().view(np.float32)
        of_columns = scales_of(format, blocks)[0][:, 0, 0].astype(np.float32)
        return multiply_add(sums, of_rows * of_columns, np.broadcast_to(bias, sums.shape))
    inputs = by_row[..., :8].copy().view(np.int8).astype(np.int64)
    scale, *totals = (word[:, :, 0] for word in np.split(by_row[..., 8:12].view(np.float32), 4, axis=2))
    levels, (scales, minima) = levels_of(format, blocks), scales_of(format, blocks)
    scales, minima = scales.astype(np.float32), minima.astype(np.float32)
    apart = (
        format not in ENCODED
        and not LAYOUTS[format].float_scale
        and LAYOUTS[format].num_bytes == 2
        and format not in (INT4_K, INT5_K)
    )
    total = np.broadcast_to(bias, (len(x), len(bias))).copy()
    for block in range(inputs.shape[1]):
        for half in range(2 if apart else 1):
            part = slice(half * 16, half * 16 + 16) if apart else slice(None)
            dots = inputs[:, block, part] @ levels[:, block, part].T
            factor = scale[:, block, None] * scales[None, :, block, half]
            total = multiply_add(dots.astype(np.float32), factor, total)
            if minima.size:
                total = multiply_add(
                    totals[half + 1 if apart else 0][:, block, None], minima[None, :, block, half], total
                )
    return total
