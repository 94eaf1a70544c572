"""What a replay took: how long devices were paid for and computed, their energy, and what that costs."""

from collections.abc import Iterable

from pagellm.sim.fleet.fleet import Fleet, Group
from pagellm.sim.fleet.replica import Replica
from pagellm.sim.report.metrics import MetricsCollector
from pagellm.sim.report.schema import FleetData, FleetGroup

_HOUR_S = 3600.0


def account(fleet: Fleet, replicas: list[Replica], metrics: MetricsCollector) -> FleetData:
    """The figures of a fleet when its replay is over.

    A device draws what it does while it computes for as long as a step is under way, and else what it does
    while it is idle. Only devices are counted, not the machines around them.
    """
    groups = [
        _figures(group, [one for one in replicas if one.group is group], metrics) for group in fleet.groups
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


def _figures(group: Group, replicas: list[Replica], metrics: MetricsCollector) -> FleetGroup:
    first_s, last_s = metrics.span
    paid_s = len(replicas) * (last_s - first_s)
    busy_s = sum(metrics.busy_s(replica.number) for replica in replicas)
    energy = None
    if group.powers_w is not None:
        idle_w, busy_w = group.powers_w
        energy = group.num_devices * (busy_s * busy_w + max(0.0, paid_s - busy_s) * idle_w) / _HOUR_S
    price = group.price_per_h
    return {
        "name": group.name,
        "role": group.role,
        "model": group.model,
        "replicas": len(replicas),
        "devices": group.num_devices,
        "paid_s": paid_s,
        "busy_s": busy_s,
        "energy_wh": energy,
        "cost": None if price is None else price * group.num_devices * paid_s / _HOUR_S,
    }


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; None where one of them is not known."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) if len(known) == len(listed) else None
