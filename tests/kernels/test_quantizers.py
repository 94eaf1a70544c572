"""Floats as blocks of GGUF's types: held against llama.cpp's own quantizers (tests/fixtures/quantizers)."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

from pagellm.kernels.quantizers import QUANTIZERS, UnscalableError, quantize

EXPECTED = np.load(Path(__file__).parents[1] / "fixtures" / "quantizers" / "expected.npz")
VALUES, IMPORTANCE = EXPECTED["values"], EXPECTED["importance"]
EXACT = ("Q8_0", "Q4_0", "Q5_0")
SEARCHED = ("Q4_K", "Q5_K", "Q6_K")


def weighted_error(dtype, blocks, importance=None):
    """The error that llama.cpp's quantizers of this type look at."""
    square = np.square(VALUES.astype(np.float64))
    spans = square.reshape(len(VALUES), -1, 256)
    if importance is None:
        block = np.sqrt(square.reshape(len(VALUES), -1, 32).mean(axis=2)).repeat(32, axis=1)
        weights = square if dtype == "Q6_K" else block + np.abs(VALUES)
    elif dtype == "Q6_K":
        weights = np.broadcast_to(importance, VALUES.shape)
    elif dtype in SEARCHED:
        weights = importance * np.sqrt(2 * spans.mean(axis=2).repeat(256, axis=1) + square)
    else:
        weights = importance * np.sqrt(square.mean(axis=1, keepdims=True) + square)
    found = dequantize(blocks, GGMLQuantizationType[dtype]).astype(np.float64)
    return (weights * np.square(found - VALUES)).sum(axis=1)


@pytest.mark.parametrize("dtype", EXACT)
def test_reference_types_are_llama_cpps_bit_for_bit(dtype):
    assert np.array_equal(quantize(dtype, VALUES), EXPECTED[dtype])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", *EXACT])
def test_reference_types_are_the_gguf_packages_bit_for_bit(dtype):
    rng = np.random.default_rng(1)
    rows = (rng.standard_t(2, (64, 256)) * 10.0 ** rng.integers(-6, 3, (64, 1))).astype(np.float32)
    rows[3] = 0
    # Of few levels, as models that were quantized before: in the middle between two of the new ones.
    rows[32:] = rng.integers(-16, 16, (32, 256)) * rng.uniform(0.001, 0.1, (32, 1))
    expected = gguf_quantize(rows, GGMLQuantizationType[dtype]).view(np.uint8).reshape(len(rows), -1)
    assert np.array_equal(quantize(dtype, rows), expected)


@pytest.mark.parametrize("dtype", SEARCHED)
def test_a_search_loses_no_more_than_llama_cpps(dtype):
    ours, theirs = quantize(dtype, VALUES), EXPECTED[dtype]
    assert ours.shape == theirs.shape
    assert weighted_error(dtype, ours).sum() <= weighted_error(dtype, theirs).sum()
    # In a single row it may find more.
    assert (weighted_error(dtype, ours) <= 1.15 * weighted_error(dtype, theirs)).all()


@pytest.mark.parametrize("dtype", ["Q4_0", "Q5_0", *SEARCHED])
def test_a_search_by_importance_loses_no_more_than_llama_cpps(dtype):
    ours, theirs = quantize(dtype, VALUES, IMPORTANCE), EXPECTED[f"{dtype}_imatrix"]
    assert weighted_error(dtype, ours, IMPORTANCE).sum() <= weighted_error(dtype, theirs, IMPORTANCE).sum()
    plain = quantize(dtype, VALUES)
    assert weighted_error(dtype, ours, IMPORTANCE).sum() < weighted_error(dtype, plain, IMPORTANCE).sum()


def test_importance_of_nothing_is_none_at_all():
    for nothing in (np.zeros(512, np.float32), np.full(512, np.nan, np.float32)):
        assert np.array_equal(quantize("Q4_0", VALUES, nothing), quantize("Q4_0", VALUES))


@pytest.mark.parametrize("dtype", QUANTIZERS)
def test_values_on_the_grid_of_a_type_stay(dtype):
    once = dequantize(quantize(dtype, VALUES), GGMLQuantizationType[dtype])
    twice = dequantize(quantize(dtype, once), GGMLQuantizationType[dtype])
    # K-quants have many grids: they find one on which they lose next to nothing.
    tolerance = 0.003 if dtype in SEARCHED else 0
    assert np.abs(twice - once).max() <= tolerance * np.abs(VALUES).max()


@pytest.mark.parametrize("dtype", QUANTIZERS)
def test_zeros_stay_zeros(dtype):
    blocks = quantize(dtype, np.zeros((2, 256), np.float32))
    assert not dequantize(blocks, GGMLQuantizationType[dtype]).any()


@pytest.mark.parametrize("dtype", QUANTIZERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_numbers_are_refused(dtype, bad):
    rows = np.ones((1, 256), np.float32)
    rows[0, 200] = bad
    with pytest.raises(UnscalableError):
        quantize(dtype, rows)


@pytest.mark.parametrize("dtype", sorted(QUANTIZERS.keys() - {"F32", "BF16"}))
def test_what_no_float16_scales_is_refused(dtype):
    with pytest.raises(UnscalableError):
        quantize(dtype, np.full((1, 256), 3e38, np.float32))
