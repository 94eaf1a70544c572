"""Packed layouts: what goes in comes out, in its place, and nothing else is touched; what rounding costs."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pagellm.kernels.encoding import GGUF_FORMATS, bits_per_weight, encode, from_gguf
from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    FLOAT32,
    GROUP,
    INT4,
    INT4_MIN,
    INT8,
    INT8_ROW,
    INT_CHUNK,
    LAYOUTS,
    PANEL,
    SCALE,
    SCALED_FIRST,
    SCALED_SECOND,
    SCALED_SUM,
    Blocks,
    activation_words,
    aligned_zeros,
    num_blocks,
    pack_blocks,
    pack_row,
    padded,
    padded_rows,
    panels_size,
    unpack_column,
)
from tests import oracles
from tests.conftest import at_most
from tests.kernels.layouts import (
    ENCODED,
    FORMATS,
    INTEGER_FORMATS,
    Exact,
    Matrix,
    are_floats,
    blocks_of,
    chunks,
    dequantized,
    packed_rows,
    random_blocks,
    random_matrix,
)

SIZES = sorted({1, 2, 3, 7, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 5})
DEPTHS = sorted({1, 2, 3, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5})
ROWS = sorted({1, 2, 3, 7, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP + 2} - {0})

all_formats = pytest.mark.parametrize("format", FORMATS, ids=FORMATS.get)
encoded_formats = pytest.mark.parametrize("format", ENCODED, ids=FORMATS.get)
integer_encodings = pytest.mark.parametrize("format", [INT8, INT4, INT4_MIN], ids=FORMATS.get)
any_format = st.sampled_from(sorted(FORMATS))


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def unpacked(format: int, panels: Matrix, start: int, N: int, K: int) -> Matrix:
    """The matrix [N, K] that panels hold, column by column, each into the middle of a buffer."""
    rows = np.empty((N, K), np.float32)
    for column in range(N):
        out = np.full(K + 4, np.nan, np.float32)
        unpack_column(format, panels, start, K, np.int32(column), out, 2)
        rows[column] = out[2 : 2 + K]
        assert np.isnan(out[[0, 1, K + 2, K + 3]]).all()
    return rows


def packed(format: int, blocks: Blocks, K: int, start: int = 0) -> Matrix:
    panels = np.zeros(start + panels_size(format, len(blocks.words), K), np.float32)
    pack_blocks(format, *blocks, 0, 0, K, panels.view(np.uint32), start)
    return panels


def assert_same_bits(found: Matrix, expected: Matrix) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


# Sizes


def test_sizes_are_rounded_up_to_whole_panels_groups_and_blocks() -> None:
    assert [padded(n) for n in (1, PANEL - 1, PANEL, PANEL + 1)] == [PANEL, PANEL, PANEL, 2 * PANEL]
    assert [padded_rows(m) for m in (1, GROUP, GROUP + 1)] == [GROUP, GROUP, 2 * GROUP]
    assert [num_blocks(k) for k in (1, BLOCK, BLOCK + 1)] == [1, 1, 2]


def test_a_weight_takes_as_many_bits_as_its_format_says() -> None:
    """Those of GGUF's types, or a little more where these pack scales into six bits."""
    N, K = 4 * PANEL, 16 * BLOCK
    bits = {format: panels_size(format, N, K) * 32 / (N * K) for format in FORMATS}
    assert bits == {format: bits_per_weight(format) for format in FORMATS}
    for dtype, format in GGUF_FORMATS.items():
        size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
        most = {"Q3_K": 1.04, "TQ1_0": 1.23}.get(dtype, 1.03)
        assert 1 <= bits[format] / (8 * num_bytes / size) < most


@pytest.mark.parametrize("num_words", [1, 15, 16, 1000])
def test_buffers_begin_on_cache_lines(num_words: int) -> None:
    for _ in range(5):
        buffer = aligned_zeros(num_words)
        assert buffer.ctypes.data % 64 == 0
        assert buffer.size == num_words
        assert not buffer.any()


# Weights


@all_formats
@pytest.mark.parametrize("K", DEPTHS)
@pytest.mark.parametrize("N", SIZES)
def test_panels_hold_the_encoded_values(format: int, N: int, K: int) -> None:
    blocks = blocks_of(format, random_matrix(rng(N, K), N, K))
    panels = packed(format, blocks, K, start=5)
    assert not panels[:5].any()
    np.testing.assert_array_equal(
        unpacked(format, panels, 5, N, K), dequantized(format, blocks)[:, :K].astype(np.float32)
    )


