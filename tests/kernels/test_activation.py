"""The activation functions against their definitions, also far out, and within their buffers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pagellm.kernels.activation import (
    CLAMPED_SWIGLU,
    GELU,
    GELU_TANH,
    KINDS,
    RELU,
    RELU_SQUARED,
    SILU,
    activate,
    softcap,
)
from pagellm.kernels.simd import LANES
from tests import oracles
from tests.kernels.layouts import Matrix, random_matrix, whole_panels

SIZES = [1, LANES - 1, LANES, LANES + 1, 53, 96]
ORACLES = {
    SILU: oracles.silu,
    GELU_TANH: oracles.gelu_tanh,
    GELU: oracles.gelu,
    RELU: oracles.relu,
    RELU_SQUARED: oracles.relu_squared,
}
both = pytest.mark.parametrize("gated", [False, True])
# Of the other kind the gate is no factor of its own.
each_kind = pytest.mark.parametrize("kind", ORACLES, ids=lambda kind: list(KINDS)[kind])


def activated(kind: int, gated: bool, x: Matrix, up: Matrix) -> Matrix:
    """The activation of one row somewhere in a buffer, with NaN wherever it may not look."""
    size, room = len(x), whole_panels(len(x))
    wide = np.full(3 * room, np.nan, np.float32)
    wide[room : room + size] = x
    if gated:
        wide[2 * room : 2 * room + size] = up
    out = np.full(room + LANES, 7.0, np.float32)
    activate(kind, int(gated), wide, room, size, room, out)
    assert (out[room:] == 7.0).all(), "wrote past the end"
    return out[:size].copy()


def expected(kind: int, gated: bool, x: Matrix, up: Matrix) -> NDArray[np.float64]:
    return ORACLES[kind](x) * (up if gated else 1)


@pytest.mark.parametrize("size", SIZES)
@both
@each_kind
def test_agrees_with_the_oracle(kind: int, gated: bool, size: int) -> None:
    rng = np.random.default_rng(size)
    x, up = random_matrix(rng, size) * 3, random_matrix(rng, size)
    np.testing.assert_allclose(
        activated(kind, gated, x, up), expected(kind, gated, x, up), rtol=3e-6, atol=1e-7
    )


@both
@each_kind
def test_agrees_over_the_whole_range(kind: int, gated: bool) -> None:
    x = np.concatenate([np.linspace(-60, 60, 4001), [-1e4, 1e4, 0.0, 1e-30, -1e-30]]).astype(np.float32)
    ones = np.ones_like(x)
    np.testing.assert_allclose(
        activated(kind, gated, x, ones), expected(kind, gated, x, ones), rtol=3e-6, atol=2e-6
    )


@both
@each_kind
def test_zero_stays_exactly_zero_and_large_values_themselves(kind: int, gated: bool) -> None:
    x, ones = np.array([0.0, 100.0, 1e6], np.float32), np.ones(3, np.float32)
    expected = x * x if kind == RELU_SQUARED else x
    np.testing.assert_array_equal(activated(kind, gated, x, ones), expected)


@pytest.mark.parametrize("size", SIZES)
def test_both_halves_of_a_clamped_swiglu_are_clamped(size: int) -> None:
    rng = np.random.default_rng(size)
    x, up = random_matrix(rng, size) * 8, random_matrix(rng, size) * 8
    found = activated(CLAMPED_SWIGLU, True, x, up)
    np.testing.assert_allclose(found, oracles.clamped_swiglu(x, up), rtol=3e-6, atol=2e-6)
    x[0] = np.nan
    assert np.isnan(activated(CLAMPED_SWIGLU, True, x, up)[0])
    assert np.isnan(activated(CLAMPED_SWIGLU, True, up, x)[0])


def test_the_gate_is_the_first_half() -> None:
    gate, up = np.full(4, 100.0, np.float32), np.full(4, -2.0, np.float32)
    np.testing.assert_array_equal(activated(SILU, True, gate, up), np.full(4, -200.0, np.float32))


def capped(x: Matrix, cap: float) -> Matrix:
    """The row bounded somewhere in a buffer, with NaN wherever it may not look."""
    size, room = len(x), whole_panels(len(x))
    buffer = np.full(3 * room, np.nan, np.float32)
    buffer[room : room + size] = x
    buffer[2 * room :] = 7.0
    softcap(buffer, room, size, np.float32(cap))
    assert (buffer[2 * room :] == 7.0).all(), "wrote past the end"
    return buffer[room : room + size].copy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cap", [0.5, 30.0, 50.0])
def test_a_soft_cap_agrees_with_the_oracle(size: int, cap: float) -> None:
    x = random_matrix(np.random.default_rng(size), size) * np.float32(cap)
    np.testing.assert_allclose(capped(x, cap), oracles.softcap(x, cap), rtol=4e-7)


def test_a_soft_cap_is_exact_at_both_ends() -> None:
    x = np.array([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, np.inf, -np.inf, np.nan], np.float32)
    expected = np.array([0.0, -0.0, 1e-30, -1e-30, 30, -30, 30, -30, np.nan], np.float32)
    np.testing.assert_array_equal(capped(x, 30.0), expected)
    wide = np.linspace(-300, 300, 5001, dtype=np.float32)
    np.testing.assert_allclose(capped(wide, 30.0), oracles.softcap(wide, 30.0), rtol=4e-7)
    assert (np.diff(capped(wide, 30.0)) >= 0).all()
