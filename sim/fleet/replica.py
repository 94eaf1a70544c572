"""A replica: one engine of a replay, which is a scheduler, what came for it, and the step under way."""

from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepLoop
from pagellm.sim.fleet.fleet import Group
from pagellm.sim.traces.request import TraceRequest

# When it was sent, who it is about, and what is asked; without a request, a client gave up.
Message = tuple[float, Sequence, TraceRequest | None]


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
        self.inbox: list[Message] = []
        self._num_seen = 0  # of the inbox, that were there when the step under way began
        self.is_busy = False  # a step is under way, or about to start
        self.unfinished: set[Sequence] = set()
        self.num_kept = 0

    def take_in(self) -> list[Message]:
        """What the step that begins can take in of all that came.

        A scheduler that is a step ahead has made it when the step before it began; what came since then is
        for the next. Where nothing was under way, it is all.
        """
        is_ahead = self.costs.schedules_ahead and self.scheduler.has_unfinished
        num_taken = self._num_seen if is_ahead else len(self.inbox)
        taken = self.inbox[:num_taken]
        del self.inbox[:num_taken]
        self._num_seen = len(self.inbox)
        return taken

    def note_seen(self) -> None:
        """A step begins that takes in nothing, whatever has come."""
        self._num_seen = len(self.inbox)

    def forget(self) -> None:
        """Nothing has come, and nothing is under way any more."""
        self.inbox.clear()
        self._num_seen = 0
        self.is_busy = False

    @property
    def num_unfinished(self) -> int:
        """Requests that were sent to it and have not ended."""
        return len(self.unfinished)
