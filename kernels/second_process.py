"""A second process that compiles some kernels while this one compiles the others: two cores take less time.

A kernel that is compiled apart (`kernels.jit`) has no result, so whoever calls it needs only its name to be
compiled. This process asks for it when it meets the first call, goes on with the callers, and takes the code
when all is linked. What the second process does not give, for whatever reason, is compiled here, by the same
function: nothing but the time depends on it.

It is an interpreter of its own that imports this package, and knows neither the program that runs here nor
what is cached. Requests come through its standard input and answers go through its standard output. It ends
when its input does, and so with this process, however that ends.
"""

import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any

_PROGRAM = "import sys; sys.path[:] = {path!r}; from pagellm.kernels.second_process import serve; serve()"

# A kernel's name in LLVM IR, and bitcode of it and of all that it calls.
Code = tuple[str, bytes]


@contextmanager
def rare_collections() -> Iterator[None]:
    """Has Python look for cyclic garbage rarely: else that is a seventh of what compilation takes.

    A compiler makes many objects that stay. Collections are not turned off, which would cost 200 MiB.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 1000, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


class SecondProcess:
    """A second process, as seen from the first. Raises `OSError` if it cannot be started."""

    def __init__(self) -> None:
        # Else it is a program that holds Python, and would run once more.
        if not Path(sys.executable or "").name.lower().startswith("python") or getattr(sys, "frozen", False):
            raise OSError(f"{sys.executable!r} is no interpreter")
        path = [entry for entry in sys.path if isinstance(entry, str)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(path=path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._asked = 0
        self._answers: list[Code | None] = []

    def ask(self, module: str, kernel: str, arguments: tuple[Any, ...], machine: Any) -> int:
        """Asks for a kernel by the types of its arguments; returns the number of the request.

        machine: what it is compiled for, as Numba's `magic_tuple` has it.
        """
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: then it has no answer either
            pickle.dump((module, kernel, arguments, machine), self._process.stdin)
            self._process.stdin.flush()
        self._asked += 1
        return self._asked - 1

    def answer(self, number: int) -> Code | None:
        """The answer to a request, which is waited for; None if there is none."""
        assert self._process.stdout is not None
        while len(self._answers) <= number:
            try:
                self._answers.append(pickle.load(self._process.stdout))
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # it has ended, or is closed
                self._answers += [None] * (self._asked - len(self._answers))
        return self._answers[number]

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # of what could not be written
                pipe.close()  # type: ignore[union-attr]


def serve() -> None:
    """What the second process does."""
    input, output = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else is printed is no answer

    from pagellm.kernels import transformer  # noqa: F401  all kernels, before the first is asked for
    from pagellm.kernels.quick_jit import code_of

    requests, answers = SimpleQueue[Any](), SimpleQueue[Code | None]()
    threading.Thread(target=_receive, args=(input, requests), daemon=True).start()
    threading.Thread(target=_send, args=(output, answers), daemon=True).start()
    with rare_collections():
        while True:
            module, kernel, arguments, machine = requests.get()
            try:
                answers.put(code_of(getattr(import_module(module), kernel), arguments, machine))
            except Exception:
                answers.put(None)


def _receive(input: Any, requests: "SimpleQueue[Any]") -> None:
    """Ends the process with its input, whatever is being compiled."""
    try:
        while True:
            requests.put(pickle.load(input))
    finally:
        os._exit(0)


def _send(output: Any, answers: "SimpleQueue[Code | None]") -> None:
    """Does not let compilation wait until somebody reads the answers."""
    try:
        while True:
            pickle.dump(answers.get(), output)
            output.flush()
    finally:
        os._exit(0)
