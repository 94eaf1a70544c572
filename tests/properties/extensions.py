"""Policies for every extension point that a user should not write: they answer at random, or go wrong."""

import math
from collections.abc import Hashable
from typing import Any, ClassVar

from pagellm.engine.scheduling.policies import (
    AdmissionPolicy,
    BlockView,
    BudgetPolicy,
    EvictionPolicy,
    SchedulerStats,
    SchedulingPolicy,
    SequenceView,
    VictimPolicy,
)


class Whims:
    """Numbers without sense, the same in every run; and what one of them does wrong, and when."""

    fault: ClassVar[tuple[str, Any]] = ("", None)  # a method, and what it does: an answer, or an error
    after: ClassVar[int] = 0  # calls of it that are right

    def __init__(self) -> None:
        self.state, self.left = 1, self.after

    def whim(self, below: int) -> int:
        self.state = self.state * 1_103_515_245 + 12_345 & 0x7FFFFFFF
        return (self.state >> 8) % below

    def say(self, method: str, right: Any) -> Any:
        if self.fault[0] != method:
            return right
        self.left -= 1
        if self.left >= 0:
            return right
        if isinstance(self.fault[1], Exception):
            raise self.fault[1]
        return self.fault[1]


class Order(Whims, SchedulingPolicy):
    def order(self, sequence: SequenceView, stats: SchedulerStats) -> Any:
        right = (-sequence.num_cached_tokens, self.whim(3))
        return self.say("order", right)


class CachedFirst(SchedulingPolicy):
    order_changes = "cache"

    def order(self, sequence: SequenceView, stats: SchedulerStats) -> float:
        return -sequence.num_cached_tokens


class Victim(Whims, VictimPolicy):
    def victim(self, candidates: list[SequenceView], stats: SchedulerStats) -> Any:
        return self.say("victim", candidates[self.whim(len(candidates))])

    def make_way(self, candidates: list[SequenceView], first: SequenceView, stats: SchedulerStats) -> Any:
        return self.say("make_way", [one for one in candidates if self.whim(4) == 0])


class Admission(Whims, AdmissionPolicy):
    def admit(self, sequence: SequenceView, stats: SchedulerStats) -> Any:
        return self.say("admit", ("accept", "queue", "queue", "shed")[self.whim(4)])


class Budget(Whims, BudgetPolicy):
    def budget(self, most: Any, decodes: Any, prefills: Any, stats: SchedulerStats) -> Any:
        return self.say("budget", (self.whim(most[0] + 3), self.whim(most[1] + 3)))


class Eviction(Whims, EvictionPolicy):
    def order(self, block: BlockView) -> Any:
        return self.say("block_order", (self.whim(3), -math.inf))

    def queue_of(self, block: BlockView) -> Hashable:
        return self.say("block_queue_of", ("queue", self.whim(3)))

    def queue_order(self, queue: Hashable) -> Any:
        return self.say("block_queue_order", self.whim(3))

    def on_known(self, block: BlockView) -> None:
        self.say("on_known", block.depth)

    def on_hit(self, block: BlockView) -> None:
        self.say("on_hit", None)

    def on_evict(self, block: BlockView) -> None:
        self.say("on_evict", block.hash)


class Recent(EvictionPolicy):
    """The least recently used first, by the interface and not as it is built in."""

    def order(self, block: BlockView) -> float:
        return block.last_used


FAULTS: list[tuple[str, Any]] = [
    ("", None),
    *[("order", wrong) for wrong in (RuntimeError("no"), None, math.nan, "key")],
    *[("victim", wrong) for wrong in (RuntimeError("no"), None, 3)],
    *[("make_way", wrong) for wrong in (RuntimeError("no"), None, ["somebody"])],
    *[("admit", wrong) for wrong in (RuntimeError("no"), None, "perhaps", [])],
    *[("budget", wrong) for wrong in (RuntimeError("no"), None, (1,), (-1, 2), (2, 1.5), (True, 1))],
    *[("block_order", wrong) for wrong in (RuntimeError("no"), None, (1, "key"))],
    *[("block_queue_of", wrong) for wrong in (RuntimeError("no"), [])],
    *[("block_queue_order", wrong) for wrong in (RuntimeError("no"), math.nan)],
    *[(hook, RuntimeError("no")) for hook in ("on_known", "on_hit", "on_evict")],
]
NAMES = {
    "policy": ["fcfs", "fair", "Order", "CachedFirst"],
    "victim": [None, "youngest", "Victim"],
    "admission": ["accept", "Admission"],
    "eviction": ["lru", "Eviction", "Recent"],
    "budget": ["full", "Budget"],
}


def named(name: str | None) -> str | None:
    """As a setting has it."""
    return f"{__name__}:{name}" if name and name[0].isupper() else name
