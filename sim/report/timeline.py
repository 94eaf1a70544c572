"""What happened when: sums over equal spans of time, of which there are never more than a fixed number.

When a run outgrows them, every two become one of twice the width.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from operator import sub
from typing import Any, cast

from pagellm.sim.report.schema import TimelineData

MAX_BUCKETS = 2000
_FIRST_WIDTH_S = 1e-3


# Of time, in seconds from and to.
Spans = Iterable[tuple[float, float]]


class Bucket:
    """One span. Those that end in `_time` are integrals, of sequences, tokens or blocks over seconds."""

    __slots__ = (
        "arrivals",
        "batch_tokens_time",
        "cached_shares",
        "decode_tokens",
        "finished",
        "good",
        "good_arrived",
        "hit_tokens",
        "num_samples",
        "peak_blocks",
        "preemptions",
        "prefill_tokens",
        "query_tokens",
        "running_time",
        "swapped_time",
        "unwritten_shares",
        "used_blocks_time",
        "waiting_time",
    )

    def __init__(self) -> None:
        self.running_time = self.waiting_time = self.swapped_time = 0.0
        self.batch_tokens_time = self.used_blocks_time = 0.0
        self.peak_blocks = 0
        self.arrivals = self.finished = self.preemptions = 0
        # Requests that keep the SLO: those that ended here, and those that came here.
        self.good = self.good_arrived = 0
        self.prefill_tokens = self.decode_tokens = 0
        self.query_tokens = self.hit_tokens = 0  # of prompts that the prefix cache was asked for, and found
        self.unwritten_shares = self.cached_shares = 0.0  # sums of samples
        self.num_samples = 0

    def merge(self, other: "Bucket") -> None:
        """Takes the next span in."""
        for name in self.__slots__:
            mine, others = getattr(self, name), getattr(other, name)
            setattr(self, name, max(mine, others) if name == "peak_blocks" else mine + others)


class Timeline:
    """The buckets of a run; times are seconds on any clock, its buckets begin at the first one given."""

    def __init__(self) -> None:
        self.start_s: float | None = None
        self.end_s = 0.0  # the last moment that was given
        self.width_s = _FIRST_WIDTH_S
        self.buckets: list[Bucket] = []

    def at(self, time_s: float) -> Bucket:
        """The bucket of a moment, which must not be before the first."""
        if self.start_s is None:
            self.start_s = time_s
        if time_s > self.end_s:
            self.end_s = time_s
        index = int((time_s - self.start_s) / self.width_s)
        if index >= len(self.buckets):
            index = self._make(index)
        return self.buckets[index]

    def during(self, start_s: float, end_s: float) -> list[tuple[Bucket, float]]:
        """The buckets that a span of time touches, and the seconds of it in each."""
        bucket = self.at(end_s)
        assert self.start_s is not None
        start, end, width = start_s - self.start_s, end_s - self.start_s, self.width_s
        first, last = int(start / width), int(end / width)
        if first == last and start >= first * width:  # as mostly
            return [(bucket, end - start)]
        spans = []
        for index in range(first, last + 1):
            begin = max(start, index * width)
            seconds = (end if index == last else (index + 1) * width) - begin
            spans.append((self.buckets[index], max(seconds, 0.0)))  # a border may round to before the start
        return spans

    def spans(self, times: Sequence[float], begin: int) -> list[float]:
        """The seconds between times that follow each other, from times[begin] on, as `during` has them.

        As many of them as end in the bucket in which the first begins; none where that is on a border.
        """
        assert self.start_s is not None
        start_s, width = self.start_s, self.width_s
        index = int((times[begin] - start_s) / width)
        if times[begin] - start_s < index * width:
            return []
        end = len(times)
        if int((times[-1] - start_s) / width) > index:
            end = bisect_right(times, index, begin, key=lambda time: int((time - start_s) / width))
        if times[end - 1] > self.end_s:
            self.end_s = times[end - 1]
        starts = [time - start_s for time in times[begin:end]]
        return list(map(sub, starts[1:], starts))

    def sampled(self, sums: str) -> list[float]:
        """The mean of the samples that a field of each bucket sums up, or of those of a bucket before."""
        means, last = [], 0.0
        for bucket in self.buckets:
            if bucket.num_samples:
                last = getattr(bucket, sums) / bucket.num_samples
            means.append(last)
        return means

    def to_dict(self, has_cache: bool, has_slo: bool = False, up: Spans | None = None) -> TimelineData:
        """The report's timeline; the last bucket is as wide as there is something to say of it.

        up: spans of time, in seconds from and to, in which each replica was up, where they come and go.
        """
        start_s, width = self.start_s or 0.0, self.width_s
        begins = [start_s + index * width for index in range(len(self.buckets))]
        spans = [min(width, max(self.end_s - begin, 0.0)) for begin in begins]
        series: dict[str, Any] = {"time_s": begins, "bucket_s": width}
        for name in ("running", "waiting", "swapped", "batch_tokens", "used_blocks"):
            integrals = (getattr(bucket, f"{name}_time") for bucket in self.buckets)
            series[name] = [i / span if span else 0.0 for i, span in zip(integrals, spans, strict=True)]
        counts = ["peak_blocks", "preemptions", "arrivals", "finished", "prefill_tokens", "decode_tokens"]
        counts += ["good"] if has_slo else []
        for name in counts:
            series[name] = [getattr(bucket, name) for bucket in self.buckets]
        for name in ("unwritten_share", "cached_share"):
            series[name] = self.sampled(f"{name}s")
        series["hit_rate"] = [
            bucket.hit_tokens / bucket.query_tokens if has_cache and bucket.query_tokens else None
            for bucket in self.buckets
        ]
        if up is not None:
            series["replicas"] = [
                _overlap(up, begin, begin + span) / span if span else 0.0
                for begin, span in zip(begins, spans, strict=True)
            ]
        return cast(TimelineData, series)

    def _make(self, index: int) -> int:
        """Makes the buckets up to one, wider ones if they were too many; returns its index."""
        while index >= MAX_BUCKETS:
            if len(self.buckets) % 2:
                self.buckets.append(Bucket())
            pairs = list(zip(self.buckets[::2], self.buckets[1::2], strict=True))
            for first, second in pairs:
                first.merge(second)
            self.buckets = [first for first, _ in pairs]
            self.width_s *= 2
            index //= 2
        self.buckets += [Bucket() for _ in range(index + 1 - len(self.buckets))]
        return index


def _overlap(spans: Spans, begin: float, end: float) -> float:
    """The seconds of some spans that lie in one."""
    return sum(max(0.0, min(end, to) - max(begin, since)) for since, to in spans)
