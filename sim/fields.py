"""The named values of a JSON object from outside: each bad one is one error that says where it is."""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pagellm.engine import checks
from pagellm.engine.errors import PagellmError, found

MAX_LINE_BYTES = 1 << 28  # of a trace in one document, or of anything else


class _Nothing:
    """What an error has found where there is no value."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


class Fields:
    """An object of a file, whose fields are checked as they are asked for; one that is null counts as absent.

    place: the file, and the line where it has several objects. prefix: what errors put before the names of
    its fields. error: the class of errors that are raised. name: what an error calls the values where they
    are no object, and there is no prefix.
    """

    def __init__(
        self, values: Any, place: str, error: type[PagellmError], prefix: str = "", name: str = "document"
    ) -> None:
        if not isinstance(values, Mapping):
            called = f"{place}: {prefix.removesuffix('.') or name}"
            raise bad(error, called, values, "an object with named fields")
        self.values = values
        self.place = place
        self._error = error
        self.prefix = prefix

    def get(self, name: str) -> Any:
        """The value as it is; None where it is absent."""
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """Whether there is a value."""
        return self.get(name) is not None

    def integer(self, name: str, low: int = 1, high: int | None = None) -> int:
        """An integer from `low` on, or to `high`."""
        return checks.integer(self._called(name), self._shown(name), low, high, self._error)

    def number(self, name: str, low: float | None = 0, expected: str | None = None) -> float:
        """A finite number from `low` on. expected: what an error says instead."""
        return checks.number(self._called(name), self._shown(name), low, None, self._error, expected)

    def seconds(self, name: str) -> float:
        """A finite number of seconds from 0."""
        return self.number(name, 0, "a finite number of seconds from 0")

    def text(self, name: str) -> str:
        """A text."""
        return checks.text(self._called(name), self._shown(name), self._error)

    def entries(self, name: str) -> list[Any]:
        """A list; an empty one where it is absent."""
        values = self.get(name)
        if values is not None and not isinstance(values, list):
            raise self.bad(name, values, "a list")
        return values or []

    def section(self, name: str) -> "Fields":
        """An object inside."""
        return Fields(self.get(name), self.place, self._error, f"{self.prefix}{name}.")

    def bad(self, name: str, value: Any, expected: str) -> PagellmError:
        """The error for a value of a field."""
        return bad(self._error, self._called(name), value, expected)

    def _called(self, name: str) -> str:
        return f"{self.place}: {self.prefix}{name}"

    def _shown(self, name: str) -> Any:
        value = self.get(name)
        return NOTHING if value is None else value


def read_bounded(path: Path, error: type[PagellmError]) -> bytes:
    """All of a file, of at most `MAX_LINE_BYTES`."""
    try:
        with path.open("rb") as file:
            check_no_device(path, file, error)
            content = file.read(MAX_LINE_BYTES + 1)
    except OSError as bad:
        raise error(f"{path}: cannot be read: {bad.strerror or bad}") from None
    if len(content) > MAX_LINE_BYTES:
        raise error(f"{path}: found more than {MAX_LINE_BYTES} bytes, expected less")
    return content


def read_json(path: Path, what: str, error: type[PagellmError]) -> Any:
    """The JSON of a file, which is to be `what`."""
    try:
        return checks.parse_json(read_bounded(path, error))
    except checks.JsonError as bad:
        raise error(f"{path}: found {bad}, expected {what} as JSON") from None


def read_lines(path: Path, error: type[PagellmError]) -> Iterator[str]:
    """The lines of a file of text, one at a time."""
    try:
        with path.open("rb") as file:
            check_no_device(path, file, error)
            for line in bounded_lines(path, file, error):
                yield line.decode()
    except OSError as bad:
        raise error(f"{path}: cannot be read: {bad.strerror or bad}") from None
    except UnicodeDecodeError as bad:
        raise error(f"{path}: found {bad.object[bad.start :][:8]!r}, expected UTF-8") from None


def check_no_device(path: Path, file: IO[bytes], error: type[PagellmError]) -> None:
    """Refuses what has no end, such as /dev/zero; a terminal is ended by whoever sits there."""
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not file.isatty()):
        raise error(f"{path}: found a device, expected a file or a pipe")


def bounded_lines(path: Path, file: IO[bytes], error: type[PagellmError]) -> Iterator[bytes]:
    """The lines of a file, none of them of more than `MAX_LINE_BYTES`."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise error(f"{path}:{number}: found a line of more than {MAX_LINE_BYTES} bytes, expected less")
        yield line


def bad(error: type[PagellmError], name: str, value: Any, expected: str) -> PagellmError:
    """The error for a value; None is one that is not there."""
    return error(f"{name}: found {found(NOTHING if value is None else value)}, expected {expected}")
