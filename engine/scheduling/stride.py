"""Steps that decide nothing, taken at once: a stride.

After a step of decodes the next one has the same sequences and one token of each, unless somebody comes or
ends, blocks run short, or a policy wants to be asked. Between two such events steps differ in lengths alone,
and now and then in a block that is full and the one behind it. `advance` does what they have in common once,
and what some have of their own in the order of single steps: it leaves behind what they would.

Knows a scheduler, and no clock and no cost.
"""

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from pagellm.engine.scheduling.block_manager import BlockManager
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
    num_offloaded_blocks: int
    num_evicted_tokens: int  # by the prefix cache, since its start


@dataclass(slots=True)
class Stride:
    """Steps that were computed one after the other, all with the sequences of `batch` and a token of each.

    batch: of the first of them. times: when each was scheduled, and when the last one ended. durations_s: of
    each. num_unwritten_slots, num_cached_blocks: when the first had been scheduled. changes: of those behind
    it that have any, in order. finished: the sequences that the last one ended, in order.
    """

    batch: ScheduledBatch
    times: Items[float]
    durations_s: Items[float]
    num_unwritten_slots: int
    num_cached_blocks: int
    changes: list[Change]
    finished: list[Sequence]


def most_alike(scheduler: "Scheduler", batch: ScheduledBatch) -> int:
    """How many steps in a row, that of a scheduled batch first, can be a stride; 0: that one is none.

    None but the last of these ends a sequence, whatever its token is.
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
    return most - 1 if policies.hears_ends else most


def advance(
    scheduler: "Scheduler",
    batch: ScheduledBatch,
    token_id: int,
    times: Items[float],
    durations_s: Items[float],
    goes_on: bool = True,
) -> tuple[Stride, ScheduledBatch | None]:
    """Commits a batch and those that follow it; each sequence gets a token in each of these steps.

    times, durations_s: as in `Stride`, for `most_alike` steps at most. It ends before the first step that may
    have something to decide. goes_on: whether nobody will have come when all these steps are over.

    Returns the stride, and the batch that is scheduled when it ends, if that has nothing to decide; None if
    `Scheduler.schedule` is to say.
    """
    sequences, manager, policies = batch.sequences, scheduler.block_manager, scheduler.policies
    size, num_replaced, num_steps = manager.block_size, policies.num_replaced, len(durations_s)
    registers = manager.registers
    tokens = array("i", (token_id,)) * num_steps
    num_computed, num_unwritten = [], 0
    events = []  # steps in which a sequence fills a block or ends, and its place
    for place, sequence in enumerate(sequences):
        computed = sequence.num_computed_tokens
        num_computed.append(computed)
        num_unwritten += sequence.num_slots - computed
        if (step := _next_event(sequence, computed, size, registers)) < num_steps:
            events.append((step, place))
    heapify(events)
    stride = Stride(batch, times, durations_s, num_unwritten, manager.num_cached_blocks, [], [])
    following = ScheduledBatch(sequences, batch.num_new_tokens, batch.samples)
    is_decided, is_updated = False, False
    manager.transfers.clear()
    while events and events[0][0] < num_steps:
        step = events[0][0]
        due = []
        while events and events[0][0] == step:
            due.append(heappop(events)[1])
        for place in due:
            sequence = sequences[place]
            _catch_up(sequence, num_computed[place] + step + 1, tokens)
            if registers and sequence.num_computed_tokens >= (sequence.num_registered_blocks + 1) * size:
                manager.register(sequence)
            if len(sequence.token_ids) >= sequence.max_len:
                scheduler.finish(sequence, FinishReason.LENGTH)
                stride.finished.append(sequence)
        growing = [s for s in map(sequences.__getitem__, due) if len(s.token_ids) > s.num_slots]
        if (
            stride.finished
            or (step + 1 == num_steps and not goes_on)
            or len(growing) > manager.num_free_blocks
            or manager.would_offload(len(growing))
            or any(map(manager.needs_copy, growing))
            or policies.num_replaced != num_replaced
            or not scheduler.lets_nobody_in(len(sequences))
        ):
            is_decided, num_steps = True, step + 1
            break
        if step + 1 == num_steps:
            scheduler.update_stats(times[num_steps])
            is_updated = True
        for sequence in growing:
            manager.grow(sequence)
        if step + 1 < num_steps:
            stride.changes.append(_change(step + 1, len(growing), manager))
            for place in due:
                next_step = _next_event(sequences[place], num_computed[place], size, registers)
                heappush(events, (next_step, place))
    for sequence, before in zip(sequences, num_computed, strict=True):
        if sequence.block_table:  # else it has ended
            _catch_up(sequence, before + num_steps, tokens)
    stride.times, stride.durations_s = times[: num_steps + 1], durations_s[:num_steps]
    if is_decided or not goes_on:
        if stride.finished:
            scheduler.running = [s for s in sequences if s.block_table]
        return stride, None
    if not is_updated:
        scheduler.update_stats(times[num_steps])
    following.changed_tables = manager.take_changed_tables()
    return stride, following


def _next_event(sequence: Sequence, num_computed: int, block_size: int, registers: bool) -> int:
    """The step in which a sequence ends, or fills a block or its slots. num_computed: when the stride begins.

    One that has come back from the second tier has offered none of its blocks to the prefix cache yet.
    """
    full = sequence.num_slots
    if registers and (block := (sequence.num_registered_blocks + 1) * block_size) < full:
        full = block
    if sequence.max_len <= full:
        full = sequence.max_len - 1  # the last token is not computed
    return full - num_computed - 1 if full > num_computed else 0


def _change(step: int, num_new_blocks: int, manager: "BlockManager") -> Change:
    """What has changed for a step that has just been scheduled."""
    return Change(
        step,
        [(s, index, s.block_table[index:]) for s, index in manager.take_changed_tables().items()],
        num_new_blocks * manager.block_size,
        manager.num_free_blocks,
        manager.num_shared,
        manager.num_cached_blocks,
        manager.num_offloaded_blocks,
        manager.stats.evictions,
    )


def _catch_up(sequence: Sequence, num_computed: int, tokens: "array[int]") -> None:
    """Gives a sequence the tokens of the steps by which so many of it are computed."""
    sequence.token_ids += tokens[: num_computed - sequence.num_computed_tokens]
    sequence.num_computed_tokens = num_computed
