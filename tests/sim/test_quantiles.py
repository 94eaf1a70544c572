"""Quantiles against NumPy's: exact ones equal, those of the histogram within half a percent."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.sim.quantiles import Exact, LogHistogram

SHARES = [0, 0.001, 0.25, 0.5, 0.9, 0.95, 0.99, 1]
seconds = st.floats(1e-6, 1e5)


@given(st.lists(seconds, min_size=1))
def test_exact_quantiles_are_numpys(values: list[float]) -> None:
    exact = Exact()
    for value in values:
        exact.add(value)
    assert exact.quantiles(SHARES) == pytest.approx(np.quantile(values, SHARES).tolist(), rel=1e-12)
    summary = exact.summary()
    assert list(summary) == ["count", "mean", "min", "p50", "p90", "p95", "p99", "max"]
    assert summary["count"] == len(values)
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["p95"] == pytest.approx(np.quantile(values, 0.95))
    assert (summary["min"], summary["max"]) == (min(values), max(values))


@given(st.lists(st.tuples(st.just(0.0) | seconds, st.integers(1, 20)), min_size=1))
def test_a_histogram_is_off_by_half_a_percent_at_most(counted: list[tuple[float, int]]) -> None:
    histogram = LogHistogram()
    for value, count in counted:
        histogram.add(value, count)
    values = [value for value, count in counted for _ in range(count)]
    expected = np.quantile(values, SHARES).tolist()
    assert histogram.quantiles(SHARES) == pytest.approx(expected, rel=0.005 + 1e-9, abs=0)
    assert histogram.quantiles(reversed(SHARES)) == histogram.quantiles(SHARES)[::-1]
    summary = histogram.summary()
    assert (summary["count"], summary["min"], summary["max"]) == (len(values), min(values), max(values))
    assert summary["mean"] == pytest.approx(math.fsum(values) / len(values))


@given(st.lists(seconds), st.lists(seconds))
def test_histograms_add_up(some: list[float], others: list[float]) -> None:
    one, two, both = LogHistogram(), LogHistogram(), LogHistogram()
    for histograms, values in (((one, both), some), ((two, both), others)):
        for histogram in histograms:
            for value in values:
                histogram.add(value)
    one.merge(two)
    assert len(one) == len(both)
    if both:
        assert one.quantiles(SHARES) == both.quantiles(SHARES)
        assert one.summary() == pytest.approx(both.summary())


def test_a_histogram_stays_small() -> None:
    histogram = LogHistogram()
    for exponent in range(-400, 300):
        for digit in range(1, 10):
            histogram.add(digit * 10.0**exponent)
    for value in np.geomspace(1e-9, 1e6, 20_000):
        histogram.add(float(value))
    assert len(histogram._counts) < 3500


def test_nothing_measured_is_no_number() -> None:
    for empty in (Exact(), LogHistogram()):
        summary = empty.summary()
        assert summary.pop("count") == 0
        assert set(summary.values()) == {None}
