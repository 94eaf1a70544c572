"""Matrix multiplication: the oracle's numbers for ugly shapes, and a row's bits whatever its neighbours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.matmul import matmul
from kernels.packing import GROUP, PANEL, padded_rows
from kernels.threads import new_counters
from tests import oracles
from tests.kernels.layouts import Matrix, packed_rows, packed_weights, random_matrix, whole_panels


def around(*sizes: int) -> st.SearchStrategy[int]:
    """1, primes, and one below, at and above each size."""
    near = {size + d for size in sizes for d in (-1, 0, 1)} - {0}
    return st.sampled_from(sorted({1, 2, 3, 5, 17, *near}))


ROWS = around(GROUP, 2 * GROUP, 8 * GROUP, 16 * GROUP)
COLUMNS = around(PANEL, 2 * PANEL, 67)
DEPTHS = around(16, 31, 64, 257)


def multiply(x: Matrix, weights: Matrix, bias: Matrix, before: Matrix | None = None) -> Matrix:
    """`x @ weights.T + bias`, added to what was there `before` if that is given."""
    (M, K), N = x.shape, len(weights)
    values, start, bias_start = packed_weights(weights, bias)
    stride = whole_panels(N)
    guard = 64
    out = np.full((padded_rows(M) * stride) + guard, 7.0, np.float32)
    rows = out[:-guard].reshape(-1, stride)
    if before is not None:
        rows[:M, :N] = before
    matmul(new_counters(), packed_rows(x), M, K, values, start, bias_start, N, out, before is not None)
    assert (out[-guard:] == 7.0).all(), "wrote past the end"
    return rows[:M, :N].copy()


def operands(M: int, N: int, K: int) -> tuple[Matrix, Matrix, Matrix]:
    rng = np.random.default_rng((M, N, K))
    return random_matrix(rng, M, K), random_matrix(rng, N, K), random_matrix(rng, N)


@settings(max_examples=150)
@given(M=ROWS, N=COLUMNS, K=DEPTHS)
def test_agrees_with_the_oracle(M: int, N: int, K: int) -> None:
    x, weights, bias = operands(M, N, K)
    error = np.abs(multiply(x, weights, bias) - oracles.matmul(x, weights, bias))
    assert (error <= oracles.rounding_bound(x, weights, bias)).all()


@settings(max_examples=50)
@given(M=ROWS, N=COLUMNS, K=DEPTHS)
def test_accumulates_onto_what_was_there(M: int, N: int, K: int) -> None:
    x, weights, bias = operands(M, N, K)
    before = random_matrix(np.random.default_rng(0), M, N)
    accumulated = multiply(x, weights, bias, before)
    np.testing.assert_array_equal(accumulated, before + multiply(x, weights, bias))


@settings(max_examples=100)
@given(M=ROWS, N=COLUMNS, K=DEPTHS, row=st.integers(0, 1 << 20))
def test_a_row_of_a_batch_has_the_bits_of_that_row_alone(M: int, N: int, K: int, row: int) -> None:
    x, weights, bias = operands(M, N, K)
    row %= M
    alone = multiply(x[row : row + 1], weights, bias)
    np.testing.assert_array_equal(multiply(x, weights, bias)[row : row + 1], alone)


@settings(max_examples=50)
@given(M=ROWS, N=COLUMNS, K=DEPTHS, column=st.integers(0, 1 << 20))
def test_a_column_has_the_bits_of_that_column_alone(M: int, N: int, K: int, column: int) -> None:
    x, weights, bias = operands(M, N, K)
    column %= N
    one = slice(column, column + 1)
    np.testing.assert_array_equal(multiply(x, weights, bias)[:, one], multiply(x, weights[one], bias[one]))


@pytest.mark.parametrize("M", [1, GROUP, 2 * GROUP + 1])
def test_small_integers_are_exact(M: int) -> None:
    rng = np.random.default_rng(M)
    x, weights = (rng.integers(-8, 9, (rows, 50)).astype(np.float32) for rows in (M, PANEL + 1))
    bias = rng.integers(-8, 9, PANEL + 1).astype(np.float32)
    np.testing.assert_array_equal(multiply(x, weights, bias), oracles.matmul(x, weights, bias))


def test_an_element_begins_from_its_bias_and_adds_in_the_order_of_k() -> None:
    """The definition of an element's bits, which batch invariance rests on: 1 is lost beside 2^25."""
    lost = np.array([[1.0, 2.0**25, -(2.0**25), 0.0]], np.float32)
    found = np.array([[2.0**25, -(2.0**25), 1.0, 0.0]], np.float32)
    ones = np.ones((1, 4), np.float32)
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    assert multiply(lost, ones, zero) == 0.0
    assert multiply(found, ones, zero) == 1.0
    assert multiply(found, ones, one) == 1.0
