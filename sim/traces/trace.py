"""A trace: requests in the order of their arrival, read anew from where they come each time it is iterated.

It knows times and where requests come from; formats and synthesis are the business of their own files.
"""

import gzip
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from pagellm.engine import checks
from pagellm.engine.errors import TraceError
from pagellm.sim.traces.files import Record, read_lines
from pagellm.sim.traces.formats import detect
from pagellm.sim.traces.parsing import Fields, Format
from pagellm.sim.traces.prompt_tokens import Encoder
from pagellm.sim.traces.request import TraceRequest, bad_value, check_integer, check_number

MAX_LISTED_SKIPS = 100
# What helps, at the end of errors; each is an option of `Trace.load` and of the commands.
_SORT = "sort (--sort) sorts them in memory"
SKIP_BAD = "skip_bad (--skip-bad) leaves bad requests out"


class LeftOut:
    """What the latest reading of a file left out: bad records, and those with nothing to generate."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins a new reading."""
        self.skipped: list[tuple[int, str]] = []
        self.num_skipped = 0
        self.num_dropped = 0

    def skip(self, line: int, message: str) -> None:
        """Counts a bad record, and lists it if it is one of the first."""
        self.num_skipped += 1
        if len(self.skipped) < MAX_LISTED_SKIPS:
            self.skipped.append((line, message))


