"""Links that KV goes over: each end has one transfer at a time, in the order in which they were asked for."""

from collections import Counter
from dataclasses import dataclass, field

from pagellm.sim.fleet.fleet import Link
from pagellm.sim.fleet.replica import Replica
from pagellm.sim.report.schema import LinkFigures


@dataclass
class _Use:
    """What went over a link."""

    counts: Counter[str] = field(default_factory=Counter)
    waited_s: float = 0.0
    took_s: float = 0.0


@dataclass
class Links:
    """When transfers end. Between two links the slower one and the longer latency count."""

    _free_s: dict[tuple[str, str, int], float] = field(default_factory=dict)  # of each end
    _uses: dict[str, _Use] = field(default_factory=dict)

    def send(self, now: float, source: Replica, target: Replica, num_bytes: float) -> float:
        """Sends so many bytes, when both ends are free for them; returns when they are there.

        Each device sends and receives its own part of them.
        """
        out, into = source.group.link, target.group.link
        assert out is not None
        assert into is not None
        rate = min(
            out.bytes_per_s * source.group.engine_devices, into.bytes_per_s * target.group.engine_devices
        )
        ends = [_end(out, "from", source), _end(into, "to", target)]
        start = max(now, *(self._free_s.get(end, 0.0) for end in ends))
        took_s = num_bytes / rate
        for end in ends:
            self._free_s[end] = start + took_s
        arrival = start + took_s + max(out.latency_s, into.latency_s)
        slower = out if out.bytes_per_s <= into.bytes_per_s else into
        use = self._uses.setdefault(slower.name, _Use())
        use.counts["transfers"] += 1
        use.counts["bytes"] += round(num_bytes)
        use.waited_s += start - now
        use.took_s += arrival - start
        return arrival

    def figures(self) -> list[LinkFigures]:
        """As the report has them."""
        return [
            {
                "name": name,
                "transfers": use.counts["transfers"],
                "bytes": use.counts["bytes"],
                "mean_wait_s": use.waited_s / use.counts["transfers"],
                "mean_transfer_s": use.took_s / use.counts["transfers"],
            }
            for name, use in self._uses.items()
        ]


def _end(link: Link, way: str, replica: Replica) -> tuple[str, str, int]:
    return (link.name, "", 0) if link.shared else (link.name, way, replica.number)
