"""A persistent team of threads that walks through one compiled call together.

Every member runs the same kernel; inside, work is handed out item by item from a shared counter and phases
are separated by a spinning barrier, which costs a fraction of a microsecond where starting a thread pool for
each operation would cost more than the arithmetic. Which thread computes an item never changes its bits.

Python threads around a kernel that releases the interpreter lock need no threading layer of Numba's, so
nothing depends on TBB or OpenMP, several engines can live in one process, and compilation is several times
quicker than with `parallel=True`.
"""

import contextlib
import operator
import os
import threading
from collections import deque
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.jit import entry_point, kernel
from kernels.simd import atomic_add, atomic_load, atomic_store, yield_thread

# Counters that different threads hammer live on different cache lines, 8 int64 apart.
_ARRIVED, _GENERATION, _NEXT_ITEM = 0, 8, 16
_LONGEST_RUN = 16
_SPINS_BEFORE_YIELD = 2000
_SPINS_BEFORE_SLEEP = 1_000_000


def new_counters() -> NDArray[np.int64]:
    """The shared counters of one team."""
    return np.zeros(24, dtype=np.int64)


@kernel
def next_item(counters):
    """Takes the next work item of this phase; numbers run on past the last one."""
    return atomic_add(counters, _NEXT_ITEM, 1)


@kernel
def next_rows(counters, num_rows, num_threads):
    """Takes the next run of this phase's rows: (first, end), empty once all are taken.

    Runs are short where there are few rows, else so long that threads seldom write to the same cache line.
    """
    length = min(max(num_rows // (4 * num_threads), 1), _LONGEST_RUN)
    first = next_item(counters) * length
    return first, min(first + length, num_rows)


@kernel
def barrier(counters, num_threads):
    """Waits until all threads of the team are here; the next phase's items start from zero."""
    generation = atomic_load(counters, _GENERATION)
    if atomic_add(counters, _ARRIVED, 1) == num_threads - 1:
        atomic_store(counters, _ARRIVED, 0)
        atomic_store(counters, _NEXT_ITEM, 0)
        atomic_store(counters, _GENERATION, generation + 1)
        return
    spins = 0
    while atomic_load(counters, _GENERATION) == generation:
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            yield_thread()


@entry_point
def _await_change(tickets, seen):
    """Spins until the ticket is no longer `seen`, for some milliseconds at most."""
    spins = 0
    while atomic_load(tickets, 0) == seen and spins < _SPINS_BEFORE_SLEEP:
        spins += 1
        if spins % _SPINS_BEFORE_YIELD == 0:
            yield_thread()


class ThreadTeam:
    """Runs `function(thread_index, num_threads, *arguments)` on `num_threads` threads at once.

    The caller is member 0, the others are threads of the team's own. The function must end with a barrier, so
    that its work is done when member 0 returns. Calls are served one after the other.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._process_id = -1
        self._inboxes: list[SimpleQueue[_Job | None]] = []
        self._tickets = np.zeros(1, np.int64)
        self._lock = threading.Lock()

    def run(self, function: Any, *arguments: Any) -> None:
        """Returns when every member has done its share."""
        with self._lock:
            if (
                self._process_id != os.getpid()
            ):  # first use, or a fork, which keeps no thread but the caller's
                self._start_threads()
            calls: list[Any] = [partial(inbox.put, (function, arguments)) for inbox in self._inboxes]
            calls.append(partial(function, 0, self.num_threads, *arguments))
            self._tickets[0] += 1
            # One call into C: no bytecode runs between the job's announcement and the caller's own share, so
            # no signal handler either, and an interrupt (Ctrl-C) never leaves a member alone at a barrier.
            deque(map(operator.call, calls), maxlen=0)

    def close(self) -> None:
        """Ends the threads once they are idle; a later `run` starts new ones."""
        for inbox in self._inboxes:
            inbox.put(None)
        self._inboxes = []
        self._process_id = -1

    def __del__(self) -> None:
        self.close()

    def _start_threads(self) -> None:
        self._process_id = os.getpid()
        self._inboxes = [SimpleQueue() for _ in range(self.num_threads - 1)]
        for index, inbox in enumerate(self._inboxes, start=1):
            threading.Thread(
                target=_serve,
                args=(inbox, self._tickets, index, self.num_threads),
                name=f"pagellm-kernel-{index}",
                daemon=True,
            ).start()


_Job = tuple[Any, tuple[Any, ...]]


def _serve(
    inbox: "SimpleQueue[_Job | None]", tickets: NDArray[np.int64], index: int, num_threads: int
) -> None:
    """What a member does: it waits for a job, awake for a while, because a sleeping thread wakes up late."""
    while (job := inbox.get()) is not None:
        seen = int(tickets[0])
        function, arguments = job
        # The caller's own share fails in the same way, before any barrier, and tells.
        with contextlib.suppress(Exception):
            function(index, num_threads, *arguments)
        del job, function, arguments  # an idle team keeps no model alive
        _await_change(tickets, seen)
