"""The vector intrinsics: what a lane computes, the order of sums, exp, tiles, short numbers, choices."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pagellm.kernels import simd
from pagellm.kernels.jit import kernel
from pagellm.kernels.simd import LANES
from tests import oracles
from tests.kernels.layouts import Matrix, int4_starts, int8_values, poisoned, random_matrix

Levels = NDArray[Any]

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
def rank_one_tile(first_row, index, x, w, out, stride, accumulate):  # type: ignore[no-untyped-def]
    """Three rows of two vectors: starts, takes two rank-1 updates, is written."""
    tile = simd.start_tile(3, 2, first_row, index)
    for k in range(2):
        tile = simd.outer_product(tile, 3, x, k, 5, w, k * 2 * LANES)
    simd.write_tile(tile, 3, out, 1, stride, accumulate)


@kernel
def rank_one_float16_tile(first_row, x, w, out):  # type: ignore[no-untyped-def]
    tile = simd.outer_product_float16(simd.start_tile(3, 2, first_row, 0), 3, x, 1, 5, w, 3)
    simd.write_tile(tile, 3, out, 0, 2 * LANES, False)


@kernel
def rank_one_bfloat16_tile(first_row, x, w, out):  # type: ignore[no-untyped-def]
    tile = simd.outer_product_bfloat16(simd.start_tile(3, 2, first_row, 0), 3, x, 1, 5, w, 3)
    simd.write_tile(tile, 3, out, 0, 2 * LANES, False)


@kernel
def scattered_tile(first_row, x, w, places, out):  # type: ignore[no-untyped-def]
    """Like `rank_one_tile` with one update, by vectors that lie anywhere."""
    tile = simd.outer_product(simd.start_tile(3, 2, first_row, 0), 3, x, 1, 5, w, places)
    simd.write_tile(tile, 3, out, 0, 2 * LANES, False)


@kernel
def bfloat16_tile(first_row, x, w, out):  # type: ignore[no-untyped-def]
    tile = simd.dot_bfloat16(simd.start_tile(3, 2, first_row, 0), 3, x, 1, 5, w, 3)
    simd.write_tile(tile, 3, out, 0, 2 * LANES, False)


@kernel
def int8_tile(starts, x, w, scales, halves, zeros, out):  # type: ignore[no-untyped-def]
    """Four rows of two vectors: each row's start, two words of products, all of it scaled."""
    ints = simd.start_int_tile(4, 2, starts, 1, 3)
    for word in range(2):
        ints = simd.dot_int8(ints, 4, x, 1 + word, 5, w, 3 + word * 2 * LANES)
    tile = simd.add_scaled_float16(simd.start_tile(4, 2, zeros, 0), ints, 4, scales, 1, 3, halves, 3)
    simd.write_tile(tile, 4, out, 0, 2 * LANES, False)


@kernel
def int4_tile(starts, x, w, scales, halves, zeros, out):  # type: ignore[no-untyped-def]
    ints = simd.start_int_tile(4, 2, starts, 1, 3)
    for word in range(2):
        ints = simd.dot_int4(ints, 4, x, 1 + word, 9, w, 3 + word * 2 * LANES)
    ints = simd.int4_sums(ints)
    tile = simd.add_scaled_float16(simd.start_tile(4, 2, zeros, 0), ints, 4, scales, 1, 3, halves, 3)
    simd.write_tile(tile, 4, out, 0, 2 * LANES, False)


