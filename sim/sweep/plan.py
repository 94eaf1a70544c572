"""Operators' questions: the highest load, the fewest replicas for a load, the cheapest of several devices.

Each is asked once for each seed, which brings the gaps between arrivals into another order, and answered with
what all seeds say. An answer stands on a steady state or is refused, with the reason.
"""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from pagellm.engine.checks import SMALLEST, integer, number
from pagellm.engine.errors import ConfigError, PagellmError
from pagellm.sim.sweep.file import Point
from pagellm.sim.sweep.grid import Slo
from pagellm.sim.sweep.sweep import Capacity, Sweep

MAX_REPLICAS = 4096
# Student's t, 95 % two-sided, by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Answer:
    """What was found of one kind of hardware and one combination of settings.

    settings: without seed. refused: why there is no answer; the rest is None then. replicas: that serve.
    offered_per_s: the load, with its 95 % confidence interval over seeds, half its width; None of one seed.
    attainment: the smallest share of requests within the SLO of any seed. tokens_per_s: of output, the mean.
    cost_per_h, cost_per_m: an hour, and a million tokens of output, in the unit of the price.
    """

    settings: dict[str, Any]
    refused: str | None
    replicas: int | None = None
    offered_per_s: float | None = None
    interval: float | None = None
    attainment: float | None = None
    tokens_per_s: float | None = None
    cost_per_h: float | None = None
    cost_per_m: float | None = None


def plan(
    sweep: Sweep,
    *,
    rate: float | None = None,
    seeds: int = 3,
    tolerance: float = 0.02,
    prices: Mapping[str, float] | None = None,
) -> list[Answer]:
    """The answers for the points of a sweep's grid: the cheapest first where prices are given.

    rate: requests a second, for which the fewest replicas are sought; None: the highest load is. prices: of a
    device an hour, by the name of the hardware. Raises as `Sweep.run_capacity` does.
    """
    integer("seeds", seeds, 1, error=ConfigError)
    if rate is not None:
        number("rate", rate, SMALLEST, error=ConfigError, expected="requests a second above 0")
        if "replicas" in sweep.grid.axes:
            raise ConfigError("replicas: found values, expected none where the fewest are sought")
    hardware = [str(name) for name in sweep.grid.axes.get("hardware", ())]
    for name in prices or {}:
        if name not in {one.partition("*")[0] for one in hardware} | {_device(sweep)}:
            raise ConfigError(f"price: found {name!r}, expected the name of hardware that is asked for")
    points = [settings | {"seed": seed} for settings in sweep.grid for seed in range(seeds)]
    if rate is None:
        found = sweep.run_searches(points, tolerance)
        answers = [_load(found[i : i + seeds]) for i in range(0, len(found), seeds)]
    else:
        trace_rate = sweep.trace_rate()
        tasks = [_fewest(settings, seeds, rate / trace_rate, sweep.needed_slo()) for settings in sweep.grid]
        answers = sweep.run_tasks(tasks)
    priced = [_priced(answer, sweep, prices or {}) for answer in answers]
    return sorted(priced, key=_rank) if prices else priced


def _device(sweep: Sweep) -> str | None:
    return None if sweep.costs.roofline is None else sweep.costs.roofline[0]


def _rank(answer: Answer) -> tuple[bool, float]:
    cost = answer.cost_per_m
    return answer.refused is not None or cost is None, cost or 0.0


def _load(found: list[Capacity]) -> Answer:
    """The highest load, of the searches of all seeds."""
    settings = {name: value for name, value in found[0].settings.items() if name != "seed"}
    for capacity in found:
        refused = _refusal(capacity)
        if refused is not None:
            return Answer(settings, f"seed {capacity.settings['seed']}: {refused}")
    summaries = [capacity.at.summary for capacity in found if capacity.at is not None and capacity.at.summary]
    return _answer(settings, int(settings.get("replicas") or 1), summaries)


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


def _fewest(
    settings: dict[str, Any], seeds: int, rate_factor: float, slo: Slo
) -> Generator[dict[str, Any], Point, Answer]:
    """The fewest replicas that keep the SLO with every seed: doubled until they do, then bisected."""

    def holds(replicas: int) -> Generator[dict[str, Any], Point, list[dict[str, Any]] | str | None]:
        summaries = []
        for seed in range(seeds):
            made = {"replicas": replicas, "rate_factor": rate_factor, "seed": seed}
            point = yield settings | made
            if point.summary is None:
                return point.error or "failed"
            if not slo.holds(point.summary) or point.summary["steady"]["verdict"] == "overloaded":
                return None
            summaries.append(point.summary)
        return summaries

    fails, enough = 0, 1
    while not (answer := (yield from holds(enough))):
        fails, enough = enough, 2 * enough
        if enough > MAX_REPLICAS:
            return Answer(settings, f"the SLO does not hold with {fails} replicas either")
    if isinstance(answer, str):
        return Answer(settings, answer)
    best = answer
    while enough - fails > 1:
        middle = (enough + fails) // 2
        answer = yield from holds(middle)
        if isinstance(answer, str):
            return Answer(settings, answer)
        if answer:
            enough, best = middle, answer
        else:
            fails = middle
    for seed, summary in enumerate(best):
        steady = summary["steady"]
        if steady["verdict"] != "steady":
            offered = f"{steady['offered_per_s']:.4g} requests/s offered to {enough} replicas"
            return Answer(settings, f"seed {seed}: {offered} are no steady state: {steady['reason']}")
    return _answer(settings, enough, best)


def _answer(settings: dict[str, Any], replicas: int, summaries: list[dict[str, Any]]) -> Answer:
    """What the replays of all seeds say together."""
    rates = [summary["steady"]["offered_per_s"] for summary in summaries]
    shares = [summary["steady"]["attainment"] for summary in summaries]
    return Answer(
        settings,
        None,
        replicas,
        fmean(rates),
        _interval(rates),
        None if None in shares else min(shares),
        fmean(summary["output_tokens_per_s"] or 0.0 for summary in summaries),
    )


def _interval(values: list[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean."""
    if len(values) < 2:
        return None
    t = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96
    return t * stdev(values) / math.sqrt(len(values))


def _priced(answer: Answer, sweep: Sweep, prices: Mapping[str, float]) -> Answer:
    name = str(answer.settings.get("hardware") or _device(sweep) or "")
    name, _, number_of = name.partition("*")
    if answer.refused is not None or name not in prices or answer.replicas is None:
        return answer
    devices = int(number_of) if number_of else (sweep.costs.roofline or ("", "", 1))[2]
    devices *= sweep.costs.pipeline_parallel * sweep.costs.data_parallel
    cost = prices[name] * devices * answer.replicas
    tokens = answer.tokens_per_s or 0.0
    per_million = cost / (tokens * 3600) * 1e6 if tokens else None
    return replace(answer, cost_per_h=cost, cost_per_m=per_million)


def check_any(answers: list[Answer]) -> None:
    """Raises `PagellmError` where every answer was refused."""
    if all(answer.refused is not None for answer in answers):
        raise PagellmError(f"capacity: refused: {answers[0].refused}")
