"""The queue of a scheduler: who waits, in the order in which the policy lets them in.

Knows ranks and sort keys; what a policy is, and when somebody is let in, is the business of others.
"""

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any

from pagellm.engine.scheduling.policies import CheckedPolicies, SchedulerStats
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus

# Which of those that wait are served before the policy is asked: those whose turn must come now, those that
# are to return from the second tier, and all others.
_GUARANTEED, _SWAPPED, _ORDINARY = range(3)


class WaitingQueue:
    """The sequences that wait, in the order in which they will be admitted.

    A heap for each rank and queue. A removed one leaves its entry in the heap until that comes to the top, or
    until half of the heap is such entries; so adding and removing cost O(log n).
    """

    def __init__(self, policy: CheckedPolicies) -> None:
        self._policy = policy
        self._entries: dict[int, list[Any]] = {}  # by seq_id: [key, number, sequence or None, queue]
        self._heaps: dict[tuple[int, Hashable], list[list[Any]]] = {}
        self._num_live: dict[tuple[int, Hashable], int] = {}  # entries of each heap that still wait
        self._num_pushed = 0
        self._num_replaced = policy.num_replaced

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        """In the order of now; O(n log n)."""
        stats = SchedulerStats()
        for queue in sorted(self._heaps, key=lambda queue: self._queue_key(queue, stats)):
            yield from (entry[2] for entry in sorted(self._heaps[queue]) if entry[2] is not None)

    def push(
        self, sequence: Sequence, stats: SchedulerStats, guaranteed: bool = False, by_choice: bool = False
    ) -> None:
        """Adds one that does not wait yet. by_choice: a policy wants it to wait, so it has no precedence."""
        swapped = sequence.status is SequenceStatus.SWAPPED and not by_choice
        rank = _GUARANTEED if guaranteed else _SWAPPED if swapped else _ORDINARY
        queue = (rank, self._policy.queue_of(sequence) if rank == _ORDINARY else None)
        key = (*self._policy.order(sequence, stats), sequence.arrival_index)
        self._num_pushed += 1
        entry = [key, self._num_pushed, sequence, queue]
        self._entries[sequence.seq_id] = entry
        heap = self._heaps.get(queue)
        if heap is None:
            self._heaps[queue], self._num_live[queue] = [entry], 1
            return
        heappush(heap, entry)
        self._num_live[queue] += 1

    def ask_again(self, stats: SchedulerStats) -> None:
        """Asks for all keys anew, and for the queues if another policy answers; O(n log n)."""
        if self._policy.num_replaced != self._num_replaced:
            entries = [entry for heap in self._heaps.values() for entry in heap if entry[2] is not None]
            self._entries, self._heaps, self._num_live = {}, {}, {}
            for _, _, sequence, (rank, _) in sorted(entries, key=lambda entry: entry[1]):
                self.push(sequence, stats, rank == _GUARANTEED, rank == _ORDINARY)
            # Read at the end: the policy in its place may have failed, and then all is asked once more.
            self._num_replaced = self._policy.num_replaced
            return
        for heap in self._heaps.values():
            heap[:] = [entry for entry in heap if entry[2] is not None]
            for entry in heap:
                entry[0] = (*self._policy.order(entry[2], stats), entry[2].arrival_index)
            heapify(heap)
        if self._policy.num_replaced != self._num_replaced:
            self.ask_again(stats)

    def first(self, stats: SchedulerStats) -> Sequence:
        """The one to be admitted next; there must be one."""
        if self._policy.num_replaced != self._num_replaced:
            self.ask_again(stats)
        queue = next(iter(self._heaps))
        if len(self._heaps) > 1:
            queue = min(self._heaps, key=lambda queue: self._queue_key(queue, stats))
        sequence = self._heaps[queue][0][2]
        assert isinstance(sequence, Sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Takes one out, wherever it stands."""
        entry = self._entries.pop(sequence.seq_id)
        queue = entry[3]
        entry[2] = None
        self._num_live[queue] -= 1
        heap = self._heaps[queue]
        while heap and heap[0][2] is None:
            heappop(heap)
        if not heap:
            del self._heaps[queue], self._num_live[queue]
        elif len(heap) > 2 * self._num_live[queue]:
            heap[:] = [entry for entry in heap if entry[2] is not None]
            heapify(heap)

    def _queue_key(self, queue: tuple[int, Hashable], stats: SchedulerStats) -> tuple[float, ...]:
        rank, name = queue
        return (rank, *self._policy.queue_order(name, stats)) if rank == _ORDINARY else (rank,)
