"""A replica: one engine of a replay, which is a scheduler, what came for it, and the step under way."""

from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepLoop
from pagellm.sim.fleet.fleet import Group
from pagellm.sim.traces.request import TraceRequest


class Replica:
    """One engine: the step loop, what came for it since it scheduled last, and the step under way.

    unfinished: requests that were sent to it and have not ended. num_kept: those whose KV is kept here until
    it is taken in elsewhere.
    """

    def __init__(self, number: int, group: Group) -> None:
        self.number = number
        self.group = group
        self.costs = group.costs
        self.scheduler = Scheduler.with_blocks(group.complete)
        self.loop = StepLoop(self.scheduler)
        self.inbox: list[tuple[float, Sequence, TraceRequest | None]] = []  # without a request: a timeout
        self.is_busy = False  # a step is under way, or about to start
        self.unfinished: set[Sequence] = set()
        self.num_kept = 0

    @property
    def num_unfinished(self) -> int:
        """Requests that were sent to it and have not ended."""
        return len(self.unfinished)
