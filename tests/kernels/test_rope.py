"""Rotary embeddings against complex multiplication, whole and partial."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pagellm.kernels.rope import rotate
from tests import oracles
from tests.kernels.layouts import Matrix, random_matrix

MAX_LEN = 64


def frequencies(rotary_dim: int) -> NDArray[np.float64]:
    return 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)


def rotated(x: Matrix, position: int, rotary_dim: int) -> Matrix:
    """The vector rotated in the middle of a buffer, whose rest must stay as it is."""
    angles = np.outer(np.arange(MAX_LEN), frequencies(rotary_dim))
    buffer = np.full(len(x) + 16, 7.0, np.float32)
    buffer[5 : 5 + len(x)] = x
    room = np.full((MAX_LEN, 3), np.nan)  # of a table that is wider for another layer
    cos, sin = (np.hstack([of(angles), room]).astype(np.float32) for of in (np.cos, np.sin))
    rotate(buffer, 5, cos[position], sin[position], rotary_dim // 2)
    assert (buffer[:5] == 7.0).all()
    assert (buffer[5 + len(x) :] == 7.0).all()
    return buffer[5 : 5 + len(x)].copy()


@pytest.mark.parametrize("position", [0, 1, 7, MAX_LEN - 1])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(2, 2), (4, 4), (6, 6), (64, 64), (80, 80), (80, 32), (10, 4)]
)
def test_agrees_with_the_oracle(head_dim: int, rotary_dim: int, position: int) -> None:
    x = random_matrix(np.random.default_rng(head_dim), head_dim)
    expected = oracles.rotary(x, position, frequencies(rotary_dim))
    np.testing.assert_allclose(rotated(x, position, rotary_dim), expected, rtol=0, atol=1e-6)


def test_position_zero_changes_nothing() -> None:
    x = random_matrix(np.random.default_rng(0), 12)
    np.testing.assert_array_equal(rotated(x, 0, 12), x)


def test_dimensions_past_the_rotary_ones_stay() -> None:
    x = random_matrix(np.random.default_rng(0), 12)
    np.testing.assert_array_equal(rotated(x, 9, 8)[8:], x[8:])


def test_scores_depend_on_distance_alone() -> None:
    q, k = random_matrix(np.random.default_rng(1), 2, 64)
    near = rotated(q, 9, 64) @ rotated(k, 4, 64)
    far = rotated(q, 59, 64) @ rotated(k, 54, 64)
    assert abs(near - far) < 1e-4
