"""A run as a trace for https://ui.perfetto.dev: its steps, each request's phases, and counters over time.

Made from step records (`pagellm.engine.step_log`) one at a time, while a run goes on or afterwards from its
log; what is kept in memory is the requests in flight. The format is Chrome's Trace Event Format: complete
events (X) on threads, counters (C), and metadata (M), times in microseconds from the first that happened.

A replica is two processes. One has its steps, with the moving of blocks inside them, and the counters; the
other a thread for each request, whose phases follow each other without a gap: queued, prefill, decode, and
after a preemption preempted or swapped, until it is admitted again.
"""

from dataclasses import dataclass, field
from os import PathLike
from types import TracebackType
from typing import Any

import orjson

from pagellm.engine import checks
from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.errors import ReportError
from pagellm.engine.step_log import AddedRecord, PreemptedRecord, StepRecord

_NS = 10**9
_MAX_EVENTS = 1000  # that are kept before they are written
# Above every process id: a thread whose id is its process's would be taken for the process's main thread.
_FIRST_THREAD = 10_000


@dataclass(slots=True)
class _Request:
    """A request in flight, and the phase that it is in.

    since: when that began. args: what is shown of it. tokens: computed in it.
    """

    thread: int
    phase: str
    since: int
    args: dict[str, Any]
    tokens: int = 0


@dataclass(slots=True)
class _Replica:
    """What is known of a replica between its steps; times are nanoseconds from the beginning.

    steps: the thread of its steps; processes: that one's, and that of its requests. end: of the step before.
    """

    steps: int
    processes: tuple[int, int]
    end: int = 0
    requests: dict[int, _Request] = field(default_factory=dict)