@given(format=any_format, N=st.integers(1, 3 * PANEL), K=st.integers(1, 3 * BLOCK))
def test_panels_hold_the_encoded_values_whatever_the_shape(format: int, N: int, K: int) -> None:
    blocks = blocks_of(format, random_matrix(rng(N, K), N, K))
    found = unpacked(format, packed(format, blocks, K), 0, N, K)
    np.testing.assert_array_equal(found, dequantized(format, blocks)[:, :K].astype(np.float32))


@all_formats
def test_panels_hold_any_bits(format: int) -> None:
    """Words and halves that no encoder writes: every level, and scales of either sign and any exponent."""
    N, blocks = 2 * PANEL + 3, 5
    K = blocks * BLOCK
    words, bytes, halves = random_blocks(format, rng(format), N, K)
    halves = rng(format).integers(0, 0x7C00, halves.shape).astype(np.uint16)
    halves |= (rng(format, 1).integers(0, 2, halves.shape) << 15).astype(np.uint16)
    if LAYOUTS[format].float_scale:  # their upper half: magnitudes below 2^-7
        halves[..., 1] &= 0xBBFF
    any_bits = Blocks(words, bytes, halves)
    found = unpacked(format, packed(format, any_bits, K), 0, N, K)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found, dequantized(format, any_bits).astype(np.float32))


