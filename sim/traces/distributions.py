"""Random lengths, durations and arrival times, each described by a short text such as "lognormal:512,1".

A description becomes a function of a `random.Random`, so that whoever seeds it determines every draw.
"""

import math
import os
from array import array
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from random import Random
from typing import TypeVar

from pagellm.sim.traces.request import MAX_LEN, bad_value
from pagellm.sim.traces.trace import Trace

Draw = Callable[[Random], float]
DrawLength = Callable[[Random], int]
Arrivals = Callable[[Random], Iterator[float]]
T = TypeVar("T")

MAX_ZIPF = 2**20


def duration(name: str, spec: str) -> Draw:
    """Seconds: "fixed:X", "uniform:LOW,HIGH", "lognormal:MEDIAN,SIGMA" or "exponential:MEAN".

    SIGMA is the standard deviation of the logarithm. name: what an error, a `TraceError`, calls it.
    """
    return _described(name, spec, _DURATIONS)


def length(name: str, spec: str) -> DrawLength:
    """Tokens, at least 1: as `duration`, rounded, or one of two more.

    "zipf:EXPONENT,MAX" is n with a probability in proportion to n ** -EXPONENT, up to MAX. "empirical:PATH"
    draws from the requests of a trace: their output lengths if name is "output_len", else their prompts'.
    name: what an error, a `TraceError`, calls it.
    """
    kind, _, path = spec.partition(":")
    if kind == "empirical" and path:
        return _empirical(path, name)
    draw = _described(name, spec, _LENGTHS, "empirical:PATH")

    def drawn(random: Random) -> int:
        tokens = round(draw(random))
        return 1 if tokens < 1 else MAX_LEN if tokens > MAX_LEN else tokens

    return drawn


def arrivals(name: str, spec: str) -> Arrivals:
    """Endless times in seconds from 0: "poisson:RATE", "gamma:RATE,CV" or "diurnal:RATE,AMPLITUDE,PERIOD".

    RATE is arrivals a second on average. CV is the coefficient of variation of the gaps: 1 is Poisson, more
    is burstier. The diurnal rate is RATE * (1 + AMPLITUDE * sin(2 pi t / PERIOD)), PERIOD in seconds.
    name: what an error, a `TraceError`, calls it.
    """
    return _described(name, spec, _ARRIVALS)


def zipf(exponent: float, size: float) -> DrawLength:
    """Numbers from 1 to size, n with a probability in proportion to n ** -exponent."""
    _require(1 <= size <= MAX_ZIPF and size == int(size) and exponent <= 100)
    cumulative = array("d", accumulate(n**-exponent for n in range(1, int(size) + 1)))
    return lambda random: min(bisect(cumulative, random.random() * cumulative[-1]) + 1, len(cumulative))


def _fixed(value: float) -> Draw:
    return lambda _: value


def _uniform(low: float, high: float) -> Draw:
    _require(low <= high)
    return lambda random: random.uniform(low, high)


def _uniform_integers(low: float, high: float) -> Draw:
    """Each length from low to high is as likely; rounding would halve the two ends."""
    _require(low <= high and low == int(low) and high == int(high))
    return lambda random: low + int(random.random() * (high - low + 1))


def _lognormal(median: float, sigma: float) -> Draw:
    _require(median > 0 and sigma <= 10)
    mu = math.log(median)
    return lambda random: random.lognormvariate(mu, sigma)


def _exponential(mean: float) -> Draw:
    _require(mean > 0)
    return lambda random: random.expovariate(1 / mean)


def _empirical(path: str | os.PathLike[str], name: str) -> DrawLength:
    requests = Trace.load(path)
    lengths = array("i", (r.output_len if name == "output_len" else r.expected_prompt_len for r in requests))
    return lambda random: lengths[int(random.random() * len(lengths))]


def _poisson(rate: float) -> Arrivals:
    _require(rate > 0)
    return lambda random: accumulate(iter(lambda: random.expovariate(rate), None), initial=0.0)


def _gamma(rate: float, cv: float) -> Arrivals:
    _require(rate > 0 and 0.01 <= cv <= 100)
    shape = cv**-2
    scale = 1 / (rate * shape)
    return lambda random: accumulate(iter(lambda: random.gammavariate(shape, scale), None), initial=0.0)


def _diurnal(rate: float, amplitude: float, period_s: float) -> Arrivals:
    _require(rate > 0 and amplitude <= 1 and period_s > 0)

    def times(random: Random) -> Iterator[float]:
        """Poisson arrivals at the highest rate, thinned to that of the moment (Lewis and Shedler, 1979)."""
        highest = 1 + amplitude
        yield 0.0
        time = 0.0
        while True:
            time += random.expovariate(rate * highest)
            if random.random() * highest < 1 + amplitude * math.sin(2 * math.pi * time / period_s):
                yield time

    return times


_DURATIONS: Mapping[str, tuple[Callable[..., Draw], str]] = {
    "fixed": (_fixed, "X"),
    "uniform": (_uniform, "LOW,HIGH"),
    "lognormal": (_lognormal, "MEDIAN,SIGMA"),
    "exponential": (_exponential, "MEAN"),
}
_LENGTHS: Mapping[str, tuple[Callable[..., Draw], str]] = {
    **_DURATIONS,
    "uniform": (_uniform_integers, "LOW,HIGH"),
    "zipf": (zipf, "EXPONENT,MAX"),
}
_ARRIVALS: Mapping[str, tuple[Callable[..., Arrivals], str]] = {
    "poisson": (_poisson, "RATE"),
    "gamma": (_gamma, "RATE,CV"),
    "diurnal": (_diurnal, "RATE,AMPLITUDE,PERIOD"),
}


def _require(is_in_range: bool) -> None:
    if not is_in_range:
        raise ValueError


def _described(
    name: str, spec: str, kinds: Mapping[str, tuple[Callable[..., T], str]], other: str | None = None
) -> T:
    """What a description makes of its parameters, which are finite numbers from 0."""
    kind, _, argument = spec.partition(":")
    if kind not in kinds:
        forms = [f"{kind}:{parameters}" for kind, (_, parameters) in kinds.items()]
        raise bad_value(name, spec, f"one of {' '.join(forms + ([other] if other else []))}")
    make, parameters = kinds[kind]
    try:
        values = [float(value) for value in argument.split(",")]
        _require(len(values) == len(parameters.split(",")) and all(0 <= v < math.inf for v in values))
        return make(*values)
    except ValueError:
        raise bad_value(name, spec, f"{kind}:{parameters} with numbers in their range") from None
