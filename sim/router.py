"""Which replica gets a request: round robin, the least loaded, or the one that has most of its prompt."""

from collections.abc import Sequence as Items
from typing import Protocol

from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence


class Replica(Protocol):
    """What a router looks at."""

    @property
    def scheduler(self) -> Scheduler:
        """Its scheduler, with its queues and its blocks."""

    @property
    def num_unfinished(self) -> int:
        """Requests that were sent to it and have not ended."""


class Router(Protocol):
    """Chooses when a request arrives, once for each."""

    def choose(self, sequence: Sequence, replicas: Items[Replica]) -> int:
        """The place of a replica in the list."""


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, sequence: Sequence, replicas: Items[Replica]) -> int:
        chosen = self._next
        self._next = (chosen + 1) % len(replicas)
        return chosen


class LeastLoaded:
    """The one with the fewest unfinished requests, the first of equals."""

    def choose(self, sequence: Sequence, replicas: Items[Replica]) -> int:
        return min(range(len(replicas)), key=lambda i: replicas[i].num_unfinished)


class PrefixAware:
    """The one whose cache has the longest prefix of the prompt now; of equals the least loaded.

    It does not balance: where all prompts begin alike, the first replica that has that keeps them all.
    """

    def choose(self, sequence: Sequence, replicas: Items[Replica]) -> int:
        def rank(i: int) -> tuple[int, int]:
            cached = replicas[i].scheduler.block_manager.cached_prefix(sequence)
            return -len(cached), replicas[i].num_unfinished

        return min(range(len(replicas)), key=rank)


ROUTERS: dict[str, type[Router]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "prefix_aware": PrefixAware,
}
