"""The vector intrinsics: what a lane computes, the order of reductions, tiles, and the portable exp."""

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels import simd
from kernels.jit import kernel
from kernels.simd import LANES
from tests.kernels.layouts import Matrix, random_matrix

NAN, INF = np.float32(np.nan), np.float32(np.inf)


@kernel
def lane_arithmetic(a, b, c, out):  # type: ignore[no-untyped-def]
    x, y, z = simd.load(a, 0), simd.load(b, 0), simd.load(c, 0)
    simd.store(out, 0, x + y)
    simd.store(out, LANES, x - y)
    simd.store(out, 2 * LANES, x * y)
    simd.store(out, 3 * LANES, x / y)
    simd.store(out, 4 * LANES, simd.maximum(x, y))
    simd.store(out, 5 * LANES, simd.fma(x, y, z))
    simd.store(out, 6 * LANES, simd.broadcast(a[3]))


@kernel
def reductions(a):  # type: ignore[no-untyped-def]
    x = simd.load(a, 0)
    return simd.reduce_add(x), simd.reduce_max(x), simd.first_lane(x)


@kernel
def exponentials(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        simd.store(out, i, simd.exp(simd.load(x, i)))


@kernel
def copy_vector(source, index, out, out_index):  # type: ignore[no-untyped-def]
    simd.store(out, out_index, simd.load(source, index))


@kernel
def rank_one_tile(first_row, index, x, w, out, stride):  # type: ignore[no-untyped-def]
    """Three rows of two vectors: starts, takes two rank-1 updates, is stored and then added."""
    tile = simd.start_tile(3, 2, first_row, index)
    for k in range(2):
        tile = simd.outer_product(tile, 3, x, k * 3, 1, w, k * 2 * LANES)
    simd.store_tile(tile, 3, out, 1, stride)
    simd.add_tile(tile, 3, out, 1, stride)


@kernel
def copied_tile(source, index, stride, out, out_stride):  # type: ignore[no-untyped-def]
    simd.store_tile(simd.load_tile(4, source, index, stride), 4, out, 0, out_stride)


@kernel
def counted(counters):  # type: ignore[no-untyped-def]
    before = simd.atomic_add(counters, 1, 5)
    simd.atomic_store(counters, 2, before + 100)
    simd.yield_thread()
    return before, simd.atomic_load(counters, 1), simd.atomic_load(counters, 2)


def exp_of(x: NDArray[np.float32]) -> Matrix:
    padded = np.zeros(-(-x.size // LANES) * LANES, np.float32)
    padded[: x.size] = x
    out = np.empty_like(padded)
    exponentials(padded, out)
    return out[: x.size]


def test_lanes_compute_what_float32_computes() -> None:
    a, b, c = (random_matrix(np.random.default_rng(i), LANES) for i in range(3))
    out = np.empty(7 * LANES, np.float32)
    lane_arithmetic(a, b, c, out)
    total, difference, product, quotient, greater, fused, constant = out.reshape(7, LANES)
    np.testing.assert_array_equal(total, a + b)
    np.testing.assert_array_equal(difference, a - b)
    np.testing.assert_array_equal(product, a * b)
    np.testing.assert_array_equal(quotient, a / b)
    np.testing.assert_array_equal(greater, np.maximum(a, b))
    np.testing.assert_allclose(fused, a.astype(np.float64) * b + c, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(constant, np.full(LANES, a[3]))


@pytest.mark.skipif(not (simd.host_has("fma") or simd.host_has("neon")), reason="the host has no fused add")
def test_fma_rounds_once() -> None:
    """(1 + e)(1 - e) - 1 is -e^2, of which nothing is left if the product is rounded first."""
    e = np.float32(2.0**-12)
    a, b = np.full(LANES, 1 + e, np.float32), np.full(LANES, 1 - e, np.float32)
    out = np.empty(7 * LANES, np.float32)
    lane_arithmetic(a, b, np.full(LANES, -1, np.float32), out)
    np.testing.assert_array_equal(out[5 * LANES : 6 * LANES], np.full(LANES, -(e**2)))


def test_a_sum_is_folded_by_halves() -> None:
    for seed in range(50):
        a = random_matrix(np.random.default_rng(seed), LANES) * np.float32(1e4)
        folded = a
        while folded.size > 1:
            folded = folded[: folded.size // 2] + folded[folded.size // 2 :]
        assert reductions(a)[0] == folded[0]


@pytest.mark.parametrize("lane", range(LANES))
def test_the_greatest_is_found_in_every_lane(lane: int) -> None:
    a = np.full(LANES, -5.0, np.float32)
    a[lane] = -1.0
    assert reductions(a)[1:] == (-1.0, -1.0 if lane == 0 else -5.0)


@pytest.mark.parametrize("index", range(LANES + 1))
def test_vectors_begin_anywhere(index: int) -> None:
    source = np.arange(3 * LANES, dtype=np.float32)
    out = np.full(3 * LANES, -1, np.float32)
    copy_vector(source, index, out, LANES - index)
    expected = np.full(3 * LANES, -1, np.float32)
    expected[LANES - index : 2 * LANES - index] = source[index : index + LANES]
    np.testing.assert_array_equal(out, expected)


def test_exp_is_exactly_one_at_zero() -> None:
    np.testing.assert_array_equal(exp_of(np.array([0.0, -0.0], np.float32)), [1.0, 1.0])


def test_exp_is_exactly_zero_far_below() -> None:
    x = np.array([-87.34, -88.0, -104.0, -1e4, -1e30, -3.4e38, -INF], np.float32)
    np.testing.assert_array_equal(exp_of(x), np.zeros(x.size, np.float32))


def test_exp_stays_finite_far_above() -> None:
    x = np.array([88.37, 88.7, 89.0, 1e4, 3.4e38, INF], np.float32)
    result = exp_of(x)
    assert np.isfinite(result).all()
    assert (result > 2e38).all()


def test_exp_of_nan_is_nan() -> None:
    assert np.isnan(exp_of(np.array([NAN, 0.0], np.float32))).tolist() == [True, False]


def test_exp_is_within_two_units_in_the_last_place() -> None:
    near_zero = np.geomspace(1e-38, 1.0, 20_000)
    x = np.concatenate([np.linspace(-87.33, 88.37, 400_000), near_zero, -near_zero]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    units = np.abs(exp_of(x) - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() <= 2.0


def test_exp_where_the_power_of_two_changes() -> None:
    """Around odd multiples of ln(2) / 2, where rounding to the nearest power goes the other way."""
    middles = ((np.arange(-126, 127) + 0.5) * np.log(2)).astype(np.float32)
    x = np.concatenate([np.nextafter(middles, -INF), middles, np.nextafter(middles, INF)])
    x = x[(x > -87.33) & (x < 88.37)]
    np.testing.assert_allclose(exp_of(x), np.exp(x.astype(np.float64)), rtol=2.5e-7)


def test_a_tile_takes_rank_one_updates_and_touches_nothing_else() -> None:
    rng = np.random.default_rng(0)
    first_row = rng.integers(-9, 9, 3 + 2 * LANES).astype(np.float32)
    x, w = (rng.integers(-9, 9, shape).astype(np.float32) for shape in ((2, 3), (2, 2 * LANES)))
    stride = 2 * LANES + 3
    out = np.full(1 + 3 * stride, NAN, np.float32)
    rank_one_tile(first_row, 3, x.reshape(-1), w.reshape(-1), out, stride)
    rows = out[1:].reshape(3, stride)
    np.testing.assert_array_equal(rows[:, : 2 * LANES], 2 * (first_row[3:] + x.T @ w))
    assert np.isnan(rows[:, 2 * LANES :]).all()
    assert np.isnan(out[0])


def test_a_tile_is_read_row_by_row() -> None:
    source = np.arange(100, dtype=np.float32)
    out = np.empty(4 * LANES, np.float32)
    copied_tile(source, 2, 19, out, LANES)
    expected = [source[2 + 19 * row : 2 + 19 * row + LANES] for row in range(4)]
    np.testing.assert_array_equal(out.reshape(4, LANES), expected)


def test_counters_count() -> None:
    counters = np.array([1, 2, 3], np.int64)
    assert counted(counters) == (2, 7, 102)
    assert counters.tolist() == [1, 7, 102]


def test_only_whole_float32_arrays_are_vectors() -> None:
    with pytest.raises(Exception, match="C-contiguous float32"):
        copy_vector(np.zeros(LANES, np.float64), 0, np.zeros(LANES, np.float32), 0)
    with pytest.raises(Exception, match="C-contiguous float32"):
        copy_vector(np.zeros(2 * LANES, np.float32)[::2], 0, np.zeros(LANES, np.float32), 0)
