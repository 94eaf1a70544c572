"""The loop around a scheduler: a step begins, somebody else computes it, and it ends.

Engine, simulator and calibration drive a scheduler through this alone, so that whoever observes one of them
hears of the same events in the same order. What a step computes and how long it takes is the driver's.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.scheduling.batch import PreemptionCosts, ScheduledBatch, StepLimits
from pagellm.engine.scheduling.block_manager import Transfer
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.stride import Stride, advance, most_alike


@dataclass(slots=True)  # not frozen: that would take three times as long to make, in every step
class StepEnd:
    """What became of a step: who got tokens, whose were the last, and what it took, transfers included."""

    batch: ScheduledBatch
    sampled: list[Sequence]
    finished: list[Sequence]
    now: float
    duration_s: float
    transfer_s: float


class StepListener:
    """Hears of what happens to each sequence; does nothing where it does not override.

    Times are seconds on the clock of the one that drives the loop. takes_strides: whether it understands
    `strode`; where one listener does not, none is taken.
    """

    takes_strides = False

    def added(self, sequence: Sequence) -> None:
        """A sequence was taken in, at its `arrival_time`; of several completions each is one."""

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        """A step begins."""

    def committed(self, end: StepEnd) -> None:
        """A step has ended."""

    def strode(self, stride: Stride) -> None:
        """Steps were taken at once. Of the first it has heard that it was scheduled."""

    def ended(self, sequence: Sequence) -> None:
        """A sequence has ended otherwise: it was aborted or shed, or its text had a stop string."""

    def left(self, sequence: Sequence, why: str) -> None:
        """A sequence goes on elsewhere, because it was handed over or because what was there is lost."""


class StepLoop:
    """Drives one scheduler and tells its listeners, in their order."""

    def __init__(self, scheduler: Scheduler, listeners: Iterable[StepListener] = ()) -> None:
        self.scheduler = scheduler
        self.listeners = tuple(listeners)
        self._start_s = 0.0  # of the step under way
        self._aborted: set[Sequence] = set()  # since it began

    def listen(self, listener: StepListener) -> None:
        """Lets one more hear of what happens from now on."""
        self.listeners = (*self.listeners, listener)

    def ignore(self, listener: StepListener) -> None:
        """Lets one that listens hear no more."""
        self.listeners = tuple(other for other in self.listeners if other is not listener)

    def add(self, sequence: Sequence, now: float, forks: Items[Sequence] = ()) -> None:
        """Takes a new sequence and its forks in: see `Scheduler.add`."""
        self.scheduler.add(sequence, now, forks)
        self._tell_added((sequence, *forks))

    def fork(self, parent: Sequence, child: Sequence, now: float, forks: Items[Sequence] = ()) -> None:
        """Takes a new sequence in that begins like a running one: see `Scheduler.fork`."""
        self.scheduler.fork(parent, child, now, forks)
        self._tell_added((child, *forks))

    def abort(self, sequence: Sequence, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends a sequence that was added, whatever state it is in; one that has ended stays as it is."""
        if sequence.finish_reason is not None:
            return
        self.scheduler.abort(sequence, reason)
        self._aborted.add(sequence)
        for listener in self.listeners:
            listener.ended(sequence)

    def hand_over(self, sequence: Sequence) -> Sequence:
        """Lets a running sequence go that is to go on elsewhere: see `Scheduler.hand_over`."""
        keeper = self.scheduler.hand_over(sequence)
        for listener in self.listeners:
            listener.left(sequence, "handed over")
        return keeper

    def lose(self, sequences: Iterable[Sequence]) -> None:
        """Takes note that all content of blocks is lost, in the middle of a step or not; nothing is left.

        sequences: those that had not ended. Each keeps its tokens, to be added and computed anew.
        """
        self.scheduler.recover({})
        for sequence in sequences:
            sequence.restart(sequence.num_tokens)
            sequence.leave()
            for listener in self.listeners:
                listener.left(sequence, "lost")

    def begin(
        self, now: float, costs: PreemptionCosts | None = None, limits: StepLimits | None = None
    ) -> ScheduledBatch:
        """Begins a step: what is to be moved and computed in it. `end` must follow.

        costs, limits: see `Scheduler.schedule`. A step that was given up is begun again: what was moved in it
        is not moved again, and nothing of it counts as computed.
        """
        self._aborted.clear()
        self._start_s = now
        batch = self.scheduler.schedule(now, costs, limits)
        for sequence in batch.shed:
            for listener in self.listeners:
                listener.ended(sequence)
        for listener in self.listeners:
            listener.scheduled(batch, now)
        return batch

    def transferred(self) -> None:
        """Takes note that the batch's next transfer is done."""
        self.scheduler.block_manager.transferred()

    def transfer_failed(self, transfer: Transfer, batch: ScheduledBatch) -> None:
        """Takes note that the batch's next transfer cannot be done: see `Scheduler.transfer_failed`."""
        self.scheduler.transfer_failed(transfer, batch)
        self.scheduler.block_manager.transferred()

    def end(
        self,
        batch: ScheduledBatch,
        token_ids: Items[Items[int]],
        now: float,
        *,
        duration_s: float | None = None,
        transfer_s: float = 0.0,
    ) -> list[Sequence]:
        """Ends a step that was computed; returns the sequences that this finished.

        token_ids: see `Scheduler.commit`. duration_s: where that is known more exactly than from the times.
        """
        finished = self.scheduler.commit(batch, token_ids)
        if self.listeners:
            sampled = batch.sampled
            if self._aborted:
                sampled = [sequence for sequence in sampled if sequence not in self._aborted]
            took_s = now - self._start_s if duration_s is None else duration_s
            end = StepEnd(batch, sampled, finished, now, took_s, transfer_s)
            for listener in self.listeners:
                listener.committed(end)
        return finished

    def most_alike(self, batch: ScheduledBatch) -> int:
        """How many steps in a row, the one that has begun first, can be taken at once; 0: none."""
        for listener in self.listeners:
            if not listener.takes_strides:
                return 0
        return most_alike(self.scheduler, batch)

    def advance(
        self,
        batch: ScheduledBatch,
        token_id: int,
        times: Items[float],
        durations_s: Items[float],
        goes_on: bool = True,
    ) -> tuple[Stride, ScheduledBatch | None]:
        """Ends the step that has begun and takes those behind it: see `stride.advance`.

        What it returns as the batch behind them has begun; where it is None, `begin` must follow.
        """
        stride, following = advance(self.scheduler, batch, token_id, times, durations_s, goes_on)
        for listener in self.listeners:
            listener.strode(stride)
        if following is not None:
            self._start_s = stride.times[-1]
            for listener in self.listeners:
                listener.scheduled(following, self._start_s)
        return stride, following

    def _tell_added(self, sequences: Items[Sequence]) -> None:
        for sequence in sequences:
            for listener in self.listeners:
                listener.added(sequence)
