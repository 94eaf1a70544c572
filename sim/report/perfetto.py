"""A run as a trace for https://ui.perfetto.dev: its steps, each request's phases, and counters over time.

Made from step records (`pagellm.engine.step_log`) one at a time, while a run goes on or afterwards from its
log; what is kept in memory is the requests in flight. The format is Chrome's Trace Event Format: complete
events (X) on threads, counters (C), and metadata (M), times in microseconds from the first that happened.

A replica is two processes. One has its steps, with the moving of blocks inside them, and the counters; the
other a thread for each request, whose phases follow each other without a gap: queued, prefill, decode, and
after a preemption preempted or swapped, until it is admitted again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pagellm.engine.errors import ReportError
from pagellm.engine.step_log import StepRecord

_NS = 10**9
# Above every process id: a thread whose id is its process's would be taken for the process's main thread.
_FIRST_THREAD = 10_000


@dataclass
class _Request:
    """A request in flight, and the phase that it is in."""

    thread: int
    phase: str
    since: int
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Replica:
    """What is known of a replica between its steps; times are nanoseconds from the beginning."""

    steps: int  # the thread of its steps
    end: int = 0  # of the step before
    requests: dict[int, _Request] = field(default_factory=dict)


class PerfettoTrace:
    """A trace file that grows with each `step`; `close` makes it whole. Use it in a `with` statement."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._replicas: dict[int, _Replica] = {}
        self._num_threads = 0
        self._begin: float | None = None
        self._separator = "\n"
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error) from error
        self._write('{"displayTimeUnit":"ms","traceEvents":[')

    def __enter__(self) -> "PerfettoTrace":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: Any, __: TracebackType | None) -> None:
        self.close()

    def step(self, record: StepRecord, replica: int = 0) -> None:
        """Adds one step. Raises `ReportError` if it cannot be written."""
        self._emit(self._events(record, replica))

    def close(self) -> None:
        """Ends the phases of what is still in flight, and the file."""
        if self._file.closed:
            return
        try:
            for number, replica in self._replicas.items():
                for sequence in list(replica.requests):
                    self._emit(self._end(number, replica, sequence, replica.end, "in flight"))
            self._write("\n]}\n")
        finally:
            try:
                self._file.close()
            except OSError as error:
                raise self._unwritable(error) from error

    def _emit(self, events: Iterator[dict[str, Any]]) -> None:
        for event in events:
            self._write(f"{self._separator}{json.dumps(event, separators=(',', ':'))}")
            self._separator = ",\n"

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ReportError:
        return ReportError(f"{self._path}: cannot be written: {error.strerror or error}")

    # The events of a step

    def _events(self, record: StepRecord, number: int) -> Iterator[dict[str, Any]]:
        if self._begin is None:
            arrivals = (added["arrival_s"] for added in record["added"])
            self._begin = min(record["start_s"], *arrivals, record["start_s"])
        if number not in self._replicas:
            yield from self._introduce(number)
        replica = self._replicas[number]
        # Clocks that are read one after the other may let a step begin before the one before it has ended.
        start = max(self._time(record["start_s"]), replica.end)
        end = start + round(record["duration_s"] * _NS)
        yield from self._arrivals(record, number, replica)
        for sequence, reason in record["ended"]:
            yield from self._end(number, replica, sequence, replica.end, reason)
        yield from self._preemptions(record, number, replica, start)
        yield from self._admissions(record, number, replica, start)
        yield from self._step(record, number, replica, start, end)
        yield from self._counters(record, number, replica, start)
        yield from self._progress(record, number, replica, start, end)
        for sequence, reason in record["finished"]:
            yield from self._end(number, replica, sequence, end, reason)
        replica.end = end
        if not replica.requests:  # else the counters would hold through the idle time that follows
            yield _counter(number, "requests", end, {"running": 0, "waiting": 0, "swapped": 0})

    def _introduce(self, number: int) -> Iterator[dict[str, Any]]:
        self._replicas[number] = replica = _Replica(self._new_thread())
        for process, name in ((_steps_of(number), "steps"), (_requests_of(number), "requests")):
            yield _metadata(process, 0, "process_name", {"name": f"replica {number}: {name}"})
            yield _metadata(process, 0, "process_sort_index", {"sort_index": process})
        yield _metadata(_steps_of(number), replica.steps, "thread_name", {"name": "steps"})

    def _arrivals(self, record: StepRecord, number: int, replica: _Replica) -> Iterator[dict[str, Any]]:
        for added in record["added"]:
            sequence, thread = added["sequence"], self._new_thread()
            args = {name: value for name, value in added.items() if value is not None and name != "arrival_s"}
            replica.requests[sequence] = _Request(thread, "queued", self._time(added["arrival_s"]), args)
            name = {"name": f"request {sequence}"}
            yield _metadata(_requests_of(number), thread, "thread_name", name)
            yield _metadata(_requests_of(number), thread, "thread_sort_index", {"sort_index": thread})

    def _preemptions(
        self, record: StepRecord, number: int, replica: _Replica, start: int
    ) -> Iterator[dict[str, Any]]:
        for preempted in record["preempted"]:
            phase = "swapped" if preempted["by"] == "swap" else "preempted"
            args = {name: value for name, value in preempted.items() if name != "sequence"}
            yield from self._change(number, replica.requests[preempted["sequence"]], phase, start, args)

    def _admissions(
        self, record: StepRecord, number: int, replica: _Replica, start: int
    ) -> Iterator[dict[str, Any]]:
        scheduled = {sequence: (count, samples) for sequence, _, count, samples in record["scheduled"]}
        for sequence, was, num_cached_tokens in record["admitted"]:
            goes_on = was == "swapped" and scheduled.get(sequence) == (1, True)
            args = {"num_cached_tokens": num_cached_tokens, "tokens": 0}
            request = replica.requests[sequence]
            yield from self._change(number, request, "decode" if goes_on else "prefill", start, args)
        for sequence in scheduled:
            # A fork is not admitted: it runs on from the end of the step in which its parent began.
            request = replica.requests[sequence]
            if request.phase == "queued":
                request.phase, request.args = "decode", request.args | {"tokens": 0}

    def _step(
        self, record: StepRecord, number: int, replica: _Replica, start: int, end: int
    ) -> Iterator[dict[str, Any]]:
        tokens = {"prefill": 0, "decode": 0}
        for sequence, _, count, _ in record["scheduled"]:
            request = replica.requests[sequence]
            tokens[request.phase] += count
            request.args["tokens"] += count
        args = {
            "tokens": sum(tokens.values()),
            "prefill_tokens": tokens["prefill"],
            "decode_tokens": tokens["decode"],
            "sequences": len(record["scheduled"]),
            "admitted": len(record["admitted"]),
            "preempted": len(record["preempted"]),
            **record["transfers"],
        }
        process = _steps_of(number)
        yield _complete(process, replica.steps, f"step {record['step']}", start, end, args)
        moved = min(end, start + round(record["transfer_s"] * _NS))
        if moved > start:
            yield _complete(process, replica.steps, "transfers", start, moved, record["transfers"])
        yield _counter(number, "batch tokens", start, tokens)

    def _counters(
        self, record: StepRecord, number: int, replica: _Replica, start: int
    ) -> Iterator[dict[str, Any]]:
        yield _counter(
            number, "requests", start, {name: record[name] for name in ("running", "waiting", "swapped")}
        )
        yield _counter(number, "blocks", start, {name: record["blocks"][name] for name in ("used", "shared")})

    def _progress(
        self, record: StepRecord, number: int, replica: _Replica, start: int, end: int
    ) -> Iterator[dict[str, Any]]:
        """Whoever got its first token decodes from here on; forks wait for the step that they are in."""
        for sequence, _, _, samples in record["scheduled"]:
            request = replica.requests[sequence]
            if samples and request.phase == "prefill":
                yield from self._change(number, request, "decode", end, {"tokens": 0})
        for child, parent in record["forked"]:
            yield from self._change(number, replica.requests[child], "queued", end, {"forked_from": parent})

    # The phases of a request

    def _change(
        self, number: int, request: _Request, phase: str, at: int, args: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Ends a phase and begins another one; one that took no time is left out."""
        at = max(at, request.since)
        if at > request.since:
            process = _requests_of(number)
            yield _complete(process, request.thread, request.phase, request.since, at, request.args)
        request.phase, request.since, request.args = phase, at, args

    def _end(
        self, number: int, replica: _Replica, sequence: int, at: int, reason: str
    ) -> Iterator[dict[str, Any]]:
        request = replica.requests.pop(sequence)
        request.args = request.args | {"ended": reason}
        yield from self._change(number, request, "", at, {})

    def _time(self, seconds: float) -> int:
        assert self._begin is not None
        return round((seconds - self._begin) * _NS)

    def _new_thread(self) -> int:
        self._num_threads += 1
        return _FIRST_THREAD + self._num_threads - 1


def from_step_log(path: str | Path, out: str | Path) -> None:
    """Writes the trace of a run from its step log; a `ReportError` names the line that is no step record."""
    try:
        with open(path, encoding="utf-8") as log, PerfettoTrace(out) as trace:
            for number, line in enumerate(log, 1):
                try:
                    trace.step(json.loads(line))
                except ReportError:
                    raise
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    what = f"{type(error).__name__}: {error}"
                    place = f"{path}:{number}"
                    raise ReportError(
                        f"{place}: found {line[:60]!r}, expected a step record ({what})"
                    ) from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ReportError(f"{path}: found {error.object[error.start :][:8]!r}, expected UTF-8") from None


def _steps_of(replica: int) -> int:
    return 2 * replica + 1


def _requests_of(replica: int) -> int:
    return 2 * replica + 2


def _complete(
    process: int, thread: int, name: str, start: int, end: int, args: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": _microseconds(start), "dur": _microseconds(end - start)}
    return {"ph": "X", "pid": process, "tid": thread, "name": name, **times, "args": args}


def _counter(replica: int, name: str, at: int, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "pid": _steps_of(replica), "name": name, "ts": _microseconds(at), "args": dict(values)}


def _metadata(process: int, thread: int, name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": name, "args": args}


def _microseconds(nanoseconds: int) -> float:
    return nanoseconds / 1000
