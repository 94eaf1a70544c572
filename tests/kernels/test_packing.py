"""Packed layouts: what goes in comes out, in its place, and nothing else is touched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.packing import (
    GROUP,
    PANEL,
    TILE_HEIGHTS,
    group_height,
    pack_columns,
    pack_inputs,
    pack_row,
    padded,
    padded_rows,
    panels_size,
    tile_height,
    unpack_column,
)
from tests.kernels.layouts import as_matrix, heights_of_groups, packed_rows, random_matrix, unpacked_rows

SIZES = sorted({1, 2, 3, 7, GROUP - 1, GROUP, GROUP + 1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 5} - {0})


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_sizes_are_rounded_up_to_whole_panels_and_groups() -> None:
    assert [padded(n) for n in (1, PANEL - 1, PANEL, PANEL + 1)] == [PANEL, PANEL, PANEL, 2 * PANEL]
    assert [padded_rows(m) for m in (1, GROUP, GROUP + 1)] == [GROUP, GROUP, 2 * GROUP]
    assert panels_size(PANEL + 1, 7) == 2 * PANEL * 7


def test_the_tallest_tile_is_a_group() -> None:
    assert TILE_HEIGHTS[-1] == GROUP
    assert list(TILE_HEIGHTS) == sorted(set(TILE_HEIGHTS))


def test_a_tile_is_the_smallest_that_holds_its_rows() -> None:
    for rows in range(1, GROUP + 1):
        assert tile_height(rows) == min(h for h in TILE_HEIGHTS if h >= rows)


@pytest.mark.parametrize("num_rows", [1, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP, 3 * GROUP + 2])
def test_every_group_but_the_last_is_whole(num_rows: int) -> None:
    heights = [group_height(num_rows, group) for group in range(-(-num_rows // GROUP))]
    assert heights == heights_of_groups(num_rows)


@pytest.mark.parametrize("K", [1, 5, PANEL])
@pytest.mark.parametrize("N", SIZES)
def test_panels_hold_the_matrix(N: int, K: int) -> None:
    weights = random_matrix(rng(N, K), N, K)
    panels = np.zeros(panels_size(N, K), np.float32)
    pack_columns(weights, 0, panels, 0)
    np.testing.assert_array_equal(as_matrix(panels, N, K), weights)
    assert np.count_nonzero(panels) == weights.size


@given(
    N=st.integers(1, 3 * PANEL),
    K=st.integers(1, 20),
    start=st.sampled_from([0, 16]),
    step=st.integers(1, 3 * PANEL),
    transposed=st.booleans(),
)
def test_pieces_make_the_whole(N: int, K: int, start: int, step: int, transposed: bool) -> None:
    weights = random_matrix(rng(N, K), N, K)
    size = panels_size(N, K)
    values = np.zeros(start + size + 16, np.float32)
    if transposed:
        inputs = np.ascontiguousarray(weights.T)
        for first in range(0, K, step):
            pack_inputs(inputs[first : first + step], first, K, values, start)
    else:
        for first in range(0, N, step):
            pack_columns(weights[first : first + step], first, values, start)
    np.testing.assert_array_equal(as_matrix(values[start : start + size], N, K), weights)
    assert not values[:start].any()
    assert not values[start + size :].any()


def test_a_column_is_read_back() -> None:
    N, K, start = PANEL + 3, 9, 5
    weights = random_matrix(rng(1), N, K)
    values = np.zeros(start + panels_size(N, K), np.float32)
    pack_columns(weights, 0, values, start)
    for column in range(N):
        out = np.full(K + 4, np.nan, np.float32)
        unpack_column(values, start, K, np.int32(column), out, 2)
        np.testing.assert_array_equal(out[2 : 2 + K], weights[column])
        assert np.isnan(out[[0, 1, K + 2, K + 3]]).all()


@given(num_rows=st.integers(1, 4 * GROUP), K=st.integers(1, 20))
def test_rows_are_packed_where_the_layout_says(num_rows: int, K: int) -> None:
    rows = random_matrix(rng(num_rows, K), num_rows, K)
    source = np.concatenate([np.full(3, np.nan, np.float32), rows.reshape(-1)])
    packed = np.full(padded_rows(num_rows) * K, np.nan, np.float32)
    for row in range(num_rows):
        pack_row(source, 3 + row * K, K, row, num_rows, packed)
    np.testing.assert_array_equal(packed, packed_rows(rows))
    np.testing.assert_array_equal(unpacked_rows(packed, num_rows, K), rows)
