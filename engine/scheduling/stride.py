"""Steps that decide nothing, taken at once: a stride.

After a step of decodes the next one has the same sequences and one token of each, unless somebody comes or
ends, blocks run short, or a policy wants to be asked. Between two such events steps differ in lengths alone,
and now and then in a block that is full and the one behind it. `advance` does what they have in common once,
and what some have of their own in the order of single steps: it leaves behind what they would.

Knows a scheduler, and no clock and no cost.
"""

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from pagellm.engine.scheduling.scheduler import Scheduler


@dataclass(slots=True)
class Change:
    """What is other in a step of a stride than in the one before, as it was when it had been scheduled."""

    step: int  # its place in the stride
    tables: list[
        tuple[Sequence, int, list[int]]
    ]  # block tables: the first index that changed, and what follows
    num_new_slots: int  # of all its sequences
    num_free_blocks: int
    num_shared: int
    num_cached_blocks: int
    num_evicted_tokens: int  # by the prefix cache, since its start


@dataclass(slots=True)
class Stride:
    """Steps that were computed one after the other, all with the sequences of `batch` and a token of each.

    batch: of the first of them. times: when each was scheduled, and when the last one ended. durations_s: of
    each. num_cached_blocks: as in the first. changes: of those behind it that have any, in order.
    """

    batch: ScheduledBatch
    times: Items[float]
    durations_s: Items[float]
    num_cached_blocks: int
    changes: list[Change] = field(default_factory=list)


def most_alike(scheduler: "Scheduler", batch: ScheduledBatch) -> int:
    """How many steps in a row, that of a scheduled batch first, can be a stride; 0: that one is none.

    None of them ends a sequence, whatever its token is.
    """
    sequences, policies = batch.sequences, scheduler.policies
    if (
        not sequences
        or len(sequences) != sum(batch.num_new_tokens)
        or sequences != scheduler.running
        or False in batch.samples
        or batch.forks
        or policies.counts_batches
        or policies.has_budget
        or not scheduler.lets_nobody_in(len(sequences))
    ):
        return 0
    most = scheduler.max_len
    for sequence in sequences:
        left = sequence.max_len - len(sequence.token_ids)
        if left < most:
            most = left
        if sequence.stop_token_ids:
            return 0
    return most - 1


def advance(
    scheduler: "Scheduler",
    batch: ScheduledBatch,
    token_id: int,
    times: Items[float],
    durations_s: Items[float],
) -> Stride:
    """Commits a batch and those that follow it; each sequence gets a token in each of these steps.

    times, durations_s: as in `Stride`, of `most_alike` steps at most. It ends before the first step that may
    have something to decide: that one is to be scheduled.
    """
    sequences, manager, policies = batch.sequences, scheduler.block_manager, scheduler.policies
    size, num_replaced = manager.block_size, policies.num_replaced
    num_steps = len(durations_s)
    num_computed = [sequence.num_computed_tokens for sequence in sequences]
    tokens = array("i", (token_id,)) * num_steps
    registers = manager.enable_prefix_caching or bool(manager.window)

    def next_full(place: int) -> int:
        """The step with which a sequence fills a block, or its slots."""
        sequence = sequences[place]
        full = sequence.num_slots
        if registers and (block := (sequence.num_registered_blocks + 1) * size) < full:
            full = block  # one that came back by swap has offered none of its full ones yet
        return max(0, full - num_computed[place] - 1)

    events = [(step, place) for place in range(len(sequences)) if (step := next_full(place)) < num_steps]
    heapify(events)
    num_cached, changes = manager.num_cached_blocks, []
    manager.transfers.clear()
    while events and events[0][0] < num_steps:
        step = events[0][0]
        due = []
        while events and events[0][0] == step:
            due.append(heappop(events)[1])
        for place in due:
            sequence = sequences[place]
            _catch_up(sequence, num_computed[place] + step + 1, tokens)
            if registers and sequence.num_computed_tokens // size > sequence.num_registered_blocks:
                manager.register(sequence)
        if step + 1 == num_steps:
            break
        growing = [s for s in map(sequences.__getitem__, due) if len(s.token_ids) > s.num_slots]
        if (
            len(growing) > manager.num_free_blocks
            or manager.would_offload(len(growing))
            or any(map(manager.needs_copy, growing))
            or policies.num_replaced != num_replaced
            or not scheduler.lets_nobody_in(len(sequences))
        ):
            num_steps = step + 1
            break
        for sequence in growing:
            manager.grow(sequence)
        changes.append(
            Change(
                step + 1,
                [(s, index, s.block_table[index:]) for s, index in manager.take_changed_tables().items()],
                len(growing) * size,
                manager.num_free_blocks,
                manager.num_shared,
                manager.num_cached_blocks,
                manager.stats.evictions,
            )
        )
        for place in due:
            heappush(events, (next_full(place), place))
    for sequence, before in zip(sequences, num_computed, strict=True):
        _catch_up(sequence, before + num_steps, tokens)
    return Stride(batch, times[: num_steps + 1], durations_s[:num_steps], num_cached, changes)


def _catch_up(sequence: Sequence, num_computed: int, tokens: "array[int]") -> None:
    """Gives a sequence the tokens of the steps by which so many of it are computed."""
    sequence.token_ids += tokens[: num_computed - sequence.num_computed_tokens]
    sequence.num_computed_tokens = num_computed