class Trace:
    """Requests whose arrival times never decrease; iterating it again gives the same ones again.

    Requests are read or made one at a time, so a trace may be larger than memory. (Not so a JSON document,
    whose requests may stand in any order and are sorted.) An error ends the iteration that meets it.

    requests: begins a new iteration, in order of arrival. format: of the file that they are from.
    has_sessions: whether any may wait for the answer of another. Then a replay reads them twice.
    """

    def __init__(
        self,
        requests: Callable[[], Iterator[TraceRequest]],
        name: str = "trace",
        left_out: LeftOut | None = None,
        format: str | None = None,
        has_sessions: Callable[[], bool] = lambda: False,
    ) -> None:
        self._requests = requests
        self.has_sessions = has_sessions
        self.name = name
        self.format = format
        self._left_out = left_out or LeftOut()

    def __iter__(self) -> Iterator[TraceRequest]:
        return self._requests()

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """(line, message) of the first bad records that the latest iteration skipped, at most 100."""
        return self._left_out.skipped

    def skipped_records(self) -> list[dict[str, Any]]:
        """The same as JSON has them: line and message of each."""
        return [{"line": line, "message": message} for line, message in self.skipped]

    @property
    def num_skipped(self) -> int:
        """Bad records that the latest iteration skipped."""
        return self._left_out.num_skipped

    @property
    def num_dropped(self) -> int:
        """Records that the latest iteration dropped because they have nothing to generate, in any format.

        A conversation of ShareGPT's is one of them where no human is answered.
        """
        return self._left_out.num_dropped

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        skip_bad: bool = False,
        sort: bool = False,
        tokenizer: Encoder | None = None,
        output_len: int | None = None,
    ) -> "Trace":
        """A trace from a file, gzip or not.

        format: one of `FORMATS`; None tells it from the content. Mooncake's timestamps are milliseconds, and
        seconds if they have fractions (mooncake-s).
        A record with 0 tokens of output is dropped and counted, in every format.
        skip_bad: leave bad records out and count them, instead of ending with an error. Damage to the file
        itself is always an error. sort: read all requests into memory and sort them by arrival.
        output_len: tokens to generate for requests of which the trace does not say it.
        tokenizer: counts the tokens of ShareGPT's answers, which are estimated from their bytes without one.

        Raises `TraceError`, with file, line and field: from here for what shows at once (in a JSON document
        and with sort that is everything), else from the iteration.
        """
        path = checks.path("trace", path, TraceError)
        if output_len is not None:
            check_integer("output_len", output_len, 1)
        reader = _Reader(path, detect(path, format), skip_bad, tokenizer, output_len)
        if not (sort or reader.form.is_document):
            return cls(reader.stream, str(path), reader.left_out, reader.form.name, reader.has_sessions)
        requests = reader.read_sorted()
        return cls(
            lambda: iter(requests),
            str(path),
            reader.left_out,
            reader.form.name,
            lambda: any(map(_may_wait, requests)),
        )

    @classmethod
    def from_requests(cls, requests: Iterable[TraceRequest], name: str = "trace") -> "Trace":
        """A trace in memory, sorted by arrival; requests that arrive together keep their order."""
        in_order = sorted(requests, key=lambda request: request.arrival_time)
        if not in_order:
            raise _no_requests(name, LeftOut())
        placed = [replace(r, index=index, id=r.id or str(index)) for index, r in enumerate(in_order)]
        return cls(lambda: iter(placed), name, has_sessions=lambda: any(map(_may_wait, placed)))

    def scaled(self, rate_factor: float) -> "Trace":
        """The same requests, arriving rate_factor times as often."""
        if check_number("rate_factor", rate_factor) == 0:
            raise bad_value("rate_factor", rate_factor, "a number above 0")
        return self.through(lambda rs: (replace(r, arrival_time=r.arrival_time / rate_factor) for r in rs))

    def limited(self, n: int) -> "Trace":
        """The first n requests, or all if there are fewer."""
        check_integer("limit", n, 1)
        return self.through(lambda requests: islice(requests, n))

    def retimed(self, begin: Callable[[], Iterable[float]]) -> "Trace":
        """The same requests in the same order, arriving at other times.

        begin: begins the times anew, seconds that do not decrease. The trace ends where they do.
        """
        return self.through(
            lambda rs: (replace(r, arrival_time=time) for time, r in zip(begin(), rs, strict=False))
        )

    def through(self, step: Callable[[Iterator[TraceRequest]], Iterator[TraceRequest]]) -> "Trace":
        """What a step makes of the requests one by one; it has to keep them in the order of arrival."""
        return Trace(lambda: step(iter(self)), self.name, self._left_out, self.format, self.has_sessions)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Writes JSON Lines, compressed if the name ends in .gz; returns the number of requests.

        The file appears under its name when it is whole, or not at all.
        """
        path = checks.path("trace", path, TraceError)
        try:
            with _whole_file(path) as file:
                return self.write(file)
        except OSError as error:
            raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None

    def write(self, file: IO[bytes]) -> int:
        """Writes JSON Lines into an open file; returns the number of requests."""
        number = 0
        for request in self:
            line = json.dumps(request.to_dict(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            file.write(line.encode() + b"\n")
            number += 1
        return number


class _Reader:
    """Reads a file's requests; what is bad is an error, or counted and left out."""

    def __init__(
        self,
        path: Path,
        form: Format,
        skip_bad: bool,
        tokenizer: Encoder | None,
        output_len: int | None,
    ) -> None:
        self.form = form
        self.left_out = LeftOut()
        self._path = path
        self._skip_bad = skip_bad
        self._tokenizer = tokenizer
        self._output_len = output_len

    def stream(self) -> Iterator[TraceRequest]:
        """The requests in the file's order, which must be that of their arrival."""
        self.left_out.reset()
        return self._placed(self._parsed())

    def read_sorted(self) -> list[TraceRequest]:
        """All requests by arrival; those that arrive together keep the file's order."""
        return list(self._placed(sorted(self._parsed(), key=lambda parsed: parsed[1]["arrival_time"])))

    def has_sessions(self) -> bool:
        """Whether any request may wait for another, at a glance."""
        names = self.form.session_names
        # Without names to look for the file is not read.
        return bool(names) and any(name in line for _, line in read_lines(self._path) for name in names)

    def _parsed(self) -> Iterator[tuple[Record, Fields]]:
        """The fields of each request and the record that they stand in."""
        parse = self.form.parser(self._tokenizer)
        for record in self.form.records(self._path):
            try:
                value = _value(record)
                requests = [self._with_output_len(fields) for fields in parse(value)]
            except TraceError as error:
                self._refuse(record, error)
                continue
            requests = [fields for fields in requests if fields["output_len"] > 0]
            self.left_out.num_dropped += not requests
            model = value.get("model")
            for fields in requests:
                # As the record has it, in any format, where a request of it does not say otherwise.
                if model and "model" not in fields and isinstance(model, str):
                    fields["model"] = model
                yield record, fields

    def _with_output_len(self, fields: Fields) -> Fields:
        if fields["output_len"] is not None:
            return fields
        if self._output_len is None:
            expected = "the tokens to generate, or --output-len for requests that do not say it"
            raise bad_value("output length", None, expected)
        return fields | {"output_len": self._output_len}

    def _placed(self, parsed: Iterable[tuple[Record, Fields]]) -> Iterator[TraceRequest]:
        """The requests with their time and place in the trace."""
        start = None if self.form.is_shifted else 0
        last = -math.inf
        index = 0
        for record, fields in parsed:
            ticks = fields["arrival_time"]
            place = {"index": index, "id": fields.get("id", str(index))}
            try:
                if ticks < last:
                    earlier = f"{(last - ticks) / self.form.ticks_per_s:g} s earlier than the last"
                    field = self.form.time_field
                    raise bad_value(
                        field, record.value.get(field), f"times that never decrease; {earlier}; {_SORT}"
                    )
                origin = ticks if start is None else start
                place["arrival_time"] = (ticks - origin) / self.form.ticks_per_s
                request = TraceRequest(**fields | place)
            except TraceError as error:
                self._refuse(record, error)
                continue
            start, last, index = origin, ticks, index + 1
            yield request
        if index == 0:
            raise _no_requests(str(self._path), self.left_out)

    def _refuse(self, record: Record, error: TraceError) -> None:
        if not self._skip_bad:
            raise TraceError(f"{self._path}:{record.line}: {record.place}{error}; {SKIP_BAD}") from None
        self.left_out.skip(record.line, f"{record.place}{error}")


def _may_wait(request: TraceRequest) -> bool:
    return not (request.session is None and request.after is None and request.continues is None)


def _value(record: Record) -> dict[str, object]:
    if isinstance(record.value, TraceError):
        raise record.value
    if not isinstance(record.value, dict):
        raise bad_value("request", record.value, "an object with named fields")
    return record.value


def _no_requests(name: str, left_out: LeftOut) -> TraceError:
    counts = f"{left_out.num_skipped} bad, {left_out.num_dropped} dropped, as they generate nothing"
    first = f"; line {left_out.skipped[0][0]}: {left_out.skipped[0][1]}" if left_out.skipped else ""
    return TraceError(f"{name}: found no requests ({counts}{first}), expected at least one")


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when all is written; a pipe or device is written as it is.

    A link stays one: what it points to is written.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    target = path.resolve()
    part = target.with_name(f"{target.name}.part")
    try:
        with part.open("wb") as file:
            if path.suffix == ".gz":
                # No name and no time inside, so that equal traces are equal files.
                with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as compressed:
                    yield cast(IO[bytes], compressed)
            else:
                yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
