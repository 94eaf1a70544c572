"""Policies that a user should not write, loaded as one would: by `module:Class`."""

import math
from collections.abc import Hashable
from typing import Any

from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.policies import SchedulerStats, SchedulingPolicy
from pagellm.engine.scheduling.sequence import Sequence


class Whimsical(SchedulingPolicy):
    """Answers what is allowed and makes no sense: another order and another victim each time."""

    def __init__(self) -> None:
        self.state = 1

    def whim(self) -> int:
        self.state = self.state * 1_103_515_245 + 12_345 & 0x7FFFFFFF
        return self.state >> 8

    def order(self, sequence: Sequence, stats: SchedulerStats) -> tuple[float, ...]:
        return (self.whim() % 3, math.inf) if self.whim() % 2 else (-math.inf,)

    def queue_of(self, sequence: Sequence) -> Hashable:
        return ("queue", self.whim() % 3)

    def queue_order(self, queue: Hashable, stats: SchedulerStats) -> float:
        return self.whim() % 3

    def victim(self, candidates: list[Sequence], stats: SchedulerStats) -> Sequence:
        victim = candidates[self.whim() % len(candidates)]
        candidates.clear()
        return victim


class WhimsicalPrefillFirst(Whimsical):
    """The same in two phases."""

    prefills_alone = True


# What a policy may do wrong, by the method that does it.
FAULTS: dict[str, list[Any]] = {
    "order": [RuntimeError, math.nan, None, "key", (1, "key")],
    "queue_of": [RuntimeError, []],
    "queue_order": [RuntimeError, math.nan, None, "key"],
    "victim": [RuntimeError, None, "a stranger"],
    "on_add": [RuntimeError],
    "on_commit": [RuntimeError],
    "on_finish": [RuntimeError],
}


class Faulty(Whimsical):
    """Goes wrong in one of its methods, the so-and-so-many-th time that it is asked."""

    method, answer, after = "order", None, 0  # set before one is made

    def __init__(self) -> None:
        super().__init__()
        self.left = self.after

    def ask(self, method: str, right: Any) -> Any:
        if method == self.method:
            self.left -= 1
            if self.left < 0:
                if self.answer is RuntimeError:
                    raise RuntimeError("out of order")
                return (
                    Sequence(10**6, [0], right.sampling_params)
                    if method == "victim" and self.answer
                    else self.answer
                )
        return right

    def order(self, sequence: Sequence, stats: SchedulerStats) -> Any:
        return self.ask("order", super().order(sequence, stats))

    def queue_of(self, sequence: Sequence) -> Any:
        return self.ask("queue_of", super().queue_of(sequence))

    def queue_order(self, queue: Hashable, stats: SchedulerStats) -> Any:
        return self.ask("queue_order", super().queue_order(queue, stats))

    def victim(self, candidates: list[Sequence], stats: SchedulerStats) -> Any:
        return self.ask("victim", super().victim(candidates, stats))

    def on_add(self, sequence: Sequence, stats: SchedulerStats) -> None:
        self.ask("on_add", None)

    def on_commit(self, batch: ScheduledBatch, stats: SchedulerStats) -> None:
        self.ask("on_commit", None)

    def on_finish(self, sequence: Sequence, stats: SchedulerStats) -> None:
        self.ask("on_finish", None)


class FaultyPrefillFirst(Faulty):
    """The same in two phases."""

    prefills_alone = True