@given(
    format=any_format,
    N=st.integers(1, 2 * PANEL + 5),
    K=st.integers(1, 4 * BLOCK),
    start=st.sampled_from([0, 16]),
    columns=st.integers(1, 2 * PANEL + 5),
    blocks=st.integers(1, 4),
)
def test_pieces_make_the_whole(format: int, N: int, K: int, start: int, columns: int, blocks: int) -> None:
    whole = blocks_of(format, random_matrix(rng(N, K), N, K))
    size, span = panels_size(format, N, K), LAYOUTS[format].span
    values = np.zeros(start + size + 16, np.float32)
    for n in range(0, N, columns):
        for block in range(0, num_blocks(K), blocks * span):
            rows, inner = slice(n, n + columns), slice(block, block + blocks * span)
            spans = slice(block // span, block // span + blocks)
            piece = (whole.words[rows, inner], whole.bytes[rows, inner], whole.halves[rows, spans])
            pack_blocks(format, *map(np.ascontiguousarray, piece), n, block, K, values.view(np.uint32), start)
    assert_same_bits(values[start : start + size], packed(format, whole, K))
    assert not values[:start].any()
    assert not values[start + size :].any()


@all_formats
def test_packing_again_replaces(format: int) -> None:
    N, K = PANEL + 1, BLOCK + 1
    panels = np.full(panels_size(format, N, K), -1, np.int32).view(np.float32)
    blocks = blocks_of(format, random_matrix(rng(1), N, K))
    pack_blocks(format, *blocks, 0, 0, K, panels.view(np.uint32), 0)
    expected = dequantized(format, blocks)[:, :K].astype(np.float32)
    np.testing.assert_array_equal(unpacked(format, panels, 0, N, K), expected)


# Rounding


def roundtrip(format: int, weights: Matrix) -> Exact:
    return dequantized(format, encode(format, weights))[:, : weights.shape[1]]


def largest(values: Exact) -> Exact:
    """Of each block of a row, for every value of the block."""
    K = values.shape[1]
    blocks = np.pad(values, ((0, 0), (0, -K % BLOCK))).reshape(len(values), -1, BLOCK)
    return blocks.max(axis=2).repeat(BLOCK, axis=1)[:, :K]


def samples(K: int, magnitude: float) -> Matrix:
    """Rows of different kinds: normal, all positive, one outlier, far from zero, two values, constant."""
    r = rng(K)
    rows = random_matrix(r, 12, K)
    rows[2:4] = np.abs(rows[2:4])
    rows[4, 0] = 40.0
    rows[5, -1] = -40.0
    rows[6] += 20.0
    rows[7] -= 20.0
    rows[8] = np.where(rows[8] > 0, 1.0, -1.0)
    rows[9] = 1.0
    rows[10] = -1.0
    rows[11] = 0.0
    return rows * np.float32(magnitude)


MAGNITUDES = [0.02, 1.0, 1000.0]


def test_float32_is_kept() -> None:
    weights = samples(67, 1.0)
    np.testing.assert_array_equal(roundtrip(FLOAT32, weights), weights)


@pytest.mark.parametrize("magnitude", [1e-39, 1e-3, 1.0, 1e30])
def test_bfloat16_is_rounded_to_the_nearest(magnitude: float) -> None:
    weights = samples(67, magnitude)
    np.testing.assert_array_equal(roundtrip(BFLOAT16, weights), oracles.bfloat16(weights))


def test_bfloat16_ties_go_to_the_even_one() -> None:
    ties = (np.arange(0x3F80, 0x3F90, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    for weights in (ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(2))):
        np.testing.assert_array_equal(roundtrip(BFLOAT16, weights[None]), oracles.bfloat16(weights)[None])


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("K", [1, 17, BLOCK, 5 * BLOCK + 3])
def test_int8_errs_by_half_a_step(K: int, magnitude: float) -> None:
    """A step is a 127th of the block's greatest magnitude, as float16: 2^-11 more or less of it."""
    weights = samples(K, magnitude)
    step = largest(np.abs(weights)) / 127
    assert (np.abs(roundtrip(INT8, weights) - weights) <= step * (0.5 + 128 * 2.0**-11)).all()


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("K", [1, 17, BLOCK, 5 * BLOCK + 3])
def test_int4_errs_by_half_a_step(K: int, magnitude: float) -> None:
    """A step is an eighth of the greatest magnitude; beyond seven the other way it errs by a whole one."""
    weights = samples(K, magnitude).astype(np.float64)
    greatest = largest(np.abs(weights))
    step = greatest / 8  # eight of them towards the first value that is greatest, seven the other way
    error = np.abs(roundtrip(INT4, weights.astype(np.float32)) - weights)
    in_reach = np.abs(weights) <= 7.5 * step
    extreme = (weights == greatest) | (weights == -greatest)
    rounding = 8 * 2.0**-11 * step
    assert (error[in_reach] <= (0.5 * step + rounding)[in_reach]).all()
    assert (error <= step + rounding).all()
    for row, block in np.ndindex(len(weights), num_blocks(K)):
        inside = slice(block * BLOCK, (block + 1) * BLOCK)
        first = np.flatnonzero(extreme[row, inside])[0]
        assert error[row, inside][first] <= rounding[row, inside][first]


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("K", [1, 17, BLOCK, 5 * BLOCK + 3])
def test_int4_min_errs_by_half_a_step(K: int, magnitude: float) -> None:
    """A step is a 15th of the way from the least to the greatest; the least is rounded to float16, too."""
    weights = samples(K, magnitude).astype(np.float64)
    least = -largest(-weights) + 0.0
    step = (largest(weights) - least) / 15
    error = np.abs(roundtrip(INT4_MIN, weights.astype(np.float32)) - weights)
    assert (error <= step * (0.5 + 16 * 2.0**-11) + 2 * np.abs(least) * 2.0**-11).all()


@integer_encodings
def test_levels_are_kept(format: int) -> None:
    """Weights that the format can hold are held."""
    levels = {INT8: (-127, 128), INT4: (-8, 8), INT4_MIN: (0, 16)}[format]
    weights = rng(1).integers(*levels, (40, 3 * BLOCK)).astype(np.float32)
    weights[:, ::BLOCK], weights[:, 1::BLOCK] = levels[0], levels[1] - 1
    for scale in (0.5, 1.0, -2.0, 2.0**-10):
        kept = weights * np.float32(scale) + np.float32(3 * scale if format == INT4_MIN else 0)
        np.testing.assert_array_equal(roundtrip(format, kept), kept)


@encoded_formats
def test_zeros_stay_exactly_zero(format: int) -> None:
    np.testing.assert_array_equal(roundtrip(format, np.zeros((3, 40), np.float32)), np.zeros((3, 40)))


@encoded_formats
def test_weights_that_are_too_small_for_the_format_become_no_larger(format: int) -> None:
    for magnitude in (1e-7, 1e-9, 1e-30, 1e-42):
        weights = samples(BLOCK, magnitude)
        found = roundtrip(format, weights)
        assert np.isfinite(found).all()
        assert (np.abs(found) <= np.abs(weights).max() + 127 * 2.0**-24).all()


@encoded_formats
def test_encoding_leaves_its_input_alone(format: int) -> None:
    weights = random_matrix(rng(1), 3, BLOCK)
    before = weights.copy()
    weights.flags.writeable = False
    encode(format, weights)
    encode(format, random_matrix(rng(1), BLOCK, 3).T)
    np.testing.assert_array_equal(weights, before)


# GGUF

gguf_types = pytest.mark.parametrize("dtype", GGUF_FORMATS)
# Where the halves of a block of 256 are, of the types that do not begin with them.
HALVES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}


def gguf_blocks(dtype: str, N: int, K: int) -> tuple[NDArray[np.uint8], Matrix]:
    """Raw blocks [N, blocks, bytes] of any bits with finite halves, and what gguf reads them as."""
    kind = GGMLQuantizationType[dtype]
    size, num_bytes = GGML_QUANT_SIZES[kind]
    raw = rng(N, K).integers(0, 256, (N, K // size, num_bytes), np.uint8)
    num_halves = LAYOUTS[GGUF_FORMATS[dtype]].num_halves
    for at in HALVES_AT.get(dtype, range(0, 2 * num_halves, 2)):
        halves = rng(N, K, at).integers(0, 0x7C00, raw.shape[:2]).astype(np.uint16)
        halves |= (rng(N, K, at, 1).integers(0, 2, halves.shape) << 15).astype(np.uint16)
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    return raw, quants.dequantize(raw.reshape(N, -1), kind)


@gguf_types
@pytest.mark.parametrize("spans", [1, 2, 3])
@pytest.mark.parametrize("N", [1, PANEL - 1, 2 * PANEL + 5])
def test_gguf_blocks_keep_their_values(dtype: str, N: int, spans: int) -> None:
    """Every bit: zeros keep their signs, and what is subnormal stays so."""
    format, K = GGUF_FORMATS[dtype], spans * 256
    raw, values = gguf_blocks(dtype, N, K)
    raw.flags.writeable = False
    found = unpacked(format, packed(format, from_gguf(dtype, raw), K), 0, N, K)
    assert_same_bits(found, values)


@gguf_types
def test_gguf_blocks_that_are_encoded_by_gguf_keep_their_values(dtype: str) -> None:
    """Of all magnitudes, for the types that the library encodes; rows of no whole span among them."""
    weights = np.concatenate([samples(512, m) for m in (1e-6, 1e-5, 1e-3, 0.02, 1.0, 100.0, 1000.0)])
    kind, format = GGMLQuantizationType[dtype], GGUF_FORMATS[dtype]
    if GGML_QUANT_SIZES[kind][0] == BLOCK:
        weights = weights[:, : 3 * BLOCK]
    try:
        raw = quants.quantize(weights, kind)
    except NotImplementedError:
        pytest.skip("the library only decodes this type")
    K = weights.shape[1]
    blocks = from_gguf(dtype, raw.reshape(len(raw), K // GGML_QUANT_SIZES[kind][0], -1))
    assert_same_bits(
        unpacked(format, packed(format, blocks, K), 0, len(raw), K), quants.dequantize(raw, kind)
    )


@pytest.mark.parametrize(("dtype", "format"), [("Q8_0", INT8), ("Q4_0", INT4)])
def test_an_encoder_errs_no_more_than_that_of_gguf(dtype: str, format: int) -> None:
    weights = random_matrix(rng(3), 64, 8 * BLOCK)
    kind = GGMLQuantizationType[dtype]
    values = quants.dequantize(quants.quantize(weights, kind), kind)
    ours, theirs = (np.square(found - weights).mean() for found in (roundtrip(format, weights), values))
    assert ours <= theirs * 1.001


# Activations


def assert_packs(format: int, rows: Matrix) -> None:
    """Each row goes where the layout says, and the source keeps its floats and is filled up with zeros."""
    M, K = rows.shape
    room = num_blocks(K) * BLOCK
    size = padded_rows(M) * activation_words(format, K)
    expected = packed_rows(format, rows)
    assert expected.size == size
    found = np.full(3 + size + 16, 0xFFFFFFFF, np.uint32).view(np.float32)
    for row in range(M):
        source = np.full(3 + room + 5, np.nan, np.float32)
        source[3 : 3 + K] = rows[row]
        pack_row(format, source, 3, K, row, found, 3)
        np.testing.assert_array_equal(source[3 : 3 + K], rows[row])
        assert not source[3 + K : 3 + room].any()
        assert np.isnan(source[3 + room :]).all()
    guards = np.concatenate([found[:3], found[3 + size :]])
    assert (guards.view(np.uint32) == 0xFFFFFFFF).all()
    found = found[3 : 3 + size]
    if format in INTEGER_FORMATS:  # scales may be a rounding or two apart
        for word in (SCALE, SCALED_SUM, SCALED_FIRST, SCALED_SECOND):
            scales, expected_scales = found[word::INT_CHUNK], expected[word::INT_CHUNK]
            np.testing.assert_allclose(scales, expected_scales, rtol=4 * 2.0**-24, atol=1e-44)
            scales[:] = expected_scales
    assert_same_bits(found, expected)


@all_formats
@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("K", [1, BLOCK + 1])
def test_rows_are_packed_where_the_layout_says(format: int, M: int, K: int) -> None:
    assert_packs(format, random_matrix(rng(M, K), M, K))


@at_most(300)
@given(
    format=any_format,
    M=st.integers(1, 3 * GROUP),
    K=st.integers(1, 3 * BLOCK),
    magnitude=st.sampled_from([1e-38, 1e-25, 1e-3, 1.0, 1e4, 1e37]),
)
def test_rows_of_all_magnitudes_are_packed(format: int, M: int, K: int, magnitude: float) -> None:
    assert_packs(format, random_matrix(rng(M, K), M, K) * np.float32(magnitude))


@all_formats
def test_zeros_are_packed_as_zeros(format: int) -> None:
    rows = np.zeros((2, 70), np.float32)
    rows[1, 40] = 1.0  # a block of its own
    assert_packs(format, rows)
    assert format == INT8_ROW or not chunks(format, rows)[0].any()


@all_formats
def test_blocks_with_one_outlier_are_packed(format: int) -> None:
    for index in range(2 * BLOCK):
        rows = random_matrix(rng(index), 1, 2 * BLOCK)
        rows[0, index] = 1000.0 * (-1) ** index
        assert_packs(format, rows)


@all_formats
def test_halves_between_levels_are_packed_to_the_even_one(format: int) -> None:
    rows = np.arange(-63.5, 64.5, dtype=np.float32).reshape(-1, BLOCK)
    rows[:, 0] = 127.0
    assert_packs(format, rows)


@all_formats
@pytest.mark.parametrize("sign", [1, -1])
def test_the_greatest_finite_numbers_are_packed(format: int, sign: int) -> None:
    """As long as the sum of a block is one, too."""
    rows = np.full((1, BLOCK), sign * 1e37, np.float32)
    assert_packs(format, rows)
    rows[:] = sign * 3e38
    rows[0, ::2] *= -1
    assert_packs(format, rows)


@all_formats
@pytest.mark.parametrize("special", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, 15, 16, 31, 40])
def test_what_is_no_number_shows(format: int, special: float, index: int) -> None:
    """It stays what it is, or it spoils the scale of its block and the sum that comes with it."""
    row = np.ones(50, np.float32)
    row[index] = special
    source = np.zeros(2 * BLOCK, np.float32)
    source[:50] = row
    found = np.zeros(GROUP * activation_words(format, 50), np.float32)
    pack_row(format, source, 0, 50, 0, found, 0)
    if format in INTEGER_FORMATS:
        broken, whole = index // BLOCK, 1 - index // BLOCK
        by_chunk = found.reshape(-1, GROUP, INT_CHUNK)[:, 0]
        if format == INT8_ROW:
            assert np.isnan(by_chunk[0, SCALE])
            return
        assert np.isnan(by_chunk[broken, [SCALE, SCALED_SUM]]).all()
        assert np.isfinite(by_chunk[whole, [SCALE, SCALED_SUM]]).all()
    else:
        words = found.reshape(-1, GROUP, 16)[:, 0].reshape(-1)
        values = words if are_floats(format) else halves_of(words)
        np.testing.assert_array_equal(values[:50], row)


def halves_of(words: Matrix) -> Matrix:
    """The bfloat16 in words of two."""
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
