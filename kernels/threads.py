"""A persistent team of threads that walks through one compiled call together.

Every member runs the same kernel; inside, work is handed out item by item from a shared counter and phases
are separated by a spinning barrier, which costs a fraction of a microsecond where starting a thread pool for
each operation would cost more than the arithmetic. Which thread computes an item never changes its bits.

A member waits for its next call in compiled code and finds the arguments where the caller has them, on its
stack. Were it called by Python, it would wait for the interpreter lock until the caller is in compiled code,
and then wake up: with two threads that took 0.1 ms a call. Python threads around compiled code need no
threading layer of Numba's, so nothing depends on TBB or OpenMP, several engines can live in one process, and
compilation is several times quicker than with `parallel=True`.
"""

import ctypes
import errno
import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.jit import entry_point, inlined, kernel
from pagellm.kernels.simd import (
    acquire_lock,
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_store,
    call_again,
    release_lock,
    this_call,
    yield_thread,
)

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
    """Takes the next work item of this phase; numbers run on past the last one. counters: `new_counters`."""
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


# Words of a team's mailbox: how many calls there have been, the last one's addresses (no code: the end), and
# the size of the team. A member has a cache line of its own: whether it sleeps, and on which lock.
_TICKET, _CODE, _ARGUMENTS, _NUM_THREADS = range(4)
_MEMBER = 8
_ASLEEP, _LOCK = range(2)


@kernel
def _announce(mailbox, code, arguments):
    """Tells all members of a call, and wakes those that sleep. mailbox: [num_threads * _MEMBER]."""
    mailbox[_CODE], mailbox[_ARGUMENTS] = code, arguments
    atomic_add(mailbox, _TICKET, 1)
    for member in range(_MEMBER, mailbox.size, _MEMBER):
        if atomic_exchange(mailbox, member + _ASLEEP, 0) == 1:
            release_lock(mailbox[member + _LOCK])


@inlined
def share_call(thread, mailbox):
    """Has every other member of the team make the call under way as well; returns how many members there are.

    For the beginning of an entry point `(thread, mailbox, ...)`, which Python calls as thread 0. It must end
    with a barrier, so that all is done when it returns.
    """
    if thread == 0:
        code, arguments = this_call()
        _announce(mailbox, code, arguments)
    return mailbox[_NUM_THREADS]


@kernel
def _await_ticket(mailbox, member, seen):
    """Waits for a ticket after `seen`: awake for some milliseconds, because a sleeper wakes up late."""
    spins = 0
    while atomic_load(mailbox, _TICKET) == seen:
        spins += 1
        if spins % _SPINS_BEFORE_YIELD == 0:
            yield_thread()
        if spins == _SPINS_BEFORE_SLEEP:
            atomic_exchange(mailbox, member + _ASLEEP, 1)
            # Whoever takes the mark away first decides: a caller that does frees the lock.
            if atomic_load(mailbox, _TICKET) == seen or atomic_exchange(mailbox, member + _ASLEEP, 0) == 0:
                acquire_lock(mailbox[member + _LOCK])
            return


@entry_point
def _serve(mailbox, thread):
    """What a member does until the team ends: makes every call that is announced in the mailbox, [words]."""
    ticket = 0
    while True:
        _await_ticket(mailbox, thread * _MEMBER, ticket)
        ticket += 1
        if mailbox[_CODE] == 0:
            return
        call_again(mailbox[_CODE], mailbox[_ARGUMENTS], thread)


@entry_point
def _end_members(mailbox):
    """Has all members of the team return from `_serve`."""
    _announce(mailbox, 0, 0)


class ThreadTeam:
    """Threads that run compiled calls together.

    The caller is member 0, the others are threads of the team's own. Calls are served one after the other.
    Raises `OSError` from `run` if the system starts no more threads.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._mailbox: NDArray[np.int64] | None = None
        self._process_id = -1
        self._lock = threading.RLock()

    def run(self, function: Any, *arguments: Any) -> None:
        """Calls an entry point `(thread, mailbox, *arguments)` that shares its call with the team."""
        with self._lock:
            if self._process_id != os.getpid():  # first use, or a fork, which keeps the caller's thread alone
                self._start_threads()
            function(0, self._mailbox, *arguments)

    def close(self) -> None:
        """Ends the threads once they are idle; a later `run` starts new ones."""
        if self._process_id == os.getpid():  # a fork has no threads, and may find the lock taken for ever
            with self._lock:
                self._end_threads()

    def __del__(self) -> None:
        self.close()

    def _start_threads(self) -> None:
        self._end_threads()
        # Compiled here and now: a member has nobody to tell of an error, and an interpreter that ends cannot.
        empty = np.zeros(_MEMBER, np.int64)
        _end_members(empty)
        _serve(empty, 0)
        self._mailbox = np.zeros(self.num_threads * _MEMBER, np.int64)
        self._mailbox[_NUM_THREADS] = self.num_threads
        for index in range(1, self.num_threads):
            self._mailbox[index * _MEMBER + _LOCK] = lock = _taken_lock()
            member = threading.Thread(
                target=_run_member,
                args=(self._mailbox, index, lock),
                name=f"pagellm-kernel-{index}",
                daemon=True,
            )
            try:
                member.start()
            except RuntimeError as error:  # a limit of the user, or of the container
                _spare_locks.append(lock)
                self._end_threads()
                expected = f"num_threads: the system starts {index} threads, expected {self.num_threads}"
                raise OSError(errno.EAGAIN, expected) from error
        self._process_id = os.getpid()

    def _end_threads(self) -> None:
        self._process_id = -1  # first: if an interrupt comes now, new threads are started at the next run
        if self._mailbox is not None:
            _end_members(self._mailbox)
        self._mailbox = None


# The locks of members that have ended. They are never freed: who woke a member may not be done with its lock.
_spare_locks: list[int] = []


def _taken_lock() -> int:
    """The address of a lock that nobody can take before it is released."""
    try:
        return _spare_locks.pop()
    except IndexError:
        api = ctypes.pythonapi
        api.PyThread_allocate_lock.restype = ctypes.c_void_p
        lock = api.PyThread_allocate_lock()
        if lock is None:
            raise MemoryError("no memory for a thread lock") from None
        api.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
        return int(lock)


def _run_member(mailbox: NDArray[np.int64], index: int, lock: int) -> None:
    _serve(mailbox, index)
    _spare_locks.append(lock)
