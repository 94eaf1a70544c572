"""Processes that each do one piece of work at a time, and interrupts that come while they do.

A worker is a process that is started afresh, or this process where one is enough. An interrupt ends them all,
and leaves no lock behind; a worker ends when this process is gone, whatever ended it. What the work is, this
file does not know.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class _Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **named))
        return future


class _Process(ProcessPoolExecutor):
    """A process of its own, which takes no interrupts: they end this process, and that one with it."""

    def __init__(self) -> None:
        super().__init__(1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        with _without_interrupts():  # which the process inherits
            return super().submit(function, *arguments, **named)


class Worker:
    """Does one piece of work at a time. If its process dies, that piece failed; the next gets another one."""

    def __init__(self, start: Callable[[], Executor]) -> None:
        self._start = start
        self._executor = start()

    def submit(self, function: Callable[..., _Result], *arguments: Any) -> "Future[_Result]":
        """Begins a piece of work."""
        try:
            return self._executor.submit(function, *arguments)
        except BrokenProcessPool:
            self.shutdown()
            self._executor = self._start()
            return self._executor.submit(function, *arguments)

    def shutdown(self) -> None:
        """Waits for what runs."""
        self._executor.shutdown()


@contextmanager
def start_workers(number: int) -> Iterator[tuple[list[Worker], Callable[[], None]]]:
    """So many workers, one in this process; at an error, or an interrupt, what runs in others is ended.

    The second is to be called now and then: it raises what interrupt there was.
    """
    with nullcontext(lambda: None) if number == 1 else _noted_interrupts() as check_interrupts:
        workers = [Worker(_Here if number == 1 else _Process) for _ in range(number)]
        others = set(multiprocessing.active_children())
        try:
            yield workers.copy(), check_interrupts
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        finally:
            for worker in workers:
                worker.shutdown()


@contextmanager
def _noted_interrupts() -> Iterator[Callable[[], None]]:
    """An interrupt is raised by the function that this gives, and not where it happens to come.

    In the middle of `wait`, say, it would leave locks behind that the executors' own threads need to end.
    """
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not raises or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    noted: list[int] = []

    def check() -> None:
        if noted:
            noted.clear()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, lambda number, _frame: noted.append(number))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    check()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started meanwhile takes no interrupts; one that comes meanwhile comes afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, whatever ended that one."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
