"""Operators' questions: the highest load, the fewest replicas for a load, the cheapest of several fleets.

Each is asked once for each seed, which brings the gaps between arrivals into another order, and answered with
what all seeds say. An answer stands on a steady state or is refused, with the reason.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pagellm.engine.checks import SMALLEST, integer, number
from pagellm.engine.errors import ConfigError, PagellmError, found
from pagellm.sim.fleet.fleet import parse_disaggregation
from pagellm.sim.sweep.counts import MAX_REPLICAS, Counts, search_counts
from pagellm.sim.sweep.file import Point
from pagellm.sim.sweep.grid import Slo
from pagellm.sim.sweep.serving import Settings
from pagellm.sim.sweep.sweep import Capacity, Sweep

# What comes first: the cheapest, the thriftiest, or what needs the fewest devices for each request a second.
OBJECTIVES = ("cost", "energy", "devices")
# Student's t, 95 % two-sided, by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_APART = ("prefill", "decode")

# An hour of a device with some settings, None where that is not known.
_Price = Callable[[Settings], float | None]


@dataclass(frozen=True)
class Answer:
    """What was found of one fleet and one combination of settings.

    settings: without seed, and without what was sought. refused: why there is no answer; the rest is None
    then. replicas, devices: that serve, the most at once; groups: replicas by the names of their groups.
    offered_per_s: the load, with its 95 % confidence interval over seeds, half its width; None of one seed.
    attainment: the smallest share of requests within the SLO of any seed. tokens_per_s: of output, the mean.
    cost_per_h, cost_per_m: an hour, and a million tokens of output, in the unit of the price. wh_per_m: Wh of
    devices for these. All three are means, and None where they are not known.
    """

    settings: dict[str, Any]
    refused: str | None
    replicas: int | None = None
    groups: dict[str, int] | None = None
    devices: int | None = None
    offered_per_s: float | None = None
    interval: float | None = None
    attainment: float | None = None
    tokens_per_s: float | None = None
    cost_per_h: float | None = None
    cost_per_m: float | None = None
    wh_per_m: float | None = None

    def rank(self, objective: str) -> tuple[bool, float]:
        """By what it is sorted, the best first and those last of which it is not known."""
        figure = {"cost": self.cost_per_m, "energy": self.wh_per_m}.get(objective)
        if objective == "devices" and self.devices and self.offered_per_s:
            figure = self.devices / self.offered_per_s
        return figure is None, figure or 0.0


def plan(
    sweep: Sweep,
    *,
    rate: float | None = None,
    seek: tuple[str, ...] = (),
    seeds: int = 3,
    tolerance: float = 0.02,
    prices: Mapping[str, float] | None = None,
    objective: str | None = None,
) -> list[Answer]:
    """The answers for the points of a sweep's grid, the best first where there is an objective.

    rate: requests a second, for which the fewest replicas are sought; None: the highest load is. seek: where
    replicas differ, the groups whose replicas are sought, one or two; of two the cheapest counts, by prices
    where those are known and else by devices. Where no group is sought, whether the rate is served is told.
    prices: of a device an hour, by the name of the hardware; with them the objective is "cost" if none is
    given. Raises as `Sweep.run_capacity` does.
    """
    integer("seeds", seeds, 1, error=ConfigError)
    if objective is not None and objective not in OBJECTIVES:
        raise ConfigError(f"objective: found {found(objective)}, expected one of {', '.join(OBJECTIVES)}")
    if rate is not None:
        number("rate", rate, SMALLEST, error=ConfigError, expected="requests a second above 0")
    sought, price = _sought(sweep, rate, seek), _prices(sweep, prices or {})
    if rate is None:
        points = [settings | {"seed": seed} for settings in sweep.grid for seed in range(seeds)]
        searched = sweep.run_searches(points, tolerance)
        answers = [_highest(searched[i : i + seeds], price) for i in range(0, len(searched), seeds)]
    else:
        question = _Question(seeds, rate / sweep.trace_rate(), sweep.needed_slo(), sought, price)
        answers = sweep.run_tasks([question.answer(settings) for settings in sweep.grid])
    objective = objective or ("cost" if prices else None)
    return answers if objective is None else sorted(answers, key=lambda answer: answer.rank(objective))


def check_any(answers: list[Answer]) -> None:
    """Raises `PagellmError` where every answer was refused."""
    if all(answer.refused is not None for answer in answers):
        raise PagellmError(f"capacity: refused: {answers[0].refused}")


def _prices(sweep: Sweep, prices: Mapping[str, float]) -> _Price:
    """Raises `ConfigError` for a price of what is not asked for."""
    own = None if sweep.costs is None or sweep.costs.roofline is None else sweep.costs.roofline[0]

    def device(settings: Settings) -> str | None:
        name = settings.get("hardware")
        return own if name is None else str(name).partition("*")[0]

    asked = {own, *(device({"hardware": name}) for name in sweep.grid.axes.get("hardware", ()))}
    for name in prices:
        if sweep.fleet is not None:
            raise ConfigError(f"price: found {name!r} with a fleet, whose groups have price_per_h")
        if name not in asked:
            raise ConfigError(f"price: found {name!r}, expected the name of hardware that is asked for")
    return lambda settings: prices.get(device(settings) or "")


@dataclass(frozen=True)
class _Sought:
    """Which settings have the counts that are sought.

    groups: by name; of replicas that are alike "replicas". are_apart: they are prefill and decode replicas.
    """

    groups: tuple[str, ...] = ()
    are_apart: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The settings."""
        if self.are_apart:
            return ("disaggregate",) if self.groups else ()
        return tuple(name if name == "replicas" else f"{name}.count" for name in self.groups)

    def put(self, settings: dict[str, Any], counts: Counts) -> dict[str, Any]:
        """The settings with these counts."""
        if not (self.are_apart and self.groups):
            return settings | dict(zip(self.names, counts, strict=True))
        sought = dict(zip(self.groups, counts, strict=True))
        given = parse_disaggregation(str(settings["disaggregate"]))
        both = (sought.get(role, count) for role, count in zip(_APART, given, strict=True))
        return settings | {"disaggregate": ":".join(map(str, both))}