@kernel
def from_bfloat16(words, out):  # type: ignore[no-untyped-def]
    for i in range(0, out.size, LANES):
        simd.store(out, i, simd.load_bfloat16(words, i // 2))


@kernel
def to_bfloat16(x, words):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        simd.store_bfloat16(words, i // 2, simd.load(x, i))


@kernel
def from_float16(words, one, minus_zero, out):  # type: ignore[no-untyped-def]
    """minus_zero + one * each, which is each with its sign, a zero's too."""
    for i in range(0, out.size, LANES):
        tile = simd.start_tile(1, 1, minus_zero, 0)
        tile = simd.outer_product_float16(tile, 1, one, 0, 1, words, i // 2)
        simd.write_tile(tile, 1, out, i, 0, False)


@kernel
def to_int8(x, words, index):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        simd.store_int8(words, index + i // 4, simd.load(x, i))


@kernel
def int32_through_a_word(words, index, value):  # type: ignore[no-untyped-def]
    simd.store_int32(words, index, np.int32(value))
    return simd.load_int32(words, index)


@kernel
def chosen(x, bound, one, other, out):  # type: ignore[no-untyped-def]
    lanes = simd.where_at_least(simd.load(x, 0), simd.load(bound, 0), simd.load(one, 0), simd.load(other, 0))
    simd.store(out, 0, lanes)


@kernel
def kept_within(x, low, high, out, index):  # type: ignore[no-untyped-def]
    return simd.store_within(out, index, simd.load(x, 0), simd.broadcast(low), simd.broadcast(high))


@kernel
def magnitudes_and_whole_numbers(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        simd.store(out, i, simd.absolute(simd.load(x, i)))
        simd.store(out, x.size + i, simd.nearest(simd.load(x, i)))


@kernel
def asked_ahead(array, index):  # type: ignore[no-untyped-def]
    simd.prefetch(array, index)
    return array[0]


@kernel
def counted(counters):  # type: ignore[no-untyped-def]
    before = simd.atomic_add(counters, 1, 5)
    simd.atomic_store(counters, 2, before + 100)
    simd.yield_thread()
    first = simd.atomic_exchange(counters, 0, 9)
    return first, before, simd.atomic_load(counters, 1), simd.atomic_load(counters, 2)


@kernel
def called_again(thread, numbers, factor, out):  # type: ignore[no-untyped-def]
    """Call 0 makes calls 1 and 2 before it does its own share."""
    if thread == 0:
        code, arguments = simd.this_call()
        simd.call_again(code, arguments, 1)
        simd.call_again(code, arguments, 2)
    out[thread] = numbers[thread] * factor


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


# Tiles


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_tile_takes_rank_one_updates_and_touches_nothing_else(accumulate: bool) -> None:
    rng = np.random.default_rng(0)
    first_row = rng.integers(-9, 9, 3 + 2 * LANES).astype(np.float32)
    x = np.full((3, 5), NAN, np.float32)
    x[:, :2] = rng.integers(-9, 9, (3, 2))
    w = rng.integers(-9, 9, (2, 2 * LANES)).astype(np.float32)
    stride = 2 * LANES + 3
    out = np.full(1 + 3 * stride, NAN, np.float32)
    rows = out[1:].reshape(3, stride)
    if accumulate:
        rows[:, : 2 * LANES] = np.arange(2 * LANES)
    before = np.nan_to_num(rows[:, : 2 * LANES])
    rank_one_tile(first_row, 3, x.reshape(-1), w.reshape(-1), out, stride, accumulate)
    np.testing.assert_array_equal(rows[:, : 2 * LANES], before + first_row[3:] + x[:, :2] @ w)
    assert np.isnan(rows[:, 2 * LANES :]).all()
    assert np.isnan(out[0])


def test_a_tile_that_is_written_may_replace_what_is_no_number() -> None:
    zeros, out = np.zeros(2 * LANES, np.float32), np.full(1 + 6 * LANES, NAN, np.float32)
    rank_one_tile(zeros, 0, np.zeros(15, np.float32), np.zeros(4 * LANES, np.float32), out, 2 * LANES, False)
    assert not out[1:].any()


def strided(rows: NDArray[Any], stride: int) -> Matrix:
    """The words of rows, the first at index 1, the others `stride` words apart, with poison between them."""
    words = np.ascontiguousarray(rows).view(np.float32).reshape(len(rows), -1)
    out = poisoned(1 + len(rows) * stride)
    for row, values in enumerate(words):
        out[1 + row * stride :][: values.size] = values
    return out


def shifted(words: NDArray[Any]) -> Matrix:
    """Words that begin at index 3, so that no vector is aligned."""
    return np.concatenate([poisoned(3), np.ascontiguousarray(words).reshape(-1).view(np.float32)])


def test_a_tile_takes_float16_columns() -> None:
    rng = np.random.default_rng(0)
    first_row, x = random_matrix(rng, 2 * LANES), random_matrix(rng, 3)
    w = rng.standard_normal(2 * LANES).astype(np.float16)
    w[:4] = 6e-8, -6e-5, 65504, -0.0
    out = np.empty((3, 2 * LANES), np.float32)
    rank_one_float16_tile(first_row, strided(x[:, None], 5), shifted(w), out.reshape(-1))
    exact = first_row + np.outer(x.astype(np.float64), w.astype(np.float64))
    np.testing.assert_allclose(out, exact, rtol=3e-7, atol=1e-6)


def bfloat16_words(x: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper halves of floats that bfloat16 can hold."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bfloat16_inputs(x: NDArray[Any]) -> NDArray[Any]:
    """Rows that bfloat16 can hold as `dot_bfloat16` takes them."""
    return bfloat16_words(x) if simd.PAIR_WORDS == 1 else x.astype(np.float32)


def test_a_tile_takes_rank_one_updates_of_bfloat16() -> None:
    rng = np.random.default_rng(0)
    first_row, x = random_matrix(rng, 2 * LANES), random_matrix(rng, 3)
    w = oracles.bfloat16(rng.standard_normal(2 * LANES))
    out = np.empty((3, 2 * LANES), np.float32)
    words = shifted(bfloat16_words(w))
    rank_one_bfloat16_tile(first_row, strided(x[:, None], 5), words, out.reshape(-1))
    exact = first_row + np.outer(x.astype(np.float64), w)
    np.testing.assert_allclose(out, exact, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("places", [(0, LANES), (7, 40), (40, 7), (5, 5)])
def test_the_columns_of_a_tile_may_lie_anywhere(places: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    first_row, x, w = random_matrix(rng, 2 * LANES), random_matrix(rng, 3), random_matrix(rng, 64)
    out = np.empty((3, 2 * LANES), np.float32)
    scattered_tile(first_row, strided(x[:, None], 5), w, places, out.reshape(-1))
    columns = np.concatenate([w[place : place + LANES] for place in places])
    exact = first_row + np.outer(x.astype(np.float64), columns)
    np.testing.assert_allclose(out, exact, rtol=3e-7, atol=1e-6)


def test_pairs_of_bfloat16_are_multiplied_and_added() -> None:
    rng = np.random.default_rng(0)
    for magnitude in (1e-10, 1.0, 1e10):
        first_row = random_matrix(rng, 2 * LANES)
        x = oracles.bfloat16(rng.standard_normal((3, 2)) * magnitude)
        w = oracles.bfloat16(rng.standard_normal((2 * LANES, 2)) / magnitude)
        out = np.empty((3, 2 * LANES), np.float32)
        bfloat16_tile(first_row, strided(bfloat16_inputs(x), 5), shifted(bfloat16_words(w)), out.reshape(-1))
        np.testing.assert_allclose(out, first_row + x @ w.T, rtol=0, atol=3e-6)


def test_pairs_of_small_bfloat16_integers_are_exact() -> None:
    rng = np.random.default_rng(0)
    first_row = rng.integers(-9, 9, 2 * LANES).astype(np.float32)
    x, w = rng.integers(-256, 257, (3, 2)), rng.integers(-256, 257, (2 * LANES, 2))
    out = np.empty((3, 2 * LANES), np.float32)
    bfloat16_tile(first_row, strided(bfloat16_inputs(x), 5), shifted(bfloat16_words(w)), out.reshape(-1))
    np.testing.assert_array_equal(out, first_row + x @ w.T)


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_a_pair_of_bfloat16_with_no_number_is_none(special: float) -> None:
    for place in (0, 1):
        x, w = np.ones((3, 2)), np.ones((2 * LANES, 2))
        x[1, place] = special
        out = np.empty((3, 2 * LANES), np.float32)
        zeros = np.zeros(2 * LANES, np.float32)
        bfloat16_tile(zeros, strided(bfloat16_inputs(x), 5), shifted(bfloat16_words(w)), out.reshape(-1))
        np.testing.assert_array_equal(out[1], np.full(2 * LANES, special))
        np.testing.assert_array_equal(out[[0, 2]], np.full((2, 2 * LANES), 2.0))


def scaled(sums: NDArray[np.int64], scales: Matrix, halves: NDArray[np.float16]) -> NDArray[np.float64]:
    return sums * (scales[:, None].astype(np.float64) * halves.astype(np.float64))


UNITS = np.ones(4, np.float32), np.ones(2 * LANES, np.float16)


def int8_products(x: Levels, w: Levels, starts: Levels, factors: Any = UNITS) -> Matrix:
    """What the kernel makes of x [4, 8] from -127 and uint8 w [2 * LANES, 8]."""
    scales, halves = factors
    by_word = w.astype(np.uint8).reshape(2 * LANES, 2, 4).transpose(1, 0, 2)
    out = np.empty((4, 2 * LANES), np.float32)
    int8_tile(
        strided(starts.astype(np.int32)[:, None], 3), strided(x.astype(np.int8), 5), shifted(by_word),
        strided(scales[:, None], 3), shifted(halves), np.zeros(2 * LANES, np.float32), out.reshape(-1),
    )  # fmt: skip
    return out


def int4_products(x: Levels, w: Levels, starts: Levels, factors: Any = UNITS) -> Matrix:
    """What the kernel makes of int8 x [4, 32] and uint4 w [2 * LANES, 16]; words 0, 1, 4 and 5 of x count.

    The first eight of w are the low nibbles of two words, the others their high nibbles.
    """
    scales, halves = factors
    bytes = (w[:, :8] | w[:, 8:] << 4).astype(np.uint8)
    by_word = bytes.reshape(2 * LANES, 2, 4).transpose(1, 0, 2)
    out = np.empty((4, 2 * LANES), np.float32)
    int4_tile(
        strided(starts.astype(np.int32)[:, None], 3), strided(x.astype(np.int8), 9), shifted(by_word),
        strided(scales[:, None], 3), shifted(halves), np.zeros(2 * LANES, np.float32), out.reshape(-1),
    )  # fmt: skip
    return out


def int8_sums(x: Levels, w: Levels) -> Levels:
    """The sums of products [4, 2 * LANES] that these bytes have."""
    return x @ (int8_values(w) + simd.INT8_OFFSET).T


def test_products_of_bytes_are_exact() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, w = rng.integers(-127, 128, (4, 8)), rng.integers(0, 256, (2 * LANES, 8))
        starts = rng.integers(-500_000, 500_000, 4)
        np.testing.assert_array_equal(int8_products(x, w, starts), starts[:, None] + int8_sums(x, w))


def test_products_of_the_greatest_bytes_are_exact() -> None:
    for a in (-127, -126, 127):
        for b in (0, 1, 127, 128, 129, 255):
            x, w = np.full((4, 8), a), np.full((2 * LANES, 8), b)
            np.testing.assert_array_equal(int8_products(x, w, np.zeros(4)), int8_sums(x, w))


def test_each_byte_meets_its_own() -> None:
    for i in range(8):
        for j in range(8):
            x, w = np.zeros((4, 8), int), np.zeros((2 * LANES, 8), int)
            x[:, i], w[:, j] = -127, 255
            np.testing.assert_array_equal(int8_products(x, w, np.zeros(4)), int8_sums(x, w))


def test_products_of_nibbles_are_exact() -> None:
    rng = np.random.default_rng(0)
    met = [*range(8), *range(16, 24)]
    for _ in range(50):
        x, w = rng.integers(-128, 128, (4, 32)), rng.integers(0, 16, (2 * LANES, 16))
        starts = 2 * rng.integers(-16_000, 16_000, 4)
        found = int4_products(x, w, int4_starts(starts))
        np.testing.assert_array_equal(found, starts[:, None] + x[:, met] @ w.T)


def test_each_nibble_meets_its_own() -> None:
    met = [*range(8), *range(16, 24)]
    for i in range(16):
        for j in range(16):
            x, w = np.zeros((4, 32), int), np.zeros((2 * LANES, 16), int)
            x[:, met[i]], w[:, j] = -128, 15
            np.testing.assert_array_equal(int4_products(x, w, np.zeros(4)), x[:, met] @ w.T)


def test_sums_of_bytes_are_scaled() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.integers(-127, 128, (4, 8)), rng.integers(0, 256, (2 * LANES, 8))
    scales, halves = random_matrix(rng, 4), rng.standard_normal(2 * LANES).astype(np.float16)
    halves[:4] = 6e-8, -6e-5, 65504, -0.0
    found = int8_products(x, w, np.zeros(4), (scales, halves))
    np.testing.assert_allclose(found, scaled(int8_sums(x, w), scales, halves), rtol=3e-7)


@pytest.mark.parametrize("special", [NAN, INF])
def test_a_scale_that_is_no_number_shows(special: float) -> None:
    scales = np.array([1, special, 1, 1], np.float32)
    found = int8_products(np.ones((4, 8)), np.ones((2 * LANES, 8)), np.zeros(4), (scales, UNITS[1]))
    assert np.isfinite(found).all(axis=1).tolist() == [True, False, True, True]
    assert not np.isfinite(found[1]).any()


# Short numbers


def test_every_bfloat16_is_read_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(bits.size, np.float32)
    from_bfloat16(bits.view(np.float32), out)
    np.testing.assert_array_equal(out.view(np.uint32), bits.astype(np.uint32) << 16)


def as_bfloat16(x: Matrix) -> Matrix:
    words = np.empty(x.size // 2, np.float32)
    to_bfloat16(x, words)
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def test_bfloat16_are_rounded_to_the_nearest_ties_to_the_even_one() -> None:
    """Around every bfloat16 of either sign: itself, the tie behind it, and their neighbours."""
    exact = np.arange(1 << 16, dtype=np.uint32) << 16
    for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (exact + np.uint32(offset)).view(np.float32)
        x = x[np.isfinite(x)]
        np.testing.assert_array_equal(as_bfloat16(x), oracles.bfloat16(x).astype(np.float32))


def test_random_floats_become_bfloat16() -> None:
    x = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint32).view(np.float32)
    x = np.where(np.isnan(x), np.float32(0), x)
    np.testing.assert_array_equal(as_bfloat16(x), oracles.bfloat16(x).astype(np.float32))


def test_what_is_no_number_is_none_as_bfloat16() -> None:
    """Also a NaN whose bits would round over into infinity or zero."""
    kinds = [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001]
    bits = np.array(kinds * LANES, np.uint32)
    assert np.isnan(as_bfloat16(bits.view(np.float32))).all()
    infinities = np.array([INF, -INF] * LANES, np.float32)
    np.testing.assert_array_equal(as_bfloat16(infinities), infinities)


def test_every_finite_float16_is_read_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16)
    out = np.empty(bits.size, np.float32)
    one, minus_zero = np.ones(1, np.float32), np.full(LANES, -0.0, np.float32)
    from_float16(bits.view(np.float32), one, minus_zero, out)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(
        out[finite].view(np.uint32), values[finite].astype(np.float32).view(np.uint32)
    )


def test_whole_numbers_become_int8_and_touch_nothing_else() -> None:
    x = np.arange(-128, 128, dtype=np.float32)
    words = np.full(66, 7.0, np.float32)
    to_int8(x, words, 1)
    np.testing.assert_array_equal(words[1:-1].view(np.int8), np.arange(-128, 128))
    assert words[[0, -1]].tolist() == [7.0, 7.0]


@pytest.mark.parametrize("value", [0, 1, -1, 2**31 - 1, -(2**31), 0x7FC00000, 0x7F800001, 1 << 20])
def test_a_word_holds_any_int32(value: int) -> None:
    """Also one that is no number as a float."""
    words = np.full(3, 7.0, np.float32)
    assert int32_through_a_word(words, 1, value) == value
    assert words.view(np.int32)[1] == value
    assert words[[0, 2]].tolist() == [7.0, 7.0]


def test_magnitudes_and_the_nearest_whole_numbers() -> None:
    special = [0.49999997, -0.49999997, 8388607.5, 1e30, -INF, INF, -0.0, 3]
    x = np.concatenate([np.arange(-8, 8, 0.25), special])
    x = np.pad(x, (0, -x.size % LANES)).astype(np.float32)
    out = np.empty(2 * x.size, np.float32)
    magnitudes_and_whole_numbers(x, out)
    np.testing.assert_array_equal(out[: x.size].view(np.uint32), np.abs(x).view(np.uint32))
    np.testing.assert_array_equal(out[x.size :], np.rint(x))


# Choices


def test_lanes_are_chosen_where_they_reach_a_bound() -> None:
    x, bound = np.full(LANES, 1, np.float32), np.full(LANES, 1, np.float32)
    x[:8] = 0.5, 1.5, np.nextafter(np.float32(1), np.float32(0)), INF, -INF, NAN, 1, NAN
    bound[6:8] = NAN
    one, other = np.arange(LANES, dtype=np.float32), -np.arange(LANES, dtype=np.float32)
    out = np.empty(LANES, np.float32)
    chosen(x, bound, one, other, out)
    np.testing.assert_array_equal(out, np.where(x >= bound, one, other))


def test_lanes_within_bounds_are_stored_side_by_side() -> None:
    """For any pattern of lanes: those kept, in their order, how many, and nothing behind the vector."""
    rng = np.random.default_rng(0)
    patterns = [*(1 << np.arange(LANES)), 0, (1 << LANES) - 1, *rng.integers(0, 1 << LANES, 500)]
    for pattern in patterns:
        inside = (int(pattern) >> np.arange(LANES) & 1).astype(bool)
        outside = rng.choice(np.array([-1.5, 1.5, INF, -INF, NAN], np.float32), LANES)
        x = np.where(inside, rng.uniform(-1, 1, LANES).astype(np.float32), outside)
        x = np.where(inside & (rng.random(LANES) < 0.2), np.float32(1.0), x)
        out = np.full(3 * LANES, 7.0, np.float32)
        count = kept_within(x, np.float32(-1), np.float32(1), out, 5)
        assert count == inside.sum()
        np.testing.assert_array_equal(out[5 : 5 + count], x[inside])
        assert (out[:5] == 7.0).all()
        assert (out[5 + LANES :] == 7.0).all()


def test_no_bounds_keep_all_but_what_is_no_number() -> None:
    x = np.array([NAN, INF, -INF, *range(LANES - 3)], np.float32)
    out = np.empty(LANES, np.float32)
    assert kept_within(x, -INF, INF, out, 0) == LANES - 1
    np.testing.assert_array_equal(out[: LANES - 1], x[1:])


# Memory


@pytest.mark.parametrize("index", [0, 3, -1, 1 << 20, 1 << 40, -(1 << 40)])
def test_anything_may_be_asked_for_ahead_of_its_use(index: int) -> None:
    assert asked_ahead(np.full(4, 5.0, np.float32), index) == 5.0


def test_counters_count() -> None:
    counters = np.array([1, 2, 3], np.int64)
    assert counted(counters) == (1, 2, 7, 102)
    assert counters.tolist() == [9, 7, 102]


def test_a_call_is_made_again_with_another_first_argument() -> None:
    numbers, out = np.array([2.0, 3.0, 5.0], np.float32), np.zeros(3)
    called_again(0, numbers, 1.5, out)
    assert out.tolist() == [3.0, 4.5, 7.5]


def test_only_whole_float32_arrays_are_vectors() -> None:
    with pytest.raises(Exception, match="C-contiguous float32"):
        copy_vector(np.zeros(LANES, np.float64), 0, np.zeros(LANES, np.float32), 0)
    with pytest.raises(Exception, match="C-contiguous float32"):
        copy_vector(np.zeros(2 * LANES, np.float32)[::2], 0, np.zeros(LANES, np.float32), 0)
