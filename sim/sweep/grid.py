"""What a sweep runs over: the product of some settings' values, and the limits that a good point keeps.

A setting is a field of `EngineConfig` or one of the replay: how often requests come and who serves them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from types import NoneType, UnionType
from typing import Any, get_args

from pagellm.engine.checks import SMALLEST, number
from pagellm.engine.errors import ConfigError, PagellmError
from pagellm.engine.scheduling.policies import KINDS, load_policy
from pagellm.engine.user_policy import import_policy
from pagellm.sim.report.metrics import SLO_NAMES
from pagellm.sim.sweep.serving import (
    CONFIG_TYPES,
    REPLAY_TYPES,
    SWEEP_SETTINGS,
    Serving,
    Value,
    decides_what_serves,
)

POLICY_SETTINGS = (*KINDS, "router")
SLO_LATENCIES = ("ttft", "tpot", "itl", "e2e", "queue")
SLO_STATISTICS = ("mean", "p50", "p90", "p95", "p99")

_TYPES: dict[str, Any] = CONFIG_TYPES | SWEEP_SETTINGS | REPLAY_TYPES
_EXPECTED = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text"}


class Grid:
    """The product of some settings' values; `axes` has the values of each in the order in which they came.

    Raises `ConfigError` for a name that is no setting, and for one without values.
    """

    def __init__(self, axes: Mapping[str, Iterable[Value]]) -> None:
        self.axes = {name: tuple(dict.fromkeys(values)) for name, values in axes.items()}
        for name, values in self.axes.items():
            _type_of(name)
            if not values:
                raise ConfigError(f"{name}: found no value, expected at least one")

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Grid":
        """A grid from texts such as "policy=fcfs,fair". Raises `ConfigError`."""
        axes: dict[str, list[Value]] = {}
        for text in texts:
            name, equals, values = text.partition("=")
            if not equals:
                raise ConfigError(f"set: found {text!r}, expected key=value,value,...")
            if name in axes:
                raise ConfigError(f"{name}: found twice, expected all of its values together")
            axes[name] = [_parse(name, value) for value in values.split(",")]
        return cls(axes)

    def __len__(self) -> int:
        return math.prod(map(len, self.axes.values()))

    def __iter__(self) -> Iterator[dict[str, Value]]:
        """The settings of each point; the last axis varies fastest."""
        for values in product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))

    def import_policies(self) -> None:
        """Imports policies of one's own, which may lie in the working directory. Raises `ConfigError`."""
        for setting in POLICY_SETTINGS:
            for policy in self.axes.get(setting, ()):
                import_policy(policy, setting)

    def check(self, serving: Serving) -> dict[str, Value]:
        """Raises `ConfigError` for a value that is bad whatever the others are.

        Returns the first values with which anything serves, of the settings that decide that.
        """
        serves = {name: self.axes[name] for name in self.axes if decides_what_serves(name)}
        if not serves and "num_blocks" not in self.axes:
            serving.simulator({})
        base = _first_good(serving, serves)
        for name, values in self.axes.items():
            for value in values if name not in serves and name != "seed" else ():
                serving.simulator({**base, name: value})
                if name in KINDS and value is not None:
                    load_policy(str(value), name)
        return base


def _first_good(serving: Serving, axes: Mapping[str, Iterable[Value]]) -> dict[str, Value]:
    """The first values of settings that say what serves with which anything does. Raises `ConfigError`."""
    first: PagellmError | None = None
    for values in product(*axes.values()):
        base: dict[str, Value] = {"num_blocks": 1, **dict(zip(axes, values, strict=True))}
        try:
            serving.simulator(base)
            return base
        except PagellmError as error:
            first = first or error
    assert first is not None
    raise first


@dataclass(frozen=True)
class Limit:
    """The most that a statistic of a latency may be, in seconds."""

    latency: str
    statistic: str
    seconds: float

    @property
    def name(self) -> str:
        """As it is written: ttft_p99, or ttft where it is of each request."""
        return f"{self.latency}_{self.statistic}" if self.statistic else self.latency

    def value(self, summary: Mapping[str, Any]) -> float | None:
        """What a report's summary has for it, in seconds; None if nothing was measured."""
        value: float | None = summary[f"{self.latency}_s"][self.statistic]
        return value