def _sought(sweep: Sweep, rate: float | None, seek: tuple[str, ...]) -> _Sought:
    """Raises `ConfigError` for what cannot be sought."""
    axes = sweep.grid.axes
    are_apart = "disaggregate" in axes
    are_alike = sweep.fleet is None and not are_apart
    shown = ",".join(seek)
    if seek and (rate is None or are_alike):
        expected = "--rate, which is to be served" if rate is None else "a fleet, or prefill and decode apart"
        raise ConfigError(f"seek: found {shown!r}, expected {expected}")
    are_names = "" not in seek and len(set(seek)) == len(seek) <= 2
    if not are_names or (are_apart and not set(seek) <= set(_APART)):
        expected = "prefill, decode, or both" if are_apart else "one or two of the fleet's groups"
        raise ConfigError(f"seek: found {shown!r}, expected {expected}")
    sought = _Sought(("replicas",) if are_alike and rate is not None else seek, are_apart)
    for name in sought.names:
        # Of the counts that are apart one may be sought for each of the other.
        if name in axes and not (are_apart and (len(seek) == 1 or len(axes[name]) == 1)):
            raise ConfigError(f"{name}: found values, expected none where the fewest are sought")
    return sought


@dataclass(frozen=True)
class _Question:
    """What serves a load, `rate_factor` times the trace's, with every seed."""

    seeds: int
    rate_factor: float
    slo: Slo
    sought: _Sought
    price: _Price

    def answer(self, settings: dict[str, Any]) -> Generator[dict[str, Any], Point, Answer]:
        """Replays until it is known."""
        price = self.price(settings)
        shown = {name: value for name, value in settings.items() if name not in self.sought.names}
        served: dict[Counts, list[dict[str, Any]]] = {}
        steps = search_counts(
            len(self.sought.groups),
            lambda: _weighed(next(iter(served.values()))[0], self.sought.groups, price),
        )
        counts: Counts | None = next(steps)
        while True:
            assert counts is not None
            summaries = yield from self._served(self.sought.put(settings, counts))
            if isinstance(summaries, str):
                if 0 not in counts:
                    return Answer(shown, summaries)
                summaries = []  # it cannot be without replicas of that group
            if summaries:
                served[counts] = summaries
            try:
                counts = steps.send(bool(summaries))
            except StopIteration as end:
                counts = end.value
                break
        if counts is None:
            replicas = f" with {MAX_REPLICAS} replicas either" if self.sought.groups else " at this rate"
            return Answer(shown, f"the SLO does not hold{replicas}")
        answer = _answer(shown, served[counts], price)
        for seed, summary in enumerate(served[counts]):
            steady = summary["steady"]
            if steady["verdict"] != "steady":
                offered = f"{steady['offered_per_s']:.4g} requests/s offered to {answer.replicas} replicas"
                return Answer(shown, f"seed {seed}: {offered} are no steady state: {steady['reason']}")
        return answer

    def _served(
        self, settings: dict[str, Any]
    ) -> Generator[dict[str, Any], Point, list[dict[str, Any]] | str]:
        """The summaries of all seeds; none where the load is not served; or what goes wrong."""
        summaries = []
        for seed in range(self.seeds):
            point = yield settings | {"rate_factor": self.rate_factor, "seed": seed}
            if point.summary is None:
                return point.error or "failed"
            if not self.slo.holds(point.summary) or point.summary["steady"]["verdict"] == "overloaded":
                return []
            summaries.append(point.summary)
        return summaries


