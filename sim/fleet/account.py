"""What a replay took: how long devices were paid for and computed, their energy, and what that costs."""

from collections.abc import Iterable
from typing import NamedTuple

from pagellm.sim.fleet.fleet import Fleet, Group
from pagellm.sim.report.metrics import MetricsCollector
from pagellm.sim.report.schema import FleetData, FleetGroup

_HOUR_S = 3600.0


class Use(NamedTuple):
    """A replica of a group: when it was paid for, seconds from and to, and how long all of it computed."""

    group: Group
    paid: list[tuple[float, float]]
    busy_s: float


def account(fleet: Fleet, uses: list[Use], metrics: MetricsCollector) -> FleetData:
    """The figures of a fleet when its replay is over.

    A device draws what it does while it computes for as long as a step is under way, and else what it does
    while it is idle. Only devices are counted, not the machines around them.
    """
    groups = [
        _figures(group, [use for use in uses if use.group is group], metrics.span) for group in fleet.groups
    ]
    energy, cost = (_sum(group[name] for group in groups) for name in ("energy_wh", "cost"))
    millions = metrics.output_tokens / 1e6
    return {
        "groups": groups,
        "energy_wh": energy,
        "wh_per_million": None if energy is None or not millions else energy / millions,
        "cost": cost,
        "cost_per_million": None if cost is None or not millions else cost / millions,
    }


def _within(spans: Iterable[tuple[float, float]], whole: tuple[float, float]) -> list[tuple[float, float]]:
    """The parts of some spans that are within one."""
    cut = [(max(begin, whole[0]), min(end, whole[1])) for begin, end in spans]
    return [(begin, end) for begin, end in cut if begin <= end]


def _most_at_once(spans: list[tuple[float, float]]) -> int:
    """How many spans overlap at most; of two where one ends when the other begins, only one."""
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for begin, end in spans if begin < end])
    count = most = 0
    for _, change in changes:
        count += change
        most = max(most, count)
    return most


def _figures(group: Group, uses: list[Use], whole: tuple[float, float]) -> FleetGroup:
    spans = [part for use in uses for part in _within(use.paid, whole)]
    paid_s = sum(end - begin for begin, end in spans)
    # Steps of requests whose clients gave up may go on after the last token.
    busy_s = min(paid_s, sum(use.busy_s for use in uses))
    energy = None
    if group.powers_w is not None:
        idle_w, busy_w = group.powers_w
        energy = group.num_devices * (busy_s * busy_w + max(0.0, paid_s - busy_s) * idle_w) / _HOUR_S
    price = group.price_per_h
    figures: FleetGroup = {
        "name": group.name,
        "role": group.role,
        "model": group.model,
        "replicas": _most_at_once(spans),
        "devices": group.num_devices,
        "paid_s": paid_s,
        "busy_s": busy_s,
        "energy_wh": energy,
        "cost": None if price is None else price * group.num_devices * paid_s / _HOUR_S,
    }
    if group.powers:
        figures["powers"] = group.powers
    return figures


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; None where one of them is not known."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) if len(known) == len(listed) else None
