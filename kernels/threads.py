"""A persistent team of threads that walks through one compiled call together.

Every member runs the same kernel; inside, work is handed out item by item from a shared counter and phases
are separated by a spinning barrier, which costs a fraction of a microsecond where starting a thread pool for
each operation would cost more than the arithmetic. Which thread computes an item never changes its bits.

Python threads around a kernel that releases the interpreter lock need no threading layer of Numba's, so
nothing depends on TBB or OpenMP, several engines can live in one process, and compilation is several times
quicker than with `parallel=True`.
"""

import os
import threading
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.jit import kernel
from kernels.simd import atomic_add, atomic_load, atomic_store, yield_thread

# Counters that different threads hammer live on different cache lines, 8 int64 apart.
_ARRIVED, _GENERATION, _NEXT_ITEM = 0, 8, 16
_SPINS_BEFORE_YIELD = 2000


def new_counters() -> NDArray[np.int64]:
    """The shared counters of one team."""
    return np.zeros(24, dtype=np.int64)


@kernel
def next_item(counters):
    """Takes the next work item of this phase; numbers run on past the last one."""
    return atomic_add(counters, _NEXT_ITEM, 1)


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


class ThreadTeam:
    """Runs `function(thread_index, num_threads, *arguments)` on `num_threads` threads of its own at once.

    The caller only waits: a call that has begun always runs to its end on all members, so an interrupt
    (Ctrl-C) in the caller never leaves a member alone at a barrier. Calls are served one after the other.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._process_id = -1
        self._inboxes: list[SimpleQueue[_Job | None]] = []

    def run(self, function: Any, *arguments: Any) -> None:
        """Returns when every member has returned; an exception of one of them is raised here."""
        if self._process_id != os.getpid():  # first use, or a fork, which keeps no thread but the caller's
            self._start_threads()
        job = _Job(function, arguments, SimpleQueue())
        self._inboxes[0].put(job)
        error = job.done.get()
        if error is not None:
            raise error

    def close(self) -> None:
        """Ends the threads once they are idle; a later `run` starts new ones."""
        if self._process_id == os.getpid():
            self._inboxes[0].put(None)
        self._process_id = -1

    def __del__(self) -> None:
        self.close()

    def _start_threads(self) -> None:
        self._process_id = os.getpid()
        self._inboxes = [SimpleQueue() for _ in range(self.num_threads)]
        for index in range(self.num_threads):
            threading.Thread(
                target=_serve, args=(self._inboxes, index), name=f"pagellm-kernel-{index}", daemon=True
            ).start()


@dataclass(frozen=True)
class _Job:
    function: Any
    arguments: tuple[Any, ...]
    done: "SimpleQueue[BaseException | None]"


def _serve(inboxes: "list[SimpleQueue[_Job | None]]", index: int) -> None:
    if index == 0:
        _lead(inboxes)
    else:
        _follow(inboxes, index)


def _lead(inboxes: "list[SimpleQueue[_Job | None]]") -> None:
    """Member 0: passes each job on to the others, does its own share, and reports when all are done."""
    while True:
        job = inboxes[0].get()
        if job is None:
            for inbox in inboxes[1:]:
                inbox.put(None)
            return
        others = _Job(job.function, job.arguments, SimpleQueue())
        for inbox in inboxes[1:]:
            inbox.put(others)
        error = _work(job, 0, len(inboxes))
        for _ in inboxes[1:]:
            error = others.done.get() or error
        job.done.put(error)
        del job, others  # an idle team keeps no model alive


def _follow(inboxes: "list[SimpleQueue[_Job | None]]", index: int) -> None:
    while (job := inboxes[index].get()) is not None:
        job.done.put(_work(job, index, len(inboxes)))
        del job


def _work(job: _Job, index: int, num_threads: int) -> BaseException | None:
    try:
        job.function(index, num_threads, *job.arguments)
    except BaseException as error:
        return error
    return None