def _weighed(
    summary: Mapping[str, Any], names: tuple[str, ...], price: float | None
) -> tuple[list[float], int]:
    """What a replica of each group costs, where that is known, else its devices; and how few there may be."""
    by_name = {group["name"]: group for group in summary["fleet"]["groups"]}
    groups = [by_name[name] for name in names]
    costs = [_cost(group, price) for group in groups]
    least = 0 if len({(group["role"], group["model"]) for group in groups}) == 1 else 1
    if None in costs or 0 in costs:
        return [float(group["devices"]) for group in groups], least
    return [(cost or 0.0) / group["paid_s"] for cost, group in zip(costs, groups, strict=True)], least


def _cost(group: Mapping[str, Any], price: float | None) -> float | None:
    """What a group cost. price: of a device, where it has none of its own."""
    if group["cost"] is not None:
        return float(group["cost"])
    return None if price is None else price * float(group["devices"] * group["paid_s"]) / 3600


def _highest(searched: list[Capacity], price: _Price) -> Answer:
    """The highest load, of the searches of all seeds."""
    settings = {name: value for name, value in searched[0].settings.items() if name != "seed"}
    for capacity in searched:
        refused = _refusal(capacity)
        if refused is not None:
            return Answer(settings, f"seed {capacity.settings['seed']}: {refused}")
    at = [capacity.at.summary for capacity in searched if capacity.at is not None and capacity.at.summary]
    return _answer(settings, at, price(settings))


def _refusal(capacity: Capacity) -> str | None:
    if capacity.bracket is None:
        return capacity.error
    if capacity.bracket.holds is None:
        lowest = capacity.probes[-1].summary
        offered = "" if lowest is None else f", {lowest['steady']['offered_per_s']:.4g} requests/s offered"
        return f"the SLO does not even hold at the lowest load that was tried{offered}"
    if capacity.transient is not None:
        return capacity.transient
    if capacity.bracket.fails is None:
        return "the SLO holds up to the highest load that was tried"
    return None


def _answer(settings: dict[str, Any], summaries: list[dict[str, Any]], price: float | None) -> Answer:
    """What the replays of all seeds say together. price: of a device an hour, where groups have none."""
    rates = [summary["steady"]["offered_per_s"] for summary in summaries]
    shares = [summary["steady"]["attainment"] for summary in summaries]
    groups = list(zip(*(summary["fleet"]["groups"] for summary in summaries), strict=True))
    replicas = {same[0]["name"]: max(group["replicas"] for group in same) for same in groups}
    costs = [[_cost(group, price) for group in summary["fleet"]["groups"]] for summary in summaries]
    hours = [summary["duration_s"] / 3600 for summary in summaries]
    millions = [summary["output_tokens"] / 1e6 for summary in summaries]
    energies = [summary["fleet"]["energy_wh"] for summary in summaries]
    totals = [None if None in each else sum(cost or 0.0 for cost in each) for each in costs]
    return Answer(
        settings,
        None,
        sum(replicas.values()),
        replicas,
        sum(replicas[same[0]["name"]] * same[0]["devices"] for same in groups),
        fmean(rates),
        _interval(rates),
        None if None in shares else min(shares),
        fmean(summary["output_tokens_per_s"] or 0.0 for summary in summaries),
        _mean_ratio(totals, hours),
        _mean_ratio(totals, millions),
        _mean_ratio(energies, millions),
    )


def _mean_ratio(amounts: Sequence[float | None], sizes: Sequence[float]) -> float | None:
    """All amounts by all sizes; None where one of them is not known or none has a size."""
    known = [amount for amount in amounts if amount is not None]
    return math.fsum(known) / math.fsum(sizes) if len(known) == len(sizes) and any(sizes) else None


def _interval(values: list[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean."""
    if len(values) < 2:
        return None
    t = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96
    return t * stdev(values) / math.sqrt(len(values))
