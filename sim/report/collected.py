"""What is gathered of a run while it goes on: listeners of its step loops, and what they have seen together.

It is told of events and their times, by a simulation or by whoever drives an engine, and looks at the
schedulers for the state in between. It costs a few operations a step and memory that grows with the number
of requests alone, four numbers each.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from operator import sub

from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.scheduling.batch import Preemption, ScheduledBatch
from pagellm.engine.scheduling.block_manager import PrefixCacheStats
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepEnd, StepListener
from pagellm.engine.scheduling.stride import Stride
from pagellm.sim.quantiles import Exact, LogHistogram
from pagellm.sim.report.groups import PLACES, GroupFigures, Groups
from pagellm.sim.report.results_file import ResultsFile
from pagellm.sim.report.timeline import Bucket, Timeline


@dataclass(slots=True)
class _Request:
    """A request under way; its times in seconds."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    groups: list[GroupFigures] = field(default_factory=list)
    # Of one that went on elsewhere: tokens of its answer that are counted where it was before.
    counted_tokens: int | None = None


# Of those that end before their time, what is no client's giving up.
_OUTCOMES: dict[FinishReason | None, str] = {FinishReason.SHED: "shed", FinishReason.ERROR: "failed"}


class Collected:
    """What the replicas of one run have seen together.

    slo: the most seconds of a good request, by the names in `SLO_NAMES`. results: a file that gets a line of
    JSON for each request when it ends. names_replicas: whether figures are told by replica.
    """

    def __init__(
        self, slo: Mapping[str, float], results: str | os.PathLike[str] | None, names_replicas: bool
    ) -> None:
        self.slo = dict(slo)
        self.results = None if results is None else ResultsFile(results)
        self.replicas: list[ReplicaListener] = []
        self.requests: dict[Sequence, _Request] = {}  # those under way
        self.last_token_s: dict[Sequence, float] = {}  # of those in no replica's last_sampled
        self.latencies: dict[str, Exact] = {name: Exact() for name in ("ttft", "tpot", "e2e", "queue")}
        self.itl = LogHistogram()
        self.timeline = Timeline()
        self.counts: Counter[str] = Counter()
        self.groups = Groups(names_replicas)
        # Of requests whose class is known, until they are added: by sequence, or by request_id.
        self.classes: dict[Sequence | str, str] = {}
        self.preempted: Counter[str] = Counter()
        self.used_blocks = self.peak_blocks = self.most_preemptions = 0
        self.first_arrival_s: float | None = None
        self.last_token_at_s = 0.0

    def arrive(self, time_s: float) -> None:
        """A request came."""
        if self.first_arrival_s is None:
            self.first_arrival_s = time_s
        self.counts["requests"] += 1
        self.timeline.at(time_s).arrivals += 1

    def unwritten_share(self, num_more: int = 0) -> float:
        """Of the slots in blocks in use, the share that holds no token yet. num_more: than there are now."""
        unwritten = sum(_num_unwritten(replica.scheduler.running) for replica in self.replicas) + num_more
        slots = sum(replica.used_blocks * replica.manager.block_size for replica in self.replicas)
        return unwritten / slots if slots else 0.0

    def cached_share(self, num_more: int = 0) -> float:
        """Of all blocks, the share that holds a known prefix. num_more: than there are now."""
        managers = [replica.manager for replica in self.replicas]
        num_cached: int = sum(manager.num_cached_blocks for manager in managers) + num_more
        return num_cached / sum(manager.num_blocks for manager in managers)


