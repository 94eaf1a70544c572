"""What a run was like: latencies, throughput, memory and the cache, made of what its listeners have seen."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Literal

from pagellm.engine.checks import SMALLEST, number
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, found
from pagellm.engine.scheduling.batch import Preemption
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepListener
from pagellm.sim.costs.cost_model import CostConstant, FitError, StepTimeError
from pagellm.sim.quantiles import Exact, LogHistogram
from pagellm.sim.report.collected import Collected, ReplicaListener
from pagellm.sim.report.schema import (
    VERSION,
    Cache,
    FleetData,
    Goodput,
    Group,
    KvCache,
    Latencies,
    Load,
    Report,
    ReportData,
    Summary,
    TimelineData,
)
from pagellm.sim.report.steady import steady_state
from pagellm.sim.traces.trace import Trace

SLO_NAMES = ("ttft_s", "tpot_s", "e2e_s", "queue_s")
_CURVE = [number / 200 for number in range(201)]


class MetricsCollector:
    """Gathers a run's metrics.

    schedulers: one for each replica, before they are used. slo: the most seconds of a good request, by the
    names in `SLO_NAMES`. results: a file that gets a line of JSON for each request when it ends.
    block_bytes: of a KV block, where that is known. names_replicas: whether figures are told by replica; by
    default where there are several. Raises `ConfigError`.

    The shares of unwritten slots and of cached blocks are sampled, once for each bucket of the timeline.
    """

    def __init__(
        self,
        schedulers: list[Scheduler],
        slo: Mapping[str, float] | None = None,
        results: str | os.PathLike[str] | None = None,
        block_bytes: int | None = None,
        names_replicas: bool | None = None,
    ) -> None:
        for name, value in (slo or {}).items():
            if name not in SLO_NAMES:
                raise ConfigError(f"slo: found {found(name)}, expected one of {', '.join(SLO_NAMES)}")
            number(f"slo: {name}", value, SMALLEST, error=ConfigError, expected="seconds above 0")
        self._block_bytes = block_bytes
        self.up: list[tuple[float, float]] | None = None  # when each replica was, where they come and go
        names_replicas = len(schedulers) > 1 if names_replicas is None else names_replicas
        self._run = Collected(slo or {}, results, names_replicas)
        for scheduler in schedulers:
            self.add(scheduler)

    def add(self, scheduler: Scheduler, group: str | None = None) -> StepListener:
        """What is to listen to the step loop of one more replica. group: of those that are alike, by name."""
        run = self._run
        number = len(run.replicas)
        run.replicas.append(ReplicaListener(number, scheduler, run, group))
        run.groups.add_replica(number, group)
        return run.replicas[number]

    def listener(self, replica: int = 0) -> StepListener:
        """What is to listen to the step loop of one of the replicas; of several completions each is one."""
        return self._run.replicas[replica]

    def note_class(self, request: Sequence | str, class_: str | None) -> None:
        """The class of a request that comes, a sequence or a request_id."""
        if class_ is not None:
            self._run.classes[request] = class_

    def knows(self, sequence: Sequence) -> bool:
        """Whether some replica has taken a request in, which has not ended."""
        return sequence in self._run.requests

    def rejected(
        self, request_id: str, time_s: float, *, tenant: str | None = None, class_: str | None = None
    ) -> None:
        """A request came that can never be computed."""
        self._run.arrive(time_s)
        for group in self._run.groups.of(None, tenant, class_):
            group.counts["requests"] += 1
        self._run.counts["rejected"] += 1
        if self._run.results is not None:
            self._run.results.write(id=request_id, outcome="rejected", arrival_s=time_s)

    def close(self) -> None:
        """Closes the file of results."""
        if self._run.results is not None:
            self._run.results.close()

    def report(
        self,
        trace: Trace,
        *,
        kind: Literal["simulated", "real"],
        model: str,
        config: EngineConfig,
        load: Load,
        wall_s: float,
        extrapolated: int = 0,
        profile_error: StepTimeError | None = None,
        fit: FitError | None = None,
        constants: Iterable[CostConstant] = (),
        fleet: FleetData | None = None,
    ) -> Report:
        """What the replay of a trace gave, when it is over; see schema.py for what is what."""
        report: ReportData = {
            "version": VERSION,
            "kind": kind,
            "trace": trace.name,
            "skipped": trace.skipped_records(),
            "model": model,
            "extrapolated": extrapolated,
            "profile_error": profile_error,
            "fit": fit,
            "constants": list(constants),
            "config": asdict(config),
            "load": load,
            "summary": self.summary(wall_s, trace.num_skipped, trace.num_dropped),
            "groups": self.groups(),
            "timeline": self.timeline(),
            "latencies": self.latencies(),
        }
        if fleet is not None:
            report["fleet"] = fleet
        return Report(report)

    def note_blocks(self, replica: int) -> None:
        """Blocks of a replica were freed between its steps."""
        self._run.replicas[replica].note_used()

    def busy_s(self, replica: int) -> float:
        """The seconds in which a replica had a step under way."""
        return self._run.replicas[replica].busy_s

    @property
    def span(self) -> tuple[float, float]:
        """When the first request came and the last token was there, in seconds; equal where none was."""
        first_s = self._run.first_arrival_s or 0.0
        return first_s, max(first_s, self._run.last_token_at_s)

    @property
    def output_tokens(self) -> int:
        """Tokens that requests got."""
        return self._run.counts["output_tokens"]

    def summary(self, wall_s: float, num_skipped: int = 0, num_dropped: int = 0) -> Summary:
        """The report's summary so far.

        wall_s: what getting there took. num_skipped, num_dropped: records that the trace left out.
        """
        run = self._run
        counts = run.counts
        duration_s = self._duration_s
        tokens = counts["prompt_tokens"], counts["output_tokens"]
        goodput: Goodput | None = None
        if run.slo:
            share = counts["good"] / counts["requests"] if counts["requests"] else None
            rate = _rate(counts["good"], duration_s)
            goodput = {"slo": dict(run.slo), "share": share, "requests_per_s": rate}
        summary: Summary = {
            "num_requests": counts["requests"],
            "num_finished": counts["finished"],
            "num_timed_out": counts["timed_out"],
            "num_rejected": counts["rejected"] + counts["shed"],
            "num_skipped": num_skipped,
            "num_dropped": num_dropped,
            "duration_s": duration_s,
            "prompt_tokens": tokens[0],
            "output_tokens": tokens[1],
            "num_steps": counts["steps"],
            "requests_per_s": _rate(counts["finished"], duration_s),
            "output_tokens_per_s": _rate(tokens[1], duration_s),
            "total_tokens_per_s": _rate(sum(tokens), duration_s),
            "ttft_s": run.latencies["ttft"].summary(),
            "tpot_s": run.latencies["tpot"].summary(),
            "itl_s": run.itl.summary(),
            "e2e_s": run.latencies["e2e"].summary(),
            "queue_s": run.latencies["queue"].summary(),
            "goodput": goodput,
            "cache": self._cache(),
            "preemptions": {
                "recompute": run.preempted[Preemption.RECOMPUTE.value],
                "swap": run.preempted[Preemption.SWAP.value],
                "requests": counts["preempted"],
                "most_of_one_request": run.most_preemptions,
            },
            "kv": self._kv(duration_s),
            "steady": steady_state(run.timeline, has_slo=bool(run.slo)),
            "wall_s": wall_s,
        }
        if counts["failed"]:
            summary["num_failed"] = counts["failed"]
        return summary

    def groups(self) -> list[Group]:
        """The report's figures by replica, tenant and class so far."""
        run = self._run
        return run.groups.to_list(self._duration_s, bool(run.slo))

    def timeline(self) -> TimelineData:
        """The report's timeline so far."""
        run = self._run
        has_cache = any(seen.manager.enable_prefix_caching for seen in run.replicas)
        return run.timeline.to_dict(has_cache, bool(run.slo), self.up)

    def latencies(self) -> Latencies:
        """Of each latency the values at 0, 0.5, 1, ... 100 percent; empty where none was measured."""
        run = self._run

        def curve(values: Exact | LogHistogram) -> list[float]:
            return values.quantiles(_CURVE) if len(values) else []

        exact = run.latencies
        return {
            "ttft_s": curve(exact["ttft"]),
            "tpot_s": curve(exact["tpot"]),
            "itl_s": curve(run.itl),
            "e2e_s": curve(exact["e2e"]),
            "queue_s": curve(exact["queue"]),
        }

    @property
    def _duration_s(self) -> float:
        begin_s, end_s = self.span
        return end_s - begin_s

    def _cache(self) -> Cache:
        run = self._run
        buckets = run.timeline.buckets
        queries, hits = sum(b.query_tokens for b in buckets), sum(b.hit_tokens for b in buckets)
        since = [seen.cache_stats() for seen in run.replicas]
        cache: Cache = {
            "query_tokens": queries,
            "hit_tokens": hits,
            "hit_rate": hits / queries if queries else None,
            "evicted_tokens": sum(stats.evictions for stats in since),
        }
        if any(stats.offloads or stats.host_hits for stats in since):
            cache["host_hit_tokens"] = sum(stats.host_hits for stats in since)
            cache["offloaded_tokens"] = sum(stats.offloads for stats in since)
        return cache

    def _kv(self, duration_s: float) -> KvCache:
        """The mean share is weighted by the blocks in use."""
        run = self._run
        buckets = run.timeline.buckets
        used = sum(bucket.used_blocks_time for bucket in buckets)
        shares = run.timeline.sampled("unwritten_shares")
        unwritten = sum(s * b.used_blocks_time for s, b in zip(shares, buckets, strict=True))
        mean_blocks = used / duration_s if duration_s else 0.0
        size = self._block_bytes
        return {
            "num_blocks": sum(seen.manager.num_blocks for seen in run.replicas),
            "block_bytes": size,
            "peak_blocks": run.peak_blocks,
            "mean_blocks": mean_blocks,
            "peak_bytes": None if size is None else run.peak_blocks * size,
            "mean_bytes": None if size is None else mean_blocks * size,
            "mean_unwritten_share": unwritten / used if used else 0.0,
        }


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds else None
