"""What a run was like: latencies, throughput, memory and the cache, gathered while it goes on.

It is told of events and their times, by a simulation or by whoever drives an engine, and looks at the
schedulers for the state in between. It costs a few operations a step and memory that grows with the number
of requests alone, four numbers each.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

from pagellm.engine import checks
from pagellm.engine.checks import SMALLEST, number
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, found
from pagellm.engine.scheduling.batch import Preemption, ScheduledBatch
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepListener
from pagellm.sim.costs.cost_model import StepTimeError
from pagellm.sim.quantiles import Exact, LogHistogram
from pagellm.sim.report.schema import (
    VERSION,
    Cache,
    Goodput,
    KvCache,
    Latencies,
    Load,
    Report,
    Summary,
    TimelineData,
)
from pagellm.sim.report.timeline import Timeline
from pagellm.sim.traces.trace import Trace

SLO_NAMES = ("ttft_s", "tpot_s", "e2e_s", "queue_s")
_CURVE = [number / 200 for number in range(201)]


@dataclass(slots=True)
class _Request:
    """A request under way; its times in seconds."""

    id: str
    replica: int
    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None


class _Replica:
    """One scheduler and what was seen of it last."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.manager = scheduler.block_manager
        self.swapped: set[Sequence] = set()
        stats = self.manager.stats
        self.queries, self.hits, self.first_evictions = stats.queries, stats.hits, stats.evictions
        self.start_s = 0.0  # of the step under way, and then
        self.running = self.waiting = self.used_blocks = 0
        # Those that got a token last, when all of them did.
        self.last_sampled: list[Sequence] = []
        self.last_token_s = 0.0


class _Listener(StepListener):
    """Tells a collector of one replica's steps."""

    def __init__(self, metrics: "MetricsCollector", replica: int) -> None:
        self._metrics = metrics
        self._replica = replica

    def added(self, sequence: Sequence) -> None:
        self._metrics.arrived(sequence, sequence.request_id, sequence.arrival_time, self._replica)

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        self._metrics.scheduled(batch, now, self._replica)

    def committed(
        self,
        batch: ScheduledBatch,
        sampled: list[Sequence],
        finished: list[Sequence],
        now: float,
        duration_s: float,
        transfer_s: float,
    ) -> None:
        self._metrics.committed(batch, sampled, finished, now, self._replica)

    def ended(self, sequence: Sequence) -> None:
        self._metrics.aborted(sequence)