class PerfettoTrace:
    """A trace file that grows with each `step`; `close` makes it whole. Use it in a `with` statement."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = checks.path("perfetto", path, ReportError)
        self._replicas: dict[int, _Replica] = {}
        self._num_threads = 0
        self._begin: float | None = None
        self._events: list[dict[str, Any]] = []  # that are to be written
        self._separator = b"\n"
        try:
            self._file = open(self._path, "wb")  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error) from error
        self._write(b'{"displayTimeUnit":"ms","traceEvents":[')

    def __enter__(self) -> "PerfettoTrace":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: Any, __: TracebackType | None) -> None:
        self.close()

    def step(self, record: StepRecord, replica: int | None = None) -> None:
        """Adds one step, of the replica that the record names if none is named here. Raises `ReportError`."""
        self._add(record, record.get("replica", 0) if replica is None else replica)
        if len(self._events) >= _MAX_EVENTS:
            self._flush()

    def close(self) -> None:
        """Ends the phases of what is still in flight, and the file. Raises `ReportError`."""
        if self._file.closed:
            return
        try:
            for replica in self._replicas.values():
                for sequence in list(replica.requests):
                    self._end(replica, sequence, replica.end, "in flight")
            self._flush()
            self._write(b"\n]}\n")
        finally:
            try:
                self._file.close()
            except OSError as error:
                raise self._unwritable(error) from error

    def _flush(self) -> None:
        if self._events:
            self._write(self._separator + orjson.dumps(self._events)[1:-1])
            self._separator = b",\n"
            self._events.clear()

    def _write(self, text: bytes) -> None:
        try:
            self._file.write(text)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ReportError:
        return ReportError(f"{self._path}: cannot be written: {error.strerror or error}")

    # The events of a step

    def _add(self, record: StepRecord, number: int) -> None:
        if self._begin is None:
            arrivals = [added["arrival_s"] for added in record["added"]]
            self._begin = min([*arrivals, record["start_s"]])
        replica = self._replicas.get(number) or self._introduce(number)
        # Clocks that are read one after the other may let a step begin before the one before it has ended.
        start = max(self._time(record["start_s"]), replica.end)
        end = start + round(record["duration_s"] * _NS)
        for added in record["added"]:
            self._arrive(added, replica)
        for sequence, reason in record["ended"]:
            self._end(replica, sequence, replica.end, reason)
        for preempted in record["preempted"]:
            self._preempt(preempted, replica, start)
        if record["admitted"]:
            self._admissions(record, replica, start)
        for request in self._step(record, replica, start, end):  # that got their first token
            self._change(replica, request, "decode", end, {})
        for child, parent in record["forked"]:  # they wait for the step that they are in
            self._change(replica, replica.requests[child], "queued", end, {"forked_from": parent})
        for sequence, reason in record["finished"]:
            self._end(replica, sequence, end, reason)
        replica.end = end
        if not replica.requests:  # else the counters would hold through the idle time that follows
            self._counter(replica, "requests", end, {"running": 0, "waiting": 0, "swapped": 0})

    def _introduce(self, number: int) -> _Replica:
        steps, requests = processes = 2 * number + 1, 2 * number + 2
        self._replicas[number] = replica = _Replica(self._new_thread(), processes)
        for process, name in ((steps, "steps"), (requests, "requests")):
            self._metadata(process, 0, "process_name", {"name": f"replica {number}: {name}"})
            self._metadata(process, 0, "process_sort_index", {"sort_index": process})
        self._metadata(steps, replica.steps, "thread_name", {"name": "steps"})
        return replica

    def _arrive(self, added: AddedRecord, replica: _Replica) -> None:
        sequence, thread = added["sequence"], self._new_thread()
        args = {name: value for name, value in added.items() if value is not None and name != "arrival_s"}
        replica.requests[sequence] = _Request(thread, "queued", self._time(added["arrival_s"]), args)
        self._metadata(replica.processes[1], thread, "thread_name", {"name": f"request {sequence}"})
        self._metadata(replica.processes[1], thread, "thread_sort_index", {"sort_index": thread})

    def _preempt(self, preempted: PreemptedRecord, replica: _Replica, start: int) -> None:
        phase = "swapped" if preempted["by"] == "swap" else "preempted"
        args = {name: value for name, value in preempted.items() if name != "sequence"}
        self._change(replica, replica.requests[preempted["sequence"]], phase, start, args)

    def _admissions(self, record: StepRecord, replica: _Replica, start: int) -> None:
        scheduled = {sequence: (count, samples) for sequence, _, count, samples in record["scheduled"]}
        for sequence, was, num_cached_tokens in record["admitted"]:
            goes_on = was == "swapped" and scheduled.get(sequence) == (1, True)
            phase, args = "decode" if goes_on else "prefill", {"num_cached_tokens": num_cached_tokens}
            self._change(replica, replica.requests[sequence], phase, start, args)

    def _step(self, record: StepRecord, replica: _Replica, start: int, end: int) -> list[_Request]:
        """The step itself and the counters; returns the requests that got their first token in it."""
        began = []
        requests, scheduled = replica.requests, record["scheduled"]
        num_prefill_tokens = num_decode_tokens = 0
        for sequence, _, count, samples in scheduled:
            request = requests[sequence]
            request.tokens += count
            phase = request.phase
            if phase == "prefill":
                num_prefill_tokens += count
                if samples:
                    began.append(request)
            else:
                num_decode_tokens += count
                if phase != "decode":  # a fork, which is not admitted: it decodes since its parent did
                    request.phase = "decode"
        transfers, blocks, process = record["transfers"], record["blocks"], replica.processes[0]
        at, took = start / 1000, (end - start) / 1000  # microseconds
        args = {
            "tokens": num_prefill_tokens + num_decode_tokens,
            "prefill_tokens": num_prefill_tokens,
            "decode_tokens": num_decode_tokens,
            "sequences": len(scheduled),
            "admitted": len(record["admitted"]),
            "preempted": len(record["preempted"]),
        }
        tokens = {"prefill": num_prefill_tokens, "decode": num_decode_tokens}
        states = {"running": record["running"], "waiting": record["waiting"], "swapped": record["swapped"]}
        used = {"used": blocks["used"], "shared": blocks["shared"]}
        name = f"step {record['step']}"
        # Written out, because these are most of a trace's events.
        self._events += (
            {
                "ph": "X",
                "pid": process,
                "tid": replica.steps,
                "name": name,
                "ts": at,
                "dur": took,
                "args": args,
            },
            {"ph": "C", "pid": process, "name": "batch tokens", "ts": at, "args": tokens},
            {"ph": "C", "pid": process, "name": "requests", "ts": at, "args": states},
            {"ph": "C", "pid": process, "name": "blocks", "ts": at, "args": used},
        )
        if transfers:
            args |= transfers
            moved = min(end, start + round(record["transfer_s"] * _NS))
            if moved > start:
                self._complete(process, replica.steps, "transfers", start, moved, transfers)
        return began

    # The phases of a request

    def _change(
        self, replica: _Replica, request: _Request, phase: str, at: int, args: dict[str, Any]
    ) -> None:
        """Ends a phase and begins another one; one that took no time is left out."""
        at = max(at, request.since)
        if at > request.since:
            if request.phase in ("prefill", "decode"):
                request.args["tokens"] = request.tokens
            self._complete(
                replica.processes[1], request.thread, request.phase, request.since, at, request.args
            )
        request.phase, request.since, request.args, request.tokens = phase, at, args, 0

    def _end(self, replica: _Replica, sequence: int, at: int, reason: str) -> None:
        request = replica.requests.pop(sequence)
        request.args = request.args | {"ended": reason}
        self._change(replica, request, "", at, {})

    def _time(self, seconds: float) -> int:
        assert self._begin is not None
        return round((seconds - self._begin) * _NS)

    def _new_thread(self) -> int:
        self._num_threads += 1
        return _FIRST_THREAD + self._num_threads - 1

    # One event each

    def _complete(
        self, process: int, thread: int, name: str, start: int, end: int, args: dict[str, Any]
    ) -> None:
        times = {"ts": start / 1000, "dur": (end - start) / 1000}  # microseconds
        self._events.append({"ph": "X", "pid": process, "tid": thread, "name": name, **times, "args": args})

    def _counter(self, replica: _Replica, name: str, at: int, values: dict[str, int]) -> None:
        process = replica.processes[0]
        self._events.append({"ph": "C", "pid": process, "name": name, "ts": at / 1000, "args": values})

    def _metadata(self, process: int, thread: int, name: str, args: dict[str, Any]) -> None:
        self._events.append({"ph": "M", "pid": process, "tid": thread, "name": name, "args": args})


def from_step_log(path: str | PathLike[str], out: str | PathLike[str]) -> None:
    """Writes the trace of a run from its step log; a `ReportError` names the line that is no step record."""
    path = checks.path("step_log", path, ReportError)
    try:
        with open(path, encoding="utf-8") as log, PerfettoTrace(out) as trace:
            for number, line in enumerate(log, 1):
                try:
                    trace.step(parse_json(line))
                except ReportError:
                    raise
                except JsonError as error:
                    raise ReportError(f"{path}:{number}: found {error}, expected a step record") from None
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
