"""Who goes first: the policies that are built in, and the interface of all.

A policy decides about order alone. It cannot lose a request, overfill memory or make anybody wait for ever:
those are the scheduler's laws, whatever a policy answers. It knows no clock: time and statistics are
arguments.
"""

import math
from collections import Counter
from collections.abc import Hashable
from itertools import islice

from pagellm.engine.scheduling.policies.policy import Key
from pagellm.engine.scheduling.policies.victim import VictimPolicy
from pagellm.engine.scheduling.policies.views import SchedulerStats, SequenceView, StepView

ORDER_CHANGES = ("never", "cache", "always")


class SchedulingPolicy(VictimPolicy):
    """First come, first served; the others override what they do differently.

    prefills_alone: whether a step computes either prompts or decodes, prompts first, instead of both.

    order_changes: when the keys of those that wait are asked for again: "never"; "cache": before a step, if
    the prefix cache knows other blocks than it did; "always": before every step. It counts for the `order` of
    the class that says it. A class with an `order` of its own that does not say it is asked always.
    """

    prefills_alone = False
    order_changes = "never"

    def order(self, sequence: SequenceView, stats: SchedulerStats) -> Key:
        """The sort key of a sequence: a number or a tuple of numbers, the lowest goes first.

        Asked when the sequence begins to wait and as `order_changes` says; equal keys go by arrival.
        """
        return sequence.arrival_index

    def queue_of(self, sequence: SequenceView) -> Hashable:
        """The queue that a sequence waits in. Most policies have one; see `queue_order`."""
        return None

    def queue_order(self, queue: Hashable, stats: SchedulerStats) -> Key:
        """The sort key of a queue, asked whenever something could be admitted; the lowest is served next."""
        return 0

    def victim(self, candidates: list[SequenceView], stats: SchedulerStats) -> SequenceView:
        """Which of the running sequences gives up its blocks when memory runs out: the last in order."""
        return max(candidates, key=lambda s: (self.order(s, stats), s.arrival_index))


class PrefillFirst(SchedulingPolicy):
    """The classic two phases: prompts as soon as they fit, and decodes in steps without any."""

    prefills_alone = True


class Priority(SchedulingPolicy):
    """The lowest `SamplingParams.priority` first."""

    order_changes = "never"

    def order(self, sequence: SequenceView, stats: SchedulerStats) -> Key:
        return sequence.sampling_params.priority


class ShortestJob(SchedulingPolicy):
    """The fewest tokens of prompt and longest possible output first.

    Ageing: a second of waiting counts like `AGEING_TOKENS` fewer, so a long one is passed over for so long
    and no longer. Written with the arrival in the place of the wait, the key need not change as time passes.
    """

    order_changes = "never"
    AGEING_TOKENS = 100.0

    def order(self, sequence: SequenceView, stats: SchedulerStats) -> Key:
        return sequence.max_len + self.AGEING_TOKENS * sequence.arrival_time


class Fair(SchedulingPolicy):
    """The tenant that has been served least goes first: virtual token counters (Sheng et al., OSDI 2024).

    A generated token costs `DECODE_WEIGHT` times what a computed one does. A tenant that comes back from
    idleness starts where the least served active one stands, or where the last one stood when it left, so
    that idleness earns no credit.
    """

    DECODE_WEIGHT = 2.0

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.active: Counter[str] = Counter()  # unfinished sequences of each tenant
        self._last_left = ""  # the tenant that became idle last

    def queue_of(self, sequence: SequenceView) -> Hashable:
        return sequence.sampling_params.tenant

    def queue_order(self, queue: Hashable, stats: SchedulerStats) -> Key:
        return self.counters.get(str(queue), 0.0)

    def victim(self, candidates: list[SequenceView], stats: SchedulerStats) -> SequenceView:
        """The youngest of the tenant that has been served most."""
        return max(candidates, key=lambda s: (self.counters[s.sampling_params.tenant], self.order(s, stats)))

    def on_add(self, sequence: SequenceView, stats: SchedulerStats) -> None:
        tenant = sequence.sampling_params.tenant
        if tenant not in self.active:
            others = self.active or (self._last_left,)
            least = min(self.counters.get(other, 0.0) for other in others)
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), least)
        self.active[tenant] += 1

    def on_commit(self, batch: StepView, stats: SchedulerStats) -> None:
        given, forks = iter(batch.token_ids), batch.forks
        for sequence, count, samples in zip(
            batch.sequences, batch.num_new_tokens, batch.samples, strict=True
        ):
            num_samples = samples and 1 + len(forks.get(sequence, ()))
            num_sampled = sum(map(len, islice(given, num_samples)))
            self.counters[sequence.sampling_params.tenant] += count + self.DECODE_WEIGHT * num_sampled

    def on_finish(self, sequence: SequenceView, stats: SchedulerStats) -> None:
        tenant = sequence.sampling_params.tenant
        self.active[tenant] -= 1
        if self.active[tenant] == 0:
            del self.active[tenant]
            self._last_left = tenant


class EarliestDeadline(SchedulingPolicy):
    """The earliest deadline first: arrival and `SamplingParams.deadline_s`; those without come last."""

    order_changes = "never"

    def order(self, sequence: SequenceView, stats: SchedulerStats) -> Key:
        deadline_s = sequence.sampling_params.deadline_s
        return math.inf if deadline_s is None else sequence.arrival_time + deadline_s


POLICIES: dict[str, type[SchedulingPolicy]] = {
    "fcfs": SchedulingPolicy,
    "prefill_first": PrefillFirst,
    "priority": Priority,
    "shortest_job": ShortestJob,
    "fair": Fair,
    "slo": EarliestDeadline,
}
