"""LayerNorm and RMSNorm of one row, for sizes that do and do not fill whole vectors."""

import numpy as np
import pytest

from pagellm.kernels.norm import normalize
from pagellm.kernels.simd import LANES
from tests import oracles
from tests.kernels.layouts import Matrix, random_matrix, whole_panels

EPSILON = 1e-5
SIZES = [1, 2, LANES - 1, LANES, LANES + 1, 48, 101, 576]
MAGNITUDES = [1e-4, 1.0, 1e4]


def normalized(x: Matrix, scale: Matrix, shift: Matrix, center: bool, epsilon: float = EPSILON) -> Matrix:
    """The row as the step normalises it: somewhere in a buffer, with NaN wherever it may not look."""
    size, room = len(x), whole_panels(len(x))
    hidden = np.full(3 * room, np.nan, np.float32)
    hidden[room : room + size] = x
    weights = np.full(4 * room, np.nan, np.float32)
    weights[room : room + size], weights[3 * room : 3 * room + size] = scale, shift
    out = np.full(room + LANES, 7.0, np.float32)
    normalize(hidden, room, size, center, epsilon, weights, room, 3 * room, out)
    assert (out[room:] == 7.0).all(), "wrote past the end"
    return out[:size].copy()


def parts(size: int, magnitude: float = 1.0) -> tuple[Matrix, Matrix, Matrix]:
    rng = np.random.default_rng(size)
    x, scale, shift = (random_matrix(rng, size) for _ in range(3))
    return x * np.float32(magnitude) + np.float32(magnitude / 2), scale, shift


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("size", SIZES)
def test_layer_norm_agrees_with_the_oracle(size: int, magnitude: float) -> None:
    x, scale, shift = parts(size, magnitude)
    expected = oracles.layer_norm(x, scale, shift, EPSILON)
    np.testing.assert_allclose(normalized(x, scale, shift, True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_agrees_with_the_oracle(size: int, magnitude: float) -> None:
    x, scale, shift = parts(size, magnitude)
    expected = oracles.rms_norm(x, scale, EPSILON) + shift
    np.testing.assert_allclose(normalized(x, scale, shift, False), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_every_element_of_the_row_counts(size: int) -> None:
    scale, shift = np.ones(size, np.float32), np.zeros(size, np.float32)
    for index in {0, size // 2, size - 1}:
        spike = np.zeros(size, np.float32)
        spike[index] = 3.0
        layer, rms = oracles.layer_norm(spike, 1, 0, EPSILON), oracles.rms_norm(spike, 1, EPSILON)
        np.testing.assert_allclose(normalized(spike, scale, shift, True), layer, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(normalized(spike, scale, shift, False), rms, rtol=1e-5, atol=1e-6)


def test_epsilon_is_inside_the_root() -> None:
    x = np.full(LANES, 1e-3, np.float32)
    ones, zeros = np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
    expected = oracles.rms_norm(x, ones, 1e-2)
    np.testing.assert_allclose(normalized(x, ones, zeros, False, 1e-2), expected, rtol=1e-6)


def test_a_large_mean_costs_no_variance() -> None:
    """The variance is that of the deviations, not a difference of two large numbers."""
    x = np.float32(4096.0) + np.arange(LANES, dtype=np.float32) / 8
    ones, zeros = np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
    expected = oracles.layer_norm(x, ones, zeros, EPSILON)
    np.testing.assert_allclose(normalized(x, ones, zeros, True), expected, rtol=1e-5)


def test_rows_of_zeros_become_the_shift() -> None:
    shift = np.arange(20, dtype=np.float32)
    zeros, ones = np.zeros(20, np.float32), np.ones(20, np.float32)
    for center in (True, False):
        np.testing.assert_array_equal(normalized(zeros, ones, shift, center), shift)
