"""Standard streams that a command can rely on: each is open, and an error of the output names it."""

import os
import select
import sys
from contextlib import suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any

STANDARD_OUTPUT = "standard output"


class _Output(FileIO):
    """Standard output, whose errors have its name."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # a pipe that does not block, and is full
        except OSError as error:
            raise type(error)(error.errno, error.strerror, STANDARD_OUTPUT) from None
        return written


class _Errors(FileIO):
    """Standard error. What it does not take is lost: nothing that a command does fails for it."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            if written := super().write(data):
                return written
        return len(data)


def prepare_streams() -> None:
    """Makes this process's standard streams usable.

    Descriptors 0, 1 and 2 that are closed become the null device: otherwise files that are opened later get
    these numbers, and what is meant for a stream ends up in them. Afterwards sys.stdin and sys.stdout are
    None where they were closed, and sys.stderr is never None.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    if sys.stdout is not None:
        sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout.encoding, "replace")
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    sys.stderr = _text(_Errors(2, "w", closefd=False), encoding, "backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")


def discard_output() -> None:
    """Gives up what standard output has not taken, which Python would try to write once more at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _text(raw: FileIO, encoding: str, errors: str) -> TextIOWrapper:
    is_for_people = raw.isatty() or isinstance(raw, _Errors)
    return TextIOWrapper(BufferedWriter(raw), encoding, errors, line_buffering=is_for_people)
