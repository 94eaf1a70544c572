"""Progress of long work on standard error: a bar on a terminal, lines elsewhere if it takes long."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Advance = Callable[[float], None]

# Shorter work needs no word where nobody watches a bar.
_LONG_S = 2.0


def say(text: str) -> None:
    """One line on standard error; where there is none, or it takes nothing, the line is lost and no more."""
    say_line(f"pagellm: {text}")


def say_line(line: str) -> None:
    """The same of a line that is for machines, as it is."""
    if sys.stderr is None:  # print() would use standard output
        return
    with suppress(OSError):
        print(f"{line}\n", end="", file=sys.stderr, flush=True)  # whole, whatever other threads say


def say_piece(text: str) -> None:
    """A piece of running text on standard error, pale on a terminal; it may be lost as with `say`."""
    if sys.stderr is None:
        return
    with suppress(OSError):
        is_terminal = sys.stderr.isatty()
        print(f"\x1b[2m{text}\x1b[0m" if is_terminal else text, end="", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: float, unit: str = "", show: bool = True) -> Iterator[Advance]:
    """Yields a function that is called with each amount of work done, out of `total`.

    unit: "bytes" shows sizes and speed. Nothing is shown unless `show`.
    """
    if not show or sys.stderr is None:
        yield lambda _amount: None
        return
    if not sys.stderr.isatty():
        yield from _lines(label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn()]
    columns.append(DownloadColumn() if unit == "bytes" else TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


def _lines(label: str) -> Iterator[Advance]:
    """One line when the work turns out to be long, one when it is done."""
    start = time.perf_counter()
    announced = False

    def advance(_amount: float) -> None:
        nonlocal announced
        if not announced and time.perf_counter() - start > _LONG_S:
            announced = True
            say(f"{label} ...")

    yield advance
    if announced:
        say(f"{label}: done in {time.perf_counter() - start:.1f} s")
