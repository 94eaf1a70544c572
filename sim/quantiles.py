"""Distributions of measured values: exact from all of them, or from a histogram of fixed size."""

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from math import ceil, log
from typing import TypedDict


class Distribution(TypedDict):
    """What was measured; all but the count are None if nothing was."""

    count: int
    mean: float | None
    min: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None


def quantiles(ordered: Sequence[float], shares: Iterable[float]) -> list[float]:
    """The values below which these shares, 0 to 1, of all lie; there must be some values, in order.

    Between two values it is interpolated linearly, as NumPy does by default.
    """
    return _interpolated(ordered.__getitem__, len(ordered), shares)


class Exact:
    """All values, 8 bytes each."""

    def __init__(self) -> None:
        self._values = array("d")
        self.add = self._values.append

    def __len__(self) -> int:
        return len(self._values)

    def quantiles(self, shares: Iterable[float]) -> list[float]:
        """As the function."""
        return quantiles(sorted(self._values), shares)

    def summary(self) -> Distribution:
        """The distribution of the values."""
        return _summary(self, len(self._values), math.fsum(self._values))


class LogHistogram:
    """Counts in bins whose bounds grow by 1 %, so that a quantile is off by 0.5 % of its value at most.

    A value stands for all others of its bin (DDSketch: Masson et al., VLDB 2019). Two histograms add up.
    Values from a nanosecond to a million seconds have their own bins, below 3,500 of them; all others count
    as the nearest of these, except that 0 stays 0. Count, sum, smallest and largest value are exact.
    """

    _ACCURACY = 0.005
    _GROWTH = (1 + _ACCURACY) / (1 - _ACCURACY)
    _PER_LOG = 1 / math.log(_GROWTH)
    _SMALLEST, _LARGEST = 1e-9, 1e6
    _ZERO = -(10**9)  # the bin of 0, before all others

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._count = 0
        self._sum = 0.0
        self._min, self._max = math.inf, -math.inf

    def __len__(self) -> int:
        return self._count

    def add(self, value: float, count: int = 1) -> None:
        """Counts a value, from 0, so many times."""
        key = self._bin(value)
        self._counts[key] = self._counts.get(key, 0) + count
        self._count += count
        self._sum += value * count
        if value < self._min:
            self._min = value
        if value > self._max:
            self._max = value

    def add_each(self, values: Sequence[float], count: int) -> None:
        """Counts each of several values so many times, as `add` does one after the other."""
        if not values:
            return
        low, high = min(values), max(values)
        key = self._bin(low)
        if key == self._bin(high):
            self._counts[key] = self._counts.get(key, 0) + count * len(values)
        else:
            for key in map(self._bin, values):
                self._counts[key] = self._counts.get(key, 0) + count
        self._count += count * len(values)
        total = self._sum
        for value in values:
            total += value * count
        self._sum = total
        self._min, self._max = min(self._min, low), max(self._max, high)

    def merge(self, other: "LogHistogram") -> None:
        """Counts all that another one has counted."""
        for key, count in other._counts.items():
            self._counts[key] = self._counts.get(key, 0) + count
        self._count += other._count
        self._sum += other._sum
        self._min, self._max = min(self._min, other._min), max(self._max, other._max)

    def quantiles(self, shares: Iterable[float]) -> list[float]:
        """As the function, off by half a percent at most."""
        keys = sorted(self._counts)
        reached, total = [], 0
        for key in keys:
            total += self._counts[key]
            reached.append(total)
        place = 0

        def at_rank(rank: int) -> float:
            nonlocal place
            if rank in (0, self._count - 1):
                return self._max if rank else self._min
            while place and reached[place - 1] > rank:
                place -= 1
            while reached[place] <= rank:
                place += 1
            return self._value(keys[place])

        return _interpolated(at_rank, self._count, shares)

    def summary(self) -> Distribution:
        """The distribution of the values; percentiles are off by half a percent at most."""
        return _summary(self, self._count, self._sum)

    def _bin(self, value: float) -> int:
        if not self._SMALLEST <= value <= self._LARGEST:
            if value <= 0:
                return self._ZERO
            value = min(max(value, self._SMALLEST), self._LARGEST)
        return ceil(log(value) * self._PER_LOG)

    def _value(self, key: int) -> float:
        if key == self._ZERO:
            return 0.0
        middle = 2 * self._GROWTH**key / (self._GROWTH + 1)
        return min(max(middle, self._min), self._max)


def _summary(values: Exact | LogHistogram, count: int, total: float) -> Distribution:
    low: float | None
    low = p50 = p90 = p95 = p99 = high = None
    if count:
        low, p50, p90, p95, p99, high = values.quantiles((0.0, 0.5, 0.9, 0.95, 0.99, 1.0))
    mean = total / count if count else None
    return {
        "count": count,
        "mean": mean,
        "min": low,
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "max": high,
    }


def _interpolated(at_rank: Callable[[int], float], count: int, shares: Iterable[float]) -> list[float]:
    quantiles = []
    for share in shares:
        rank, part = divmod(share * (count - 1), 1)
        low = at_rank(int(rank))
        high = at_rank(min(int(rank) + 1, count - 1))
        quantiles.append(low + (high - low) * part)
    return quantiles