class MetricsCollector:
    """Gathers a run's metrics.

    schedulers: one for each replica, before they are used. slo: the most seconds of a good request, by the
    names in `SLO_NAMES`. results: a file that gets a line of JSON for each request when it ends.
    block_bytes: of a KV block, where that is known. Raises `ConfigError`.

    The shares of unwritten slots and of cached blocks are sampled, once for each bucket of the timeline.
    """

    def __init__(
        self,
        schedulers: list[Scheduler],
        slo: Mapping[str, float] | None = None,
        results: str | os.PathLike[str] | None = None,
        block_bytes: int | None = None,
    ) -> None:
        for name, value in (slo or {}).items():
            if name not in SLO_NAMES:
                raise ConfigError(f"slo: found {found(name)}, expected one of {', '.join(SLO_NAMES)}")
            number(f"slo: {name}", value, SMALLEST, error=ConfigError, expected="seconds above 0")
        self._slo = dict(slo or {})
        self._block_bytes = block_bytes
        self._results = None if results is None else _open(results)
        self._replicas = [_Replica(scheduler) for scheduler in schedulers]
        self._requests: dict[Sequence, _Request] = {}  # those under way
        self._last_token_s: dict[Sequence, float] = {}  # of those in no replica's last_sampled
        self._latencies: dict[str, Exact] = {name: Exact() for name in ("ttft", "tpot", "e2e", "queue")}
        self._itl = LogHistogram()
        self._timeline = Timeline()
        self._counts: Counter[str] = Counter()
        self._preempted: Counter[str] = Counter()
        self._used_blocks = self._peak_blocks = self._most_preemptions = 0
        self._first_arrival_s: float | None = None
        self._last_token_at_s = 0.0

    def listener(self, replica: int = 0) -> StepListener:
        """What is to listen to the step loop of one of the replicas."""
        return _Listener(self, replica)

    def arrived(self, sequence: Sequence, request_id: str, time_s: float, replica: int = 0) -> None:
        """A request came, for one of the replicas; of several completions each is one."""
        self._arrive(time_s)
        self._requests[sequence] = _Request(request_id, replica, time_s)

    def rejected(self, request_id: str, time_s: float) -> None:
        """A request came that can never be computed."""
        self._arrive(time_s)
        self._counts["rejected"] += 1
        self._write(id=request_id, outcome="rejected", arrival_s=time_s)

    def scheduled(self, batch: ScheduledBatch, time_s: float, replica: int = 0) -> None:
        """A step was scheduled and starts."""
        seen = self._replicas[replica]
        bucket = self._timeline.at(time_s)
        if batch.admitted:
            self._note_admissions(batch, time_s)
            seen.swapped.difference_update(admitted.sequence for admitted in batch.admitted)
            stats = seen.manager.stats
            bucket.query_tokens += stats.queries - seen.queries
            bucket.hit_tokens += stats.hits - seen.hits
            seen.queries, seen.hits = stats.queries, stats.hits
        if batch.preempted:
            bucket.preemptions += len(batch.preempted)
            self._preempted.update(preempted.by.value for preempted in batch.preempted)
            seen.swapped.update(p.sequence for p in batch.preempted if p.by is Preemption.SWAP)
        seen.start_s = time_s
        seen.running = len(seen.scheduler.running)
        seen.waiting = len(seen.scheduler.waiting) - len(seen.swapped)
        self._note_used(seen)
        if self._used_blocks > bucket.peak_blocks:
            bucket.peak_blocks = self._used_blocks
        if bucket.num_samples == 0:
            bucket.num_samples = 1
            bucket.unwritten_shares, bucket.cached_shares = self._unwritten_share(), self._cached_share()

    def committed(
        self,
        batch: ScheduledBatch,
        sampled: list[Sequence],
        finished: list[Sequence],
        time_s: float,
        replica: int = 0,
    ) -> None:
        """The step is done: who got a token, and whose was the last."""
        seen = self._replicas[replica]
        self._note_step(seen, batch, time_s)
        if sampled:
            self._note_tokens(seen, sampled, time_s)
            self._counts["output_tokens"] += batch.num_output_tokens
            if batch.num_output_tokens > len(sampled):  # they have several at once
                self._itl.add(0.0, batch.num_output_tokens - len(sampled))
            self._last_token_at_s = time_s
        if finished:
            done = set(finished)
            seen.last_sampled = [sequence for sequence in seen.last_sampled if sequence not in done]
            for sequence in finished:
                self._finish(sequence, time_s)
            self._note_used(seen)

    def aborted(self, sequence: Sequence) -> None:
        """A request was given up before its last token; the scheduler has let it go."""
        request = self._requests.pop(sequence)
        seen = self._replicas[request.replica]
        seen.swapped.discard(sequence)
        if sequence in seen.last_sampled:
            seen.last_sampled.remove(sequence)
        last_s = None if request.first_token_s is None else seen.last_token_s
        last_token_s = self._last_token_s.pop(sequence, last_s)
        self._counts["timed_out"] += 1
        self._end(sequence, request, "timed_out", last_token_s)
        self._note_used(seen)

    def close(self) -> None:
        """Closes the file of results."""
        if self._results is not None:
            with _unwritable(self._results.name):
                self._results.close()

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
    ) -> Report:
        """What the replay of a trace gave, when it is over; see schema.py for what is what."""
        return Report(
            {
                "version": VERSION,
                "kind": kind,
                "trace": trace.name,
                "skipped": trace.skipped_records(),
                "model": model,
                "extrapolated": extrapolated,
                "profile_error": profile_error,
                "config": asdict(config),
                "load": load,
                "summary": self.summary(wall_s, trace.num_skipped, trace.num_dropped),
                "timeline": self.timeline(),
                "latencies": self.latencies(),
            }
        )

    def summary(self, wall_s: float, num_skipped: int = 0, num_dropped: int = 0) -> Summary:
        """The report's summary so far.

        wall_s: what getting there took. num_skipped, num_dropped: records that the trace left out.
        """
        counts = self._counts
        duration_s = max(0.0, self._last_token_at_s - (self._first_arrival_s or 0.0))
        tokens = counts["prompt_tokens"], counts["output_tokens"]
        goodput: Goodput | None = None
        if self._slo:
            share = counts["good"] / counts["requests"] if counts["requests"] else None
            rate = _rate(counts["good"], duration_s)
            goodput = {"slo": dict(self._slo), "share": share, "requests_per_s": rate}
        return {
            "num_requests": counts["requests"],
            "num_finished": counts["finished"],
            "num_timed_out": counts["timed_out"],
            "num_rejected": counts["rejected"],
            "num_skipped": num_skipped,
            "num_dropped": num_dropped,
            "duration_s": duration_s,
            "prompt_tokens": tokens[0],
            "output_tokens": tokens[1],
            "num_steps": counts["steps"],
            "requests_per_s": _rate(counts["finished"], duration_s),
            "output_tokens_per_s": _rate(tokens[1], duration_s),
            "total_tokens_per_s": _rate(sum(tokens), duration_s),
            "ttft_s": self._latencies["ttft"].summary(),
            "tpot_s": self._latencies["tpot"].summary(),
            "itl_s": self._itl.summary(),
            "e2e_s": self._latencies["e2e"].summary(),
            "queue_s": self._latencies["queue"].summary(),
            "goodput": goodput,
            "cache": self._cache(),
            "preemptions": {
                "recompute": self._preempted[Preemption.RECOMPUTE.value],
                "swap": self._preempted[Preemption.SWAP.value],
                "requests": counts["preempted"],
                "most_of_one_request": self._most_preemptions,
            },
            "kv": self._kv(duration_s),
            "wall_s": wall_s,
        }

    def timeline(self) -> TimelineData:
        """The report's timeline so far."""
        has_cache = any(seen.manager.enable_prefix_caching for seen in self._replicas)
        return self._timeline.to_dict(has_cache)

    def latencies(self) -> Latencies:
        """Of each latency the values at 0, 0.5, 1, ... 100 percent; empty where none was measured."""

        def curve(values: Exact | LogHistogram) -> list[float]:
            return values.quantiles(_CURVE) if len(values) else []

        exact = self._latencies
        return {
            "ttft_s": curve(exact["ttft"]),
            "tpot_s": curve(exact["tpot"]),
            "itl_s": curve(self._itl),
            "e2e_s": curve(exact["e2e"]),
            "queue_s": curve(exact["queue"]),
        }

    def _arrive(self, time_s: float) -> None:
        if self._first_arrival_s is None:
            self._first_arrival_s = time_s
        self._counts["requests"] += 1
        self._timeline.at(time_s).arrivals += 1

    def _note_admissions(self, batch: ScheduledBatch, time_s: float) -> None:
        for admitted in batch.admitted:
            request = self._requests[admitted.sequence]
            if request.first_scheduled_s is None:
                request.first_scheduled_s = time_s
                self._latencies["queue"].add(time_s - request.arrival_s)

    def _note_used(self, seen: _Replica) -> None:
        used = seen.manager.num_blocks - seen.manager.num_free_blocks
        self._used_blocks += used - seen.used_blocks
        seen.used_blocks = used
        if self._used_blocks > self._peak_blocks:
            self._peak_blocks = self._used_blocks

    def _unwritten_share(self) -> float:
        running = (s for seen in self._replicas for s in seen.scheduler.running)
        unwritten = sum(s.num_slots - s.num_computed_tokens for s in running)
        slots = self._used_blocks * self._replicas[0].manager.block_size
        return unwritten / slots if slots else 0.0

    def _cached_share(self) -> float:
        managers = [seen.manager for seen in self._replicas]
        num_cached: int = sum(manager.num_cached_blocks for manager in managers)
        return num_cached / sum(manager.num_blocks for manager in managers)

    def _note_step(self, seen: _Replica, batch: ScheduledBatch, time_s: float) -> None:
        num_tokens = batch.num_tokens
        num_decodes = len(batch.sequences)
        if num_tokens > num_decodes:
            num_decodes = batch.num_new_tokens.count(1)
        running, waiting, swapped = seen.running, seen.waiting, len(seen.swapped)
        for bucket, span_s in self._timeline.during(seen.start_s, time_s):
            bucket.running_time += running * span_s
            bucket.waiting_time += waiting * span_s
            bucket.swapped_time += swapped * span_s
            bucket.batch_tokens_time += num_tokens * span_s
            bucket.used_blocks_time += seen.used_blocks * span_s
            if self._used_blocks > bucket.peak_blocks:
                bucket.peak_blocks = self._used_blocks
        bucket.prefill_tokens += num_tokens - num_decodes
        bucket.decode_tokens += num_decodes
        self._counts["steps"] += 1

    def _note_tokens(self, seen: _Replica, sampled: list[Sequence], time_s: float) -> None:
        """Counts the gaps since the tokens before. Mostly it is the same sequences in step after step."""
        if sampled == seen.last_sampled:
            self._itl.add(time_s - seen.last_token_s, len(sampled))
        else:
            last = self._last_token_s
            last.update(dict.fromkeys(seen.last_sampled, seen.last_token_s))
            gaps = Counter(map(last.get, sampled))
            for before, count in gaps.items():
                if before is not None:
                    self._itl.add(time_s - before, count)
            for sequence in sampled:
                if last.pop(sequence, None) is None:
                    self._first_token(sequence, time_s)
            seen.last_sampled = sampled
        seen.last_token_s = time_s

    def _first_token(self, sequence: Sequence, time_s: float) -> None:
        request = self._requests[sequence]
        request.first_token_s = time_s
        self._latencies["ttft"].add(time_s - request.arrival_s)
        self._counts["prompt_tokens"] += sequence.num_prompt_tokens

    def _finish(self, sequence: Sequence, time_s: float) -> None:
        request = self._requests.pop(sequence)
        assert request.first_token_s is not None
        assert request.first_scheduled_s is not None
        measured = {
            "ttft_s": request.first_token_s - request.arrival_s,
            "e2e_s": time_s - request.arrival_s,
            "queue_s": request.first_scheduled_s - request.arrival_s,
        }
        self._latencies["e2e"].add(measured["e2e_s"])
        if sequence.num_output_tokens > 1:
            measured["tpot_s"] = (time_s - request.first_token_s) / (sequence.num_output_tokens - 1)
            self._latencies["tpot"].add(measured["tpot_s"])
        self._counts["finished"] += 1
        self._counts["good"] += all(measured.get(name, 0.0) <= most for name, most in self._slo.items())
        self._timeline.at(time_s).finished += 1
        self._end(sequence, request, "finished", time_s)

    def _end(self, sequence: Sequence, request: _Request, outcome: str, last_token_s: float | None) -> None:
        if sequence.num_preemptions:
            self._counts["preempted"] += 1
            self._most_preemptions = max(self._most_preemptions, sequence.num_preemptions)
        self._write(
            id=request.id,
            outcome=outcome,
            replica=request.replica,
            arrival_s=request.arrival_s,
            first_scheduled_s=request.first_scheduled_s,
            first_token_s=request.first_token_s,
            last_token_s=last_token_s,
            prompt_tokens=sequence.num_prompt_tokens,
            output_tokens=sequence.num_output_tokens,
            cached_tokens=sequence.num_cached_tokens,
            preemptions=sequence.num_preemptions,
        )

    def _write(self, **fields: Any) -> None:
        if self._results is not None:
            with _unwritable(self._results.name):
                self._results.write(json.dumps(fields, separators=(",", ":")) + "\n")

    def _cache(self) -> Cache:
        buckets = self._timeline.buckets
        queries, hits = sum(b.query_tokens for b in buckets), sum(b.hit_tokens for b in buckets)
        evicted = sum(seen.manager.stats.evictions - seen.first_evictions for seen in self._replicas)
        return {
            "query_tokens": queries,
            "hit_tokens": hits,
            "hit_rate": hits / queries if queries else None,
            "evicted_tokens": evicted,
        }

    def _kv(self, duration_s: float) -> KvCache:
        """The mean share is weighted by the blocks in use."""
        buckets = self._timeline.buckets
        used = sum(bucket.used_blocks_time for bucket in buckets)
        shares = self._timeline.sampled("unwritten_shares")
        unwritten = sum(s * b.used_blocks_time for s, b in zip(shares, buckets, strict=True))
        mean_blocks = used / duration_s if duration_s else 0.0
        size = self._block_bytes
        return {
            "num_blocks": sum(seen.manager.num_blocks for seen in self._replicas),
            "block_bytes": size,
            "peak_blocks": self._peak_blocks,
            "mean_blocks": mean_blocks,
            "peak_bytes": None if size is None else self._peak_blocks * size,
            "mean_bytes": None if size is None else mean_blocks * size,
            "mean_unwritten_share": unwritten / used if used else 0.0,
        }


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds else None


def _open(path: str | os.PathLike[str]) -> IO[str]:
    path = checks.path("results", path, ConfigError)
    with _unwritable(path):
        return open(path, "w", encoding="utf-8")


@contextmanager
def _unwritable(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"results: {path}: {error.strerror}, expected a file to write to") from error