@dataclass(frozen=True)
class Slo:
    """Limits that are to be kept together: on statistics of all requests, and by a share of requests.

    joint: the most seconds of one request by latency; attainment: the share of requests that keep all of
    these, of those that came after the warm-up.
    """

    limits: tuple[Limit, ...]
    joint: tuple[tuple[str, float], ...] = ()
    attainment: float = 1.0

    @property
    def each(self) -> dict[str, float]:
        """The limits of one request, as `Simulator` has them."""
        return {f"{latency}_s": seconds for latency, seconds in self.joint}

    @classmethod
    def parse(cls, text: str, attainment: float | None = None) -> "Slo":
        """An SLO from a text such as "ttft_p99=1.0,tpot_p99=0.1" or "ttft=1.0,tpot=0.05".

        Those without a statistic are kept together by a share of requests, the attainment, which is needed
        for them. Raises `ConfigError`.
        """
        if attainment is not None:
            number("attainment", attainment, SMALLEST, 1, ConfigError, "a share above 0, up to 1")
        limits = [_parse_limit(part, attainment is not None) for part in text.split(",")]
        names = [limit.name for limit in limits]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"slo: {name}: found twice, expected one limit")
        joint = tuple((limit.latency, limit.seconds) for limit in limits if not limit.statistic)
        if attainment is not None and not joint:
            raise ConfigError(
                f"attainment: found {attainment:g}, expected none without limits such as ttft=1"
            )
        return cls(tuple(limit for limit in limits if limit.statistic), joint, attainment or 1.0)

    def holds(self, summary: Mapping[str, Any]) -> bool:
        """Whether a replay kept it. It did not if anybody gave up or was lost, whatever the latencies are.

        A share of requests counts those that gave up; it is not kept where more came than was served.

        Nothing to measure, such as the TPOT of answers of one token, keeps every limit.
        """
        steady = summary.get("steady") or {}
        attained = steady.get("attainment") or 0.0
        if self.joint and (steady.get("verdict") == "overloaded" or attained < self.attainment):
            return False
        lost = (summary.get(f"num_{how}") for how in ("timed_out", "rejected", "failed"))
        if self.limits and any(lost):
            return False
        values = ((limit.value(summary), limit.seconds) for limit in self.limits)
        return all(value is None or value <= seconds for value, seconds in values)

    def to_dict(self) -> dict[str, float]:
        """Seconds by name."""
        joint = {"attainment": self.attainment} | dict(self.joint) if self.joint else {}
        return {limit.name: limit.seconds for limit in self.limits} | joint

    def words(self) -> str:
        """The same for people."""
        parts = [f"{limit.name} {limit.seconds:g} s" for limit in self.limits]
        if self.joint:
            each = " and ".join(f"{latency} {seconds:g} s" for latency, seconds in self.joint)
            parts.append(f"{self.attainment:.4g} of requests within {each}")
        return ", ".join(parts)


def _type_of(name: str) -> Any:
    """The type of a setting's values; None of a key of a fleet's file, whose values are of any."""
    if "." in name:
        return None
    if name not in _TYPES:
        expected = f"one of {', '.join(_TYPES)}, or of a fleet's file GROUP.KEY"
        raise ConfigError(f"set: found key {name!r}, expected {expected}")
    return _TYPES[name]


def _parse(name: str, text: str) -> Value:
    kind = _type_of(name)
    if kind is None:
        return _any_value(text)
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if NoneType in kinds and text.lower() == "none":
        return None
    try:
        value: Value = _PARSERS[kinds[0]](text)
        return value
    except (ValueError, KeyError):
        or_none = " or none" if NoneType in kinds else ""
        raise ConfigError(f"{name}: found {text!r}, expected {_EXPECTED[kinds[0]]}{or_none}") from None


def _any_value(text: str) -> Value:
    """A number, true, false or none where it is one, else a text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for parse in (int, _finite):
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _text(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}
_PARSERS: dict[type, Any] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: _finite,
    str: _text,
}


def _parse_limit(text: str, may_be_joint: bool) -> Limit:
    name, _, given = text.partition("=")
    latency, _, statistic = name.partition("_")
    is_each = may_be_joint and not statistic and f"{latency}_s" in SLO_NAMES
    if not is_each and (latency not in SLO_LATENCIES or statistic not in SLO_STATISTICS):
        expected = (
            f"a statistic of all requests such as ttft_p99 and =seconds: one of {', '.join(SLO_LATENCIES)}, "
            f"then _ and one of {', '.join(SLO_STATISTICS)}; or, with an attainment, of each request: ttft=1"
        )
        raise ConfigError(f"slo: found {text!r}, expected {expected}")
    try:
        seconds = _finite(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"slo: {name}: found {given!r}, expected seconds above 0")
    return Limit(latency, statistic, seconds)
