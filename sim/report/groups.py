"""The figures of a run's parts: by replica, tenant and class of request."""

from collections import Counter
from typing import Literal

from pagellm.sim.quantiles import LogHistogram
from pagellm.sim.report.schema import Group

MAX_GROUPS = 200  # of a kind; what comes beyond is counted together
OTHERS = "all others"
Kind = Literal["group", "replica", "tenant", "class"]
PLACES = ("group", "replica")  # where a request is, which may change


class GroupFigures:
    """What is counted of one part. Percentiles are off by half a percent at most, so that it stays small."""

    def __init__(self, kind: Kind, name: str) -> None:
        self.kind: Kind = kind
        self.name = name
        self.counts: Counter[str] = Counter()
        self.latencies = {latency: LogHistogram() for latency in ("ttft_s", "tpot_s", "e2e_s")}

    def to_dict(self, duration_s: float, has_slo: bool) -> Group:
        """As the report has it."""
        counts = self.counts
        # Requests that went on elsewhere keep the SLO there, or do not.
        has_slo = has_slo and (self.kind not in PLACES or counts["finished"] > 0)
        return {
            "by": self.kind,
            "name": self.name,
            "num_requests": counts["requests"],
            "num_finished": counts["finished"],
            "prompt_tokens": counts["prompt_tokens"],
            "cached_tokens": counts["cached_tokens"],
            "output_tokens": counts["output_tokens"],
            "output_tokens_per_s": counts["output_tokens"] / duration_s if duration_s else None,
            "goodput_share": counts["good"] / counts["requests"] if has_slo and counts["requests"] else None,
            "ttft_s": self.latencies["ttft_s"].summary(),
            "tpot_s": self.latencies["tpot_s"].summary(),
            "e2e_s": self.latencies["e2e_s"].summary(),
        }


class Groups:
    """All parts of one run, by their kinds and names."""

    def __init__(self, names_replicas: bool) -> None:
        self._found: dict[tuple[Kind, str], GroupFigures] = {}
        self._sizes: Counter[str] = Counter()
        self._has_replicas = names_replicas

    def add_replica(self, number: int, group: str | None) -> None:
        """There is one more replica, whether it gets a request or not."""
        self.of(number, None, None, group)

    def of(
        self, replica: int | None, tenant: str | None, class_: str | None, group: str | None = None
    ) -> list[GroupFigures]:
        """The parts that a request belongs to. group: of alike replicas, where there are several."""
        found = []
        if group is not None:
            found.append(self._group("group", group))
        if self._has_replicas and replica is not None:
            found.append(self._group("replica", str(replica)))
        if tenant:
            found.append(self._group("tenant", tenant))
        if class_:
            found.append(self._group("class", class_))
        return found

    def to_list(self, duration_s: float, has_slo: bool) -> list[Group]:
        """As the report has them: replicas by number, tenants and classes by their requests."""
        order = ("group", "replica", "tenant", "class")
        found = sorted(
            self._found.values(),
            key=lambda g: (
                order.index(g.kind),
                0 if g.kind in PLACES else -g.counts["requests"],
            ),
        )
        return [group.to_dict(duration_s, has_slo) for group in found]

    def _group(self, kind: Kind, name: str) -> GroupFigures:
        group = self._found.get((kind, name))
        if group is None:
            if kind not in PLACES and self._sizes[kind] >= MAX_GROUPS:
                name = OTHERS
            self._sizes[kind] += (kind, name) not in self._found
            group = self._found.setdefault((kind, name), GroupFigures(kind, name))
        return group