class ReplicaListener(StepListener):
    """Hears of one scheduler's steps, and keeps what was seen of it last."""

    takes_strides = True

    def __init__(self, number: int, scheduler: Scheduler, run: Collected, group: str | None = None) -> None:
        self.scheduler = scheduler
        self.manager = scheduler.block_manager
        self._number, self._group = number, group
        self._run = run
        self.busy_s = 0.0  # with a step under way
        self._timeline, self._counts, self._itl = run.timeline, run.counts, run.itl  # which are at hand so
        self.swapped: set[Sequence] = set()
        self._first_stats = replace(self.manager.stats)
        self._queries, self._hits = self._first_stats.queries, self._first_stats.hits
        self._start_s = 0.0  # of the step under way, and then
        self._running = self._waiting = self.used_blocks = 0
        # Those that got a token last, when all of them did.
        self.last_sampled: list[Sequence] = []
        self._last_token_s = 0.0

    def cache_stats(self) -> PrefixCacheStats:
        """What the prefix cache did since this listens."""
        now, before = asdict(self.manager.stats), asdict(self._first_stats)
        return PrefixCacheStats(**{name: now[name] - before[name] for name in now})

    def added(self, sequence: Sequence) -> None:
        run = self._run
        if sequence in run.requests:
            self._take_over(sequence)
            return
        run.arrive(sequence.arrival_time)
        class_ = None
        if run.classes:
            class_ = run.classes.pop(sequence, None) or run.classes.pop(sequence.request_id, None)
        groups = run.groups.of(self._number, sequence.sampling_params.tenant, class_, self._group)
        run.requests[sequence] = _Request(sequence.arrival_time, None, None, groups)
        for group in groups:
            group.counts["requests"] += 1

    def left(self, sequence: Sequence, why: str) -> None:
        """It goes on elsewhere; what it got here is counted here."""
        run = self._run
        request = run.requests[sequence]
        self.swapped.discard(sequence)
        if sequence in self.last_sampled:
            self.last_sampled = [other for other in self.last_sampled if other is not sequence]
            run.last_token_s[sequence] = self._last_token_s
        for group in request.groups:
            if group.kind in PLACES:
                self._count_tokens(group, sequence, request)
        request.counted_tokens = sequence.num_output_tokens
        self._note_used(self.manager.num_free_blocks)

    def _take_over(self, sequence: Sequence) -> None:
        """A request that was elsewhere before comes here."""
        request = self._run.requests[sequence]
        self._run.classes.pop(sequence, None)
        here = self._run.groups.of(self._number, None, None, self._group)
        request.groups = here + [group for group in request.groups if group.kind not in PLACES]
        for group in here:
            group.counts["requests"] += 1

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        run = self._run
        bucket = self._timeline.at(now)
        if batch.admitted:
            self._note_admissions(batch, now)
            if self.swapped:
                self.swapped.difference_update(admitted.sequence for admitted in batch.admitted)
            stats = self.manager.stats
            bucket.query_tokens += stats.queries - self._queries
            bucket.hit_tokens += stats.hits - self._hits
            self._queries, self._hits = stats.queries, stats.hits
        if batch.preempted:
            bucket.preemptions += len(batch.preempted)
            run.preempted.update(preempted.by.value for preempted in batch.preempted)
            self.swapped.update(p.sequence for p in batch.preempted if p.by is Preemption.SWAP)
        self._start_s = now
        self._running = len(self.scheduler.running)
        self._waiting = self.scheduler.num_waiting - len(self.swapped)
        self._note_used(self.manager.num_free_blocks)
        if run.used_blocks > bucket.peak_blocks:
            bucket.peak_blocks = run.used_blocks
        if bucket.num_samples == 0:
            bucket.num_samples = 1
            bucket.unwritten_shares, bucket.cached_shares = run.unwritten_share(), run.cached_share()

    def committed(self, end: StepEnd) -> None:
        batch, sampled, finished, now = end.batch, end.sampled, end.finished, end.now
        num_tokens = sum(batch.num_new_tokens)
        num_decodes = len(batch.sequences)
        if num_tokens > num_decodes:
            num_decodes = batch.num_new_tokens.count(1)
        self._note_step(self._start_s, now, num_tokens, num_decodes)
        self._counts["steps"] += 1
        self.busy_s += now - self._start_s
        if sampled:
            self._note_tokens(sampled, now)
            num_tokens = batch.num_output_tokens
            self._counts["output_tokens"] += num_tokens
            if num_tokens > len(sampled):  # they have several at once
                self._itl.add(0.0, num_tokens - len(sampled))
            self._run.last_token_at_s = now
        if finished:
            self._finish_all(finished, now)

    def strode(self, stride: Stride) -> None:
        run, times, sequences = self._run, stride.times, stride.batch.sampled
        num_steps, num_sequences = len(times) - 1, len(sequences)
        self._note_steps(stride)
        spans = list(map(sub, times[1:], times))
        busy_s = self.busy_s
        for span_s in spans:
            busy_s += span_s
        self.busy_s = busy_s
        self._note_tokens(sequences, times[1])
        self._itl.add_each(spans[1:], num_sequences)
        self._last_token_s = run.last_token_at_s = times[-1]
        self._counts["output_tokens"] += num_steps * num_sequences
        if stride.finished:
            self._finish_all(stride.finished, times[-1])

    def ended(self, sequence: Sequence) -> None:
        run = self._run
        request = run.requests.pop(sequence)
        self.swapped.discard(sequence)
        if sequence in self.last_sampled:
            self.last_sampled.remove(sequence)
        last_s = None if request.first_token_s is None else self._last_token_s
        last_token_s = run.last_token_s.pop(sequence, last_s)
        outcome = _OUTCOMES.get(sequence.finish_reason, "timed_out")
        run.counts[outcome] += 1
        self._end(sequence, request, outcome, last_token_s)
        self._note_used(self.manager.num_free_blocks)

    def _note_admissions(self, batch: ScheduledBatch, time_s: float) -> None:
        for admitted in batch.admitted:
            request = self._run.requests[admitted.sequence]
            if request.first_scheduled_s is None:
                request.first_scheduled_s = time_s
                self._run.latencies["queue"].add(time_s - request.arrival_s)

    def note_used(self) -> None:
        """Looks at how many blocks are in use."""
        self._note_used(self.manager.num_free_blocks)

    def _note_used(self, num_free_blocks: int) -> None:
        run = self._run
        used = self.manager.num_blocks - num_free_blocks
        run.used_blocks += used - self.used_blocks
        self.used_blocks = used
        if run.used_blocks > run.peak_blocks:
            run.peak_blocks = run.used_blocks

    def _note_step(self, start_s: float, time_s: float, num_tokens: int, num_decodes: int) -> None:
        run = self._run
        running, waiting, swapped = self._running, self._waiting, len(self.swapped)
        for bucket, span_s in self._timeline.during(start_s, time_s):
            bucket.running_time += running * span_s
            if waiting:
                bucket.waiting_time += waiting * span_s
            if swapped:
                bucket.swapped_time += swapped * span_s
            bucket.batch_tokens_time += num_tokens * span_s
            bucket.used_blocks_time += self.used_blocks * span_s
            if run.used_blocks > bucket.peak_blocks:
                bucket.peak_blocks = run.used_blocks
        bucket.prefill_tokens += num_tokens - num_decodes
        bucket.decode_tokens += num_decodes

    def _note_steps(self, stride: Stride) -> None:
        """Counts the steps of a stride as `_note_step` does. Most end in the bucket in which they begin."""
        run, timeline, times, num_decodes = (
            self._run,
            self._timeline,
            stride.times,
            len(stride.batch.sequences),
        )
        waiting, swapped = self._waiting, len(self.swapped)
        begin, last = 0, len(times) - 1
        changes = iter((*stride.changes, None))
        change = next(changes)
        while begin < last:
            if change is not None and change.step == begin:
                self._note_used(change.num_free_blocks)
                change = next(changes)
            bucket = timeline.at(times[begin])
            if bucket.num_samples == 0:
                self._sample(bucket, stride, begin)
            spans = timeline.spans(times, begin)
            if not spans:
                self._note_step(times[begin], times[begin + 1], num_decodes, num_decodes)
                begin += 1
                continue
            end = begin + len(spans)
            running_time, batch_tokens_time = bucket.running_time, bucket.batch_tokens_time
            used_blocks_time = bucket.used_blocks_time
            while begin < end:
                if change is not None and change.step == begin:
                    self._note_used(change.num_free_blocks)
                    change = next(changes)
                used, following = self.used_blocks, end if change is None else min(end, change.step)
                for span_s in spans[begin - end : following - end or None]:
                    decodes_time = num_decodes * span_s  # all that run decode
                    running_time += decodes_time
                    batch_tokens_time += decodes_time
                    used_blocks_time += used * span_s
                if run.used_blocks > bucket.peak_blocks:
                    bucket.peak_blocks = run.used_blocks
                begin = following
            bucket.running_time, bucket.batch_tokens_time = running_time, batch_tokens_time
            bucket.used_blocks_time = used_blocks_time
            for span_s in spans if waiting else ():
                bucket.waiting_time += waiting * span_s
            for span_s in spans if swapped else ():
                bucket.swapped_time += swapped * span_s
            bucket.decode_tokens += num_decodes * len(spans)
        self._counts["steps"] += last

    def _sample(self, bucket: Bucket, stride: Stride, step: int) -> None:
        """The shares as they were when a step of a stride had been scheduled, which is over by now."""
        run = self._run
        bucket.num_samples = 1
        num_unwritten = stride.num_unwritten_slots - step * len(stride.batch.sequences)
        num_cached = stride.num_cached_blocks
        for change in stride.changes:
            if change.step <= step:
                num_unwritten += change.num_new_slots
                num_cached = change.num_cached_blocks
        bucket.unwritten_shares = run.unwritten_share(num_unwritten - _num_unwritten(self.scheduler.running))
        bucket.cached_shares = run.cached_share(num_cached - self.manager.num_cached_blocks)

    def _note_tokens(self, sampled: list[Sequence], time_s: float) -> None:
        """Counts the gaps since the tokens before. Mostly it is the same sequences in step after step."""
        if sampled == self.last_sampled:
            self._itl.add(time_s - self._last_token_s, len(sampled))
        else:
            last, before = self._run.last_token_s, self.last_sampled
            num_same = len(before)
            if sampled[:num_same] == before and last.keys().isdisjoint(sampled[num_same:]):
                # Those of the step before, and behind them some that begin.
                if before:
                    self._itl.add(time_s - self._last_token_s, num_same)
                for sequence in sampled[num_same:]:
                    self._first_token(sequence, time_s)
                self.last_sampled = sampled
                self._last_token_s = time_s
                return
            last.update(dict.fromkeys(self.last_sampled, self._last_token_s))
            gaps = Counter(map(last.get, sampled))
            for before_s, count in gaps.items():
                if before_s is not None:
                    self._itl.add(time_s - before_s, count)
            for sequence in sampled:
                if last.pop(sequence, None) is None:
                    self._first_token(sequence, time_s)
            self.last_sampled = sampled
        self._last_token_s = time_s

    def _first_token(self, sequence: Sequence, time_s: float) -> None:
        request = self._run.requests[sequence]
        request.first_token_s = time_s
        self._run.latencies["ttft"].add(time_s - request.arrival_s)
        for group in request.groups:
            group.latencies["ttft_s"].add(time_s - request.arrival_s)
        self._run.counts["prompt_tokens"] += sequence.num_prompt_tokens

    def _finish_all(self, finished: list[Sequence], time_s: float) -> None:
        done = set(finished)
        self.last_sampled = [sequence for sequence in self.last_sampled if sequence not in done]
        for sequence in finished:
            self._finish(sequence, time_s)
        self._note_used(self.manager.num_free_blocks)

    def _finish(self, sequence: Sequence, time_s: float) -> None:
        run = self._run
        request = run.requests.pop(sequence)
        assert request.first_token_s is not None
        assert request.first_scheduled_s is not None
        measured = {"e2e_s": time_s - request.arrival_s}
        run.latencies["e2e"].add(measured["e2e_s"])
        num_gaps = sequence.num_output_tokens - 1
        if num_gaps > 0:
            measured["tpot_s"] = (time_s - request.first_token_s) / num_gaps
            run.latencies["tpot"].add(measured["tpot_s"])
        run.counts["finished"] += 1
        for group in request.groups:
            group.counts["finished"] += 1
            for name in ("tpot_s", "e2e_s"):
                if name in measured:
                    group.latencies[name].add(measured[name])
        is_good = True
        if run.slo:
            measured["ttft_s"] = request.first_token_s - request.arrival_s
            measured["queue_s"] = request.first_scheduled_s - request.arrival_s
            is_good = all(measured.get(name, 0.0) <= most for name, most in run.slo.items())
        run.counts["good"] += is_good
        bucket = run.timeline.at(time_s)
        bucket.finished += 1
        if is_good:
            bucket.good += 1
            run.timeline.at(request.arrival_s).good_arrived += 1
            for group in request.groups:
                group.counts["good"] += 1
        self._end(sequence, request, "finished", time_s)

    def _count_tokens(self, group: GroupFigures, sequence: Sequence, request: _Request) -> None:
        counts, before = group.counts, request.counted_tokens
        counts["output_tokens"] += sequence.num_output_tokens
        if before is not None and group.kind in PLACES:
            counts["output_tokens"] -= before
            return
        counts["prompt_tokens"] += sequence.num_prompt_tokens
        counts["cached_tokens"] += sequence.num_cached_tokens

    def _end(self, sequence: Sequence, request: _Request, outcome: str, last_token_s: float | None) -> None:
        run = self._run
        for group in request.groups:
            self._count_tokens(group, sequence, request)
        if sequence.num_preemptions:
            run.counts["preempted"] += 1
            run.most_preemptions = max(run.most_preemptions, sequence.num_preemptions)
        if run.results is not None:
            run.results.write(
                id=sequence.request_id,
                outcome=outcome,
                replica=self._number,
                arrival_s=request.arrival_s,
                first_scheduled_s=request.first_scheduled_s,
                first_token_s=request.first_token_s,
                last_token_s=last_token_s,
                prompt_tokens=sequence.num_prompt_tokens,
                output_tokens=sequence.num_output_tokens,
                cached_tokens=sequence.num_cached_tokens,
                preemptions=sequence.num_preemptions,
            )


def _num_unwritten(running: list[Sequence]) -> int:
    return sum(sequence.num_slots - sequence.num_computed_tokens for sequence in running)
