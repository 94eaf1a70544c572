"""A trace file as records: plain or gzip, JSON Lines, CSV with a header, or one JSON document.

It knows bytes, lines and syntax, and says where in the file a record stands; what a record means is the
business of formats.py.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pagellm.engine import checks
from pagellm.engine.errors import TraceError
from pagellm.sim.fields import bounded_lines, check_no_device
from pagellm.sim.traces.request import bad_value

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_INTEGER = re.compile(r"-?[0-9]{1,300}")
_decode = json.JSONDecoder().raw_decode


class Record(NamedTuple):
    """A record of a file: its line, from 1; its place in a document, such as "requests[3]: "; its value.

    A value that could not be read is a `TraceError`.
    """

    line: int
    place: str
    value: Any


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The number, from 1, and the bytes of each line; a damaged or unreadable file is an error.

    So is a device, which may have no end, and a line of more than `MAX_LINE_BYTES`.
    """
    number = 0
    try:
        with path.open("rb") as raw:
            check_no_device(path, raw, TraceError)
            is_gzip = raw.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
            file = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if is_gzip else raw
            for number, line in enumerate(bounded_lines(path, file, TraceError), 1):
                yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(
            f"{path}:{number + 1}: found damaged gzip data ({error}), expected a whole file"
        ) from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None


def decode_line(line: bytes) -> str:
    """A line as text; bytes that are not UTF-8 are an error."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        at = error.start
        raise TraceError(f"byte {at + 1}: found {line[at : at + 8]!r}, expected UTF-8") from None


def parse_json(text: str) -> Any:
    """A line's JSON value."""
    text = text.strip()
    try:
        return checks.parse_json(text)
    except checks.JsonError as error:
        place = "line" if error.column is None else f"column {error.column}"
        raise bad_value(place, text, f"JSON ({error.reason})") from None


def json_lines(path: Path) -> Iterator[Record]:
    """One JSON value a line."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            yield Record(number, "", parse_json(decode_line(line)))
        except TraceError as error:
            yield Record(number, "", error)


def json_values(path: Path) -> Iterator[Record]:
    """One JSON value a line, or one over many lines."""
    lines = [(number, line) for number, line in read_lines(path) if line.strip()]
    try:
        json.loads(lines[0][1] if lines else b"null")
    except ValueError:
        try:
            yield Record(1, "", parse_json(decode_line(b"".join(line for _, line in lines))))
        except TraceError as error:
            yield Record(1, "", error)
        return
    yield from json_lines(path)


def csv_rows(path: Path) -> Iterator[Record]:
    """The rows below the header, as {column: value}; what looks like a number is one."""
    header: list[str] = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            cells = parse_row(decode_line(line))
            if header and len(cells) != len(header):
                raise bad_value("row", ",".join(cells), f"{len(header)} columns, {', '.join(header)}")
        except TraceError as error:
            if not header:
                raise TraceError(f"{path}:{number}: {error}") from None
            yield Record(number, "", error)
            continue
        if header:
            yield Record(number, "", dict(zip(header, map(cell_value, cells), strict=True)))
        else:
            header = cells


def parse_row(text: str) -> list[str]:
    """The cells of one line, without the blanks around them."""
    try:
        return [cell.strip() for cell in next(csv.reader([text], strict=True))]
    except (csv.Error, StopIteration) as error:
        raise bad_value("row", text.strip(), f"comma-separated values ({error})") from None


def cell_value(cell: str) -> int | float | str | None:
    """A cell without blanks around it as a number, where it looks like one; None of an empty one."""
    if not cell:
        return None
    if _INTEGER.fullmatch(cell):
        return int(cell)
    try:
        return float(cell) if cell.isascii() and "_" not in cell else cell
    except ValueError:
        return cell


def json_items(path: Path, key: str | None) -> Iterator[Record]:
    """The items of the array under a top-level key of a JSON document, or of the document if it is an array.

    Items are decoded one by one as they are asked for, from the document's text, which is in memory.
    """
    try:
        text = b"".join(line for _, line in read_lines(path)).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TraceError(
            f"{path}:{line}: found {error.object[error.start :][:8]!r}, expected UTF-8"
        ) from None
    cursor = _Cursor(text)
    try:
        if key is None:
            yield from cursor.items("")
        else:
            yield from cursor.items_under(key)
        cursor.expect_end()
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}: column {error.colno}"
        raise TraceError(f"{place}: found malformed JSON, expected a document ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}:{cursor.line}: found JSON beyond limits ({error})") from None


class _Cursor:
    """A position in the text of a JSON document."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = self._counted = 0
        self._line = 1
        self._skip_space()

    @property
    def line(self) -> int:
        """The line of the position, from 1."""
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def items(self, name: str) -> Iterator[Record]:
        """The items of the array that begins here."""
        self._expect("[")
        index = 0
        while not self._take("]"):
            if index > 0:
                self._expect(",")
            line = self.line
            yield Record(line, f"{name}[{index}]: ", self._value())
            index += 1

    def items_under(self, key: str) -> Iterator[Record]:
        """The items of the array under a key of the object that begins here."""
        self._expect("{")
        names: list[str] = []
        while not self._take("}"):
            if names:
                self._expect(",")
            if not self._text.startswith('"', self._position):
                raise self._error("expected a name in quotes")
            name = self._value()
            self._expect(":")
            if name != key:
                self._value()
            elif name in names:
                raise self._error(f'expected "{key}" only once')
            else:
                yield from self.items(key)
            names.append(name)
        if key not in names:
            raise self._error(f'expected "{key}" before it')

    def expect_end(self) -> None:
        """Nothing may follow the document."""
        if self._position < len(self._text):
            raise self._error("expected the end of the document")

    def _value(self) -> Any:
        value, self._position = _decode(self._text, self._position)
        self._skip_space()
        return value

    def _take(self, character: str) -> bool:
        taken = self._text.startswith(character, self._position)
        if taken:
            self._position += 1
            self._skip_space()
        return taken

    def _expect(self, character: str) -> None:
        if not self._take(character):
            raise self._error(f'expected "{character}"')

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._position)
        assert match is not None
        self._position = match.end()

    def _error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text, self._position)
