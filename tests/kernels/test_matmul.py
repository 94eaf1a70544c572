"""Matrix multiplication in every format: the oracle's numbers, and a row's bits whatever its neighbours.

The oracle multiplies what the formats hold, so the tolerance is that of float32 sums and says nothing of
quantization.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pagellm.kernels.matmul import _rows_of_item, _run_of_panels, matmul, scratch_size, stacked_matmul
from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    FLOAT8,
    FLOAT32,
    FP4,
    GROUP,
    INT8,
    INT8_127,
    NF4,
    PANEL,
    Blocks,
    num_blocks,
    pack_blocks,
    padded_rows,
    panel_words,
    panels_size,
)
from pagellm.kernels.threads import new_counters
from tests import oracles
from tests.conftest import at_most
from tests.kernels.layouts import (
    BLOCKWISE_FORMATS,
    FORMATS,
    INTEGER_FORMATS,
    Exact,
    Matrix,
    blocks_of,
    chained_product,
    dequantized,
    magnitudes,
    multiplied,
    packed_rows,
    packed_weights,
    random_matrix,
    whole_panels,
)


def around(*sizes: int) -> st.SearchStrategy[int]:
    """1, primes, and one below, at and above each size."""
    near = {size + d for size in sizes for d in (-1, 0, 1)} - {0}
    return st.sampled_from(sorted({1, 2, 3, 5, 17, *near}))


FORMAT = st.sampled_from(sorted(FORMATS))
ROWS = around(GROUP // 2, GROUP, 2 * GROUP, 8 * GROUP, 16 * GROUP)
COLUMNS = around(PANEL, 2 * PANEL, 67)
DEPTHS = around(16, BLOCK, 2 * BLOCK, 257)
INTEGER = st.sampled_from(INTEGER_FORMATS)
integer_formats = pytest.mark.parametrize("format", INTEGER_FORMATS, ids=FORMATS.get)
all_formats = pytest.mark.parametrize("format", FORMATS, ids=FORMATS.get)


def multiply(
    format: int, x: Matrix, weights: Matrix | Blocks, bias: Matrix, before: Matrix | None = None
) -> Matrix:
    """`x @ weights.T + bias`, added to what was there `before` if that is given.

    Rows of the last group that are no rows are poison.
    """
    (M, K), N = x.shape, len(bias)
    values, start, bias_start = packed_weights(format, weights, bias, K)
    stride = whole_panels(N)
    guard = 64
    out = np.full((padded_rows(M) * stride) + guard, 7.0, np.float32)
    rows = out[:-guard].reshape(-1, stride)
    if before is not None:
        rows[:M, :N] = before
    matmul(
        new_counters(), 1, panels_at(format, start, N, K), packed_rows(format, x), M, K, values, bias_start,
        N, out, before is not None, np.full(scratch_size(), np.nan, np.float32),
    )  # fmt: skip
    assert (out[-guard:] == 7.0).all(), "wrote past the end"
    return rows[:M, :N].copy()


@all_formats
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 40), (3, 36, 64), (GROUP + 1, 2, 32), (9 * GROUP, 70, 50)])
def test_products_of_several_inputs_are_each_by_itself(format: int, M: int, N: int, K: int) -> None:
    """Between what they write nothing is touched: their outputs begin further apart than they are long."""
    x, weights, bias = operands(4 * M, 4 * N, K)
    values, panels, rows, biases = [], [], [], []
    at = 0
    for i in range(4):
        part, start, bias_start = packed_weights(
            format, weights[i * N : (i + 1) * N], bias[i * N : (i + 1) * N], K
        )
        panels.append(panels_at(format, at + start, N, K))
        values.append(part[:bias_start])
        biases.append(part[bias_start : bias_start + whole_panels(N)])
        rows.append(packed_rows(format, x[i * M : (i + 1) * M]))
        at += bias_start
    step = whole_panels(N) + 5
    out = np.full(padded_rows(M) * 4 * step + 64, 7.0, np.float32)
    stacked_matmul(
        new_counters(), 1, np.concatenate(panels), np.concatenate(rows), M, K,
        np.concatenate([*values, *biases]), at, N, 4, step, out, False,
        np.full(scratch_size(), np.nan, np.float32),
    )  # fmt: skip
    found = out[:-64].reshape(-1, 4, step)
    assert (found[:, :, whole_panels(N) :] == 7.0).all()
    for i in range(4):
        part = slice(i * N, (i + 1) * N)
        alone = multiply(format, x[i * M : (i + 1) * M], weights[part], bias[part])
        np.testing.assert_array_equal(found[:M, i, :N], alone)


def panels_at(format: int, start: int, N: int, K: int) -> NDArray[np.int64]:
    """Where the panels of a matrix [N, K] are, and their format."""
    starts = start + np.arange(whole_panels(N) // PANEL) * panel_words(format, K)
    return np.stack([starts, np.full_like(starts, format)], axis=1)


def operands(M: int, N: int, K: int) -> tuple[Matrix, Matrix, Matrix]:
    rng = np.random.default_rng((M, N, K))
    return random_matrix(rng, M, K), random_matrix(rng, N, K), random_matrix(rng, N)


def expected(format: int, x: Matrix, weights: Matrix, bias: Matrix) -> tuple[Exact, Exact]:
    """The product of what the format holds, and how far float32 may be from it."""
    K = x.shape[1]
    blocks = blocks_of(format, weights)
    held, parts = dequantized(format, blocks)[:, :K], magnitudes(format, blocks)[:, :K]
    seen = multiplied(format, x)
    # A product of floats is rounded and goes through K more sums; one of integers goes through those of
    # the scales and through one or two sums a block.
    roundings = 4 * num_blocks(K) + 6 if format in INTEGER_FORMATS else K + 4
    return oracles.matmul(seen, held, bias), oracles.rounding_bound(seen, parts, bias, roundings)


def assert_agrees(format: int, x: Matrix, weights: Matrix, bias: Matrix) -> None:
    exact, bound = expected(format, x, weights, bias)
    assert (np.abs(multiply(format, x, weights, bias) - exact) <= bound).all()


@at_most(300)
@given(format=FORMAT, M=ROWS, N=COLUMNS, K=DEPTHS)
def test_agrees_with_the_oracle(format: int, M: int, N: int, K: int) -> None:
    assert_agrees(format, *operands(M, N, K))


@at_most(300)
@given(format=INTEGER, M=ROWS, N=COLUMNS, K=st.sampled_from([BLOCK, 8 * BLOCK, 16 * BLOCK, 24 * BLOCK, 1111]))
def test_products_have_the_bits_of_their_chain(format: int, M: int, N: int, K: int) -> None:
    """Sums of integers are exact, and the float32 operations are the documented ones in their order."""
    x, weights, bias = operands(M, N, K)
    np.testing.assert_array_equal(
        multiply(format, x, weights, bias), chained_product(format, x, blocks_of(format, weights), bias)
    )


@integer_formats
@pytest.mark.parametrize("byte", [0x00, 0xFF])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_greatest_levels_have_exact_sums(format: int, byte: int, sign: int) -> None:
    """All levels at either end of their range, and all activations."""
    N, K = PANEL + 1, 16 * BLOCK
    blocks = blocks_of(format, operands(1, N, K)[1])
    extreme = Blocks(np.full_like(blocks.words, byte * 0x01010101), blocks.bytes, blocks.halves)
    bias = np.zeros(N, np.float32)
    for M in (1, GROUP + 1):
        x = np.full((M, K), 127.0 * sign, np.float32)
        found = multiply(format, x, extreme, bias)
        np.testing.assert_array_equal(found, chained_product(format, x, extreme, bias))


@at_most(100)
@given(format=st.sampled_from([FLOAT8, INT8_127, NF4, FP4]), M=ROWS, N=COLUMNS, K=DEPTHS)
def test_levels_that_become_floats_have_the_bits_of_float32(format: int, M: int, N: int, K: int) -> None:
    """Each value rounded to a float32 once, and then the chain of that format."""
    x, weights, bias = operands(M, N, K)
    blocks = blocks_of(format, weights)
    held = dequantized(format, blocks)[:, :K].astype(np.float32)
    np.testing.assert_array_equal(multiply(format, x, blocks, bias), multiply(FLOAT32, x, held, bias))


def test_panels_may_have_different_formats() -> None:
    """Integer ones in any order: each column has the bits that it has beside its like."""
    K, formats = 16 * BLOCK, BLOCKWISE_FORMATS
    N = PANEL * len(formats)
    for M in (1, GROUP, 9 * GROUP + 2):
        x, weights, bias = operands(M, N, K)
        pieces, panels, end = [], [], 0
        for format, rows in zip(formats, np.split(weights, len(formats)), strict=True):
            values = np.zeros(panels_size(format, PANEL, K), np.float32)
            pack_blocks(format, *blocks_of(format, rows), 0, 0, K, values.view(np.uint32), 0)
            pieces.append(values)
            panels.append((end, format))
            end += values.size
        out = np.zeros(padded_rows(M) * N, np.float32)
        matmul(
            new_counters(), 1, np.array(panels), packed_rows(INT8, x), M, K, np.concatenate([*pieces, bias]),
            end, N, out, False, np.zeros(scratch_size(), np.float32),
        )  # fmt: skip
        for i, format in enumerate(formats):
            columns = slice(i * PANEL, (i + 1) * PANEL)
            found = out.reshape(-1, N)[:M, columns]
            np.testing.assert_array_equal(found, multiply(format, x, weights[columns], bias[columns]))


@given(st.integers(1, 500), st.integers(1, 20), st.integers(1, 30))
def test_work_items_take_each_panel_once_in_runs_that_do_not_grow(
    panels: int, threads: int, shortest: int
) -> None:
    runs = [_run_of_panels(item, panels, threads, shortest) for item in range(panels + 1)]
    taken = [run for run in runs if run[0] < run[1]]
    assert runs[: len(taken)] == taken
    assert [panel for run in taken for panel in range(*run)] == list(range(panels))
    lengths = [end - first for first, end in taken]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == max(panels // (2 * threads), min(shortest, panels))


@all_formats
@pytest.mark.parametrize("M", range(1, GROUP + 2))
def test_every_height_of_a_tile_agrees_with_the_oracle(format: int, M: int) -> None:
    assert_agrees(format, *operands(M, PANEL + 3, BLOCK + 5))


@all_formats
@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_agrees_with_the_oracle_far_from_one(format: int, magnitude: float) -> None:
    x, weights, bias = operands(GROUP + 1, PANEL + 1, 3 * BLOCK)
    assert_agrees(format, x * np.float32(magnitude), weights, bias * np.float32(magnitude))


@all_formats
def test_the_greatest_sums_of_a_block_are_exact(format: int) -> None:
    """All products of a block at the end of their range, of either sign."""
    for sign in (1.0, -1.0):
        x = np.full((GROUP + 1, 3 * BLOCK), 127.0 * sign, np.float32)
        weights = np.full((PANEL, 3 * BLOCK), -127.0, np.float32)
        assert_agrees(format, x, weights, np.zeros(PANEL, np.float32))


@all_formats
def test_the_greatest_sums_of_any_part_of_a_block_are_exact(format: int) -> None:
    """Four neighbouring inputs at either end of their ranges, in every pattern."""
    either = (np.arange(16)[:, None] >> np.arange(4) & 1).astype(bool)
    x = np.tile(np.where(either, 127, -127), 3 * BLOCK // 4).astype(np.float32)
    weights = np.tile(np.where(either, 7, -8), 3 * BLOCK // 4).astype(np.float32)
    assert_agrees(format, x, weights, np.zeros(16, np.float32))


@at_most(200)
@given(format=FORMAT, M=ROWS, N=COLUMNS, K=DEPTHS)
def test_accumulates_onto_what_was_there(format: int, M: int, N: int, K: int) -> None:
    x, weights, bias = operands(M, N, K)
    before = random_matrix(np.random.default_rng(0), M, N)
    accumulated = multiply(format, x, weights, bias, before)
    np.testing.assert_array_equal(accumulated, before + multiply(format, x, weights, bias))


@at_most(300)
@given(format=FORMAT, M=ROWS, N=COLUMNS, K=DEPTHS, row=st.integers(0, 1 << 20))
def test_a_row_of_a_batch_has_the_bits_of_that_row_alone(
    format: int, M: int, N: int, K: int, row: int
) -> None:
    x, weights, bias = operands(M, N, K)
    row %= M
    alone = multiply(format, x[row : row + 1], weights, bias)
    np.testing.assert_array_equal(multiply(format, x, weights, bias)[row : row + 1], alone)


@all_formats
def test_a_row_has_the_same_bits_in_every_place_of_every_batch(format: int) -> None:
    x, weights, bias = operands(1, PANEL + 1, 2 * BLOCK + 1)
    alone = multiply(format, x, weights, bias)
    for M in range(2, 2 * GROUP + 2):
        found = multiply(format, x.repeat(M, axis=0), weights, bias)
        np.testing.assert_array_equal(found, alone.repeat(M, axis=0))


@all_formats
def test_a_row_has_the_same_bits_beside_rows_that_are_no_numbers(format: int) -> None:
    M = GROUP + 2
    x, weights, bias = operands(M, PANEL + 1, 2 * BLOCK + 1)
    clean = multiply(format, x, weights, bias)
    for row in range(M):
        for poison in (np.nan, np.inf):
            beside = np.full_like(x, poison)
            beside[row] = x[row]
            np.testing.assert_array_equal(multiply(format, beside, weights, bias)[row], clean[row])


@at_most(200)
@given(format=FORMAT, M=ROWS, N=COLUMNS, K=DEPTHS, column=st.integers(0, 1 << 20))
def test_a_column_has_the_bits_of_that_column_alone(format: int, M: int, N: int, K: int, column: int) -> None:
    x, weights, bias = operands(M, N, K)
    column %= N
    one = slice(column, column + 1)
    np.testing.assert_array_equal(
        multiply(format, x, weights, bias)[:, one], multiply(format, x, weights[one], bias[one])
    )


@all_formats
@pytest.mark.parametrize("M", [1, 2, GROUP - 1, GROUP])
def test_few_rows_take_many_panels_at_a_time(format: int, M: int) -> None:
    """More columns than one work item of a decode has."""
    x, weights, bias = operands(M, 40 * PANEL + 1, BLOCK)
    assert_agrees(format, x, weights, bias)


@given(
    format=FORMAT, M=st.integers(1, 5000), K=st.integers(1, 20_000), panels=st.integers(1, 5000),
    threads=st.integers(1, 64),
)  # fmt: skip
def test_items_are_whole_groups_of_rows_and_as_few_as_they_may_be(
    format: int, M: int, K: int, panels: int, threads: int
) -> None:
    rows = _rows_of_item(format, M, K, panels, threads)
    assert rows % GROUP == 0
    assert 0 < rows <= 43 * GROUP  # what there is room for
    items = panels * -(-M // rows)
    if format in INTEGER_FORMATS and items < threads:
        assert rows <= 8 * GROUP  # then they are as small as they get


@integer_formats
def test_more_rows_than_an_item_has_agree_with_the_oracle(format: int) -> None:
    x, weights, bias = operands(44 * GROUP + 1, PANEL + 1, 20 * BLOCK)
    assert_agrees(format, x, weights, bias)


@all_formats
def test_what_another_thread_took_is_left_alone(format: int) -> None:
    x, weights, bias = operands(3, 2 * PANEL, BLOCK)
    values, start, bias_start = packed_weights(format, weights, bias, BLOCK)
    out = np.full(padded_rows(3) * 2 * PANEL, 7.0, np.float32)
    counters = new_counters()
    counters[:] = 1 << 20  # all items are taken
    matmul(
        counters, 1, panels_at(format, start, 2 * PANEL, BLOCK), packed_rows(format, x), 3, BLOCK, values,
        bias_start, 2 * PANEL, out, False, np.zeros(scratch_size(), np.float32),
    )  # fmt: skip
    assert (out == 7.0).all()


@all_formats
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("k", [0, 16, BLOCK + 1])
def test_what_is_no_number_shows_in_its_whole_row(format: int, special: float, k: int) -> None:
    x, weights, bias = operands(GROUP + 1, PANEL + 1, BLOCK + 2)
    x[2, k] = special
    finite = np.isfinite(multiply(format, x, weights, bias))
    assert not finite[2].any()
    assert finite[np.arange(len(x)) != 2].all()


@pytest.mark.parametrize("format", [FLOAT32, BFLOAT16, INT8], ids=FORMATS.get)
@pytest.mark.parametrize("M", [1, GROUP, 2 * GROUP + 1])
def test_small_integers_are_exact(format: int, M: int) -> None:
    rng = np.random.default_rng(M)
    x, weights = (rng.integers(-8, 9, (rows, 50)).astype(np.float32) for rows in (M, PANEL + 1))
    bias = rng.integers(-8, 9, PANEL + 1).astype(np.float32)
    if format == INT8:
        weights[:, ::BLOCK] = 127.0  # so that scales are 1
        x[:, ::BLOCK] = 127.0
        exact, bound = expected(format, x, weights, bias)
        np.testing.assert_array_equal(exact, oracles.matmul(x, weights, bias))
        assert (np.abs(multiply(format, x, weights, bias) - exact) <= bound).all()
    else:
        found = multiply(format, x, weights, bias)
        np.testing.assert_array_equal(found, oracles.matmul(x, weights, bias))


def test_an_element_begins_from_its_bias_and_adds_in_the_order_of_k() -> None:
    """The definition of an element's bits, which batch invariance rests on: 1 is lost beside 2^25."""
    lost = np.array([[1.0, 2.0**25, -(2.0**25), 0.0]], np.float32)
    found = np.array([[2.0**25, -(2.0**25), 1.0, 0.0]], np.float32)
    ones = np.ones((1, 4), np.float32)
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    assert multiply(FLOAT32, lost, ones, zero) == 0.0
    assert multiply(FLOAT32, found, ones, zero) == 1.0
    assert multiply(FLOAT32, found, ones, one) == 1.0


def test_pairs_of_bfloat16_are_added_in_their_order_from_the_bias_on() -> None:
    """The same for pairs of inputs; within a pair the order is the machine's."""
    lost = np.array([[1.0, 0.0, 2.0**25, 0.0, -(2.0**25), 0.0]], np.float32)
    found = np.array([[2.0**25, 0.0, -(2.0**25), 0.0, 1.0, 0.0]], np.float32)
    ones = np.ones((1, 6), np.float32)
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    assert multiply(BFLOAT16, lost, ones, zero) == 0.0
    assert multiply(BFLOAT16, found, ones, zero) == 1.0
    assert multiply(BFLOAT16, found, ones, one) == 1.0
