"""A run as a trace for https://ui.perfetto.dev: its steps, each request's phases, and counters over time.

Listeners write it while a run goes on; what is kept in memory is the requests in flight. The format is
Chrome's Trace Event Format: complete events (X) on threads, counters (C), and metadata (M), times in
microseconds from the first that happened. Counters are written when they change.

A replica is two processes. One has its steps, with the moving of blocks inside them, and the counters; the
other as many threads, called slots, as there were requests in flight at once. A request has one to itself,
and another one after it. Its phases follow each other without a gap: queued, prefill, decode, and after a
preemption preempted or swapped, until it is admitted again; each names its request.
"""

from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush
from os import PathLike
from types import TracebackType
from typing import Any

import orjson

from pagellm.engine import checks
from pagellm.engine.errors import ReportError
from pagellm.engine.scheduling.batch import Preempted, Preemption, ScheduledBatch
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus
from pagellm.engine.scheduling.step_loop import StepEnd, StepListener
from pagellm.engine.scheduling.stride import Stride

_NS = 10**9
_MAX_EVENTS = 1000  # that are kept before they are written
# Above every process id: a thread whose id is its process's would be taken for the process's main thread.
_FIRST_THREAD = 10_000


class PerfettoTrace:
    """A trace file that grows with each step; `close` makes it whole. Use it in a `with` statement."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = checks.path("perfetto", path, ReportError)
        self._listeners: list[_Listener] = []
        self._num_threads = 0
        self._begin: float | None = None
        self.events: list[str] = []  # that are to be written
        self._separator = "\n"
        try:
            self._file = open(self._path, "wb")  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error) from error
        self._write('{"displayTimeUnit":"ms","traceEvents":[')

    def __enter__(self) -> "PerfettoTrace":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: Any, __: TracebackType | None) -> None:
        self.close()

    def listener(self, scheduler: Scheduler, replica: int = 0) -> StepListener:
        """What is to listen to the step loop of one of the replicas. Its calls raise `ReportError`."""
        listener = _Listener(self, scheduler, replica)
        self._listeners.append(listener)
        return listener

    def close(self) -> None:
        """Ends the phases of what is still in flight, and the file. Raises `ReportError`."""
        if self._file.closed:
            return
        try:
            for listener in self._listeners:
                listener.close()
            self._flush()
            self._write("\n]}\n")
        finally:
            try:
                self._file.close()
            except OSError as error:
                raise self._unwritable(error) from error

    def nanoseconds(self, seconds: float) -> int:
        """A time on the driver's clock as one from the beginning, which the first one asked for is."""
        if self._begin is None:
            self._begin = seconds
        return round((seconds - self._begin) * _NS)

    def new_thread(self) -> int:
        """The id of one more thread."""
        self._num_threads += 1
        return _FIRST_THREAD + self._num_threads - 1

    def flush_if_many(self) -> None:
        """Writes the events so far, if there are enough of them."""
        if len(self.events) >= _MAX_EVENTS:
            self._flush()

    def _flush(self) -> None:
        if self.events:
            self._write(self._separator + ",\n".join(self.events))
            self._separator = ",\n"
            self.events.clear()

    def _write(self, text: str) -> None:
        try:
            self._file.write(text.encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ReportError:
        return ReportError(f"{self._path}: cannot be written: {error.strerror or error}")


@dataclass(slots=True)
class _Request:
    """A request in flight, and the phase that it is in.

    since: when that began. args: what is shown of it. tokens: computed in it.
    """

    number: int
    slot: int
    phase: str
    since: int
    args: dict[str, Any]
    tokens: int = 0


class _Listener(StepListener):
    """Draws one replica. Times are nanoseconds from the beginning."""

    takes_strides = True

    def __init__(self, trace: PerfettoTrace, scheduler: Scheduler, number: int) -> None:
        self._trace = trace
        self._add = trace.events.append
        self._scheduler = scheduler
        self._number = number
        self._process, self._requests_process = 2 * number + 1, 2 * number + 2
        self._thread = 0  # of the steps
        self._step_head, self._counter_head = "", f'{{"ph":"C","pid":{self._process},"name":"'
        self._num_steps = 0
        self._start = self._end = 0  # of the step under way, and of the one before
        self._at = ""  # the former, as it is written
        self._is_stepping = False
        self._requests: dict[Sequence, _Request] = {}
        self._threads: list[int] = []  # of each slot
        self._free_slots: list[int] = []  # a heap
        self._free_since: list[int] = []  # of each slot, once it is free
        self._added: list[Sequence] = []  # since the last step began
        self._ended: list[Sequence] = []
        self._tokens: tuple[int, int] | None = None  # the counters as written last
        self._states: tuple[int, int, int] | None = None
        self._blocks: tuple[int, int] | None = None

    def added(self, sequence: Sequence) -> None:
        self._added.append(sequence)

    def ended(self, sequence: Sequence) -> None:
        self._ended.append(sequence)

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        if not self._thread:
            self._introduce(now)
        # Clocks that are read one after the other may let a step begin before the one before it has ended.
        self._start = start = max(self._trace.nanoseconds(now), self._end)
        if self._added:
            for sequence in self._added:
                self._arrive(sequence)
            self._added.clear()
        if self._ended:
            self._let_go()
        for preempted in batch.preempted:
            self._preempt(preempted, start)
        if batch.admitted:
            self._admit(batch, start)
        self._at = _microseconds(start)
        self._count()
        self._is_stepping = True
        self._num_steps += 1

    def committed(self, end: StepEnd) -> None:
        if not self._is_stepping:
            return  # this began to listen in the middle of the step
        self._is_stepping = False
        batch = end.batch
        self._end = at = self._start + round(end.duration_s * _NS)
        requests = self._requests
        began = []
        num_tokens = num_prefill_tokens = 0
        for sequence, count, samples in zip(
            batch.sequences, batch.num_new_tokens, batch.samples, strict=True
        ):
            request = requests[sequence]
            request.tokens += count
            num_tokens += count
            if request.phase == "prefill":
                num_prefill_tokens += count
                if samples:
                    began.append(request)
            elif request.phase != "decode":  # a fork, which is not admitted: it decodes since its parent did
                request.phase = "decode"
        self._draw(end, num_prefill_tokens, num_tokens - num_prefill_tokens)
        for parent, forks in batch.forks.items():
            for child in forks:  # which wait for the step that they are in
                self._change(requests[child], "queued", at, {"forked_from": parent.seq_id})
        self._finish_all(end.finished)
        for request in began:  # they got their first token
            if request.phase == "prefill":  # else it was their last one, too
                self._change(request, "decode", at, {})
        self._trace.flush_if_many()

    def strode(self, stride: Stride) -> None:
        batch, times, durations_s = stride.batch, stride.times, stride.durations_s
        finished = stride.finished if len(durations_s) == 1 else []
        self.committed(StepEnd(batch, batch.sequences, finished, times[1], durations_s[0], 0.0))
        num_blocks, num_sequences = self._scheduler.block_manager.num_blocks, len(batch.sequences)
        args = (
            f'"args":{{"tokens":{num_sequences},"prefill_tokens":0,"decode_tokens":{num_sequences},'
            f'"sequences":{num_sequences},"admitted":0,"preempted":0}}}}'
        )
        changes = {change.step: change for change in stride.changes}
        nanoseconds, add, end = self._trace.nanoseconds, self._add, self._end
        for step in range(1, len(durations_s)):
            start = nanoseconds(times[step])
            if start < end:
                start = end
            end = start + round(durations_s[step] * _NS)
            self._at = at = f"{start / 1000:.3f}"
            if step in changes:
                change = changes[step]
                self._count_blocks((num_blocks - change.num_free_blocks, change.num_shared))
            add(f'{self._step_head}{self._num_steps}","ts":{at},"dur":{(end - start) / 1000:.3f},{args}')
            if step == 1:
                self._count_tokens((0, num_sequences))
            self._num_steps += 1
        self._end = end
        self._trace.flush_if_many()
        if len(durations_s) > 1:
            for sequence in batch.sequences:
                self._requests[sequence].tokens += len(durations_s) - 1
            self._finish_all(stride.finished)

    def left(self, sequence: Sequence, why: str) -> None:
        if sequence in self._requests:
            self._finish(sequence, self._end, why)
        else:
            self._added.remove(sequence)

    def close(self) -> None:
        """Ends the phases of what is in flight."""
        self._let_go()
        for sequence in list(self._requests):
            self._finish(sequence, self._end, "in flight")

    # The parts of a step

    def _introduce(self, now: float) -> None:
        self._trace.nanoseconds(min([now, *(sequence.arrival_time for sequence in self._added)]))
        self._thread = self._trace.new_thread()
        self._step_head = f'{{"ph":"X","pid":{self._process},"tid":{self._thread},"name":"step '
        for process, name in ((self._process, "steps"), (self._requests_process, "requests")):
            self._metadata(process, 0, "process_name", f'"name":"replica {self._number}: {name}"')
            self._metadata(process, 0, "process_sort_index", f'"sort_index":{process}')
        self._metadata(self._process, self._thread, "thread_name", '"name":"steps"')

    def _arrive(self, sequence: Sequence) -> None:
        number, params = sequence.seq_id, sequence.sampling_params
        args = {
            "sequence": number,
            "num_prompt_tokens": sequence.num_prompt_tokens,
            "max_len": sequence.max_len,
            "priority": params.priority,
            "tenant": params.tenant,
        }
        if params.deadline_s is not None:
            args["deadline_s"] = params.deadline_s
        arrival = self._trace.nanoseconds(sequence.arrival_time)
        self._requests[sequence] = _Request(number, self._slot(arrival), "queued", arrival, args)

    def _slot(self, since: int) -> int:
        """The first slot that is free from a time on. A request may have come before others ended."""
        taken = []
        while self._free_slots:
            slot = heappop(self._free_slots)
            if self._free_since[slot] <= since:
                break
            taken.append(slot)
        else:
            slot, thread = len(self._threads), self._trace.new_thread()
            self._threads.append(thread)
            self._free_since.append(0)
            self._metadata(self._requests_process, thread, "thread_name", f'"name":"slot {slot}"')
            self._metadata(self._requests_process, thread, "thread_sort_index", f'"sort_index":{thread}')
        for other in taken:
            heappush(self._free_slots, other)
        return slot

    def _let_go(self) -> None:
        """Ends those that have ended since the step before, otherwise than by its tokens."""
        for sequence in self._ended:
            if sequence in self._requests:
                self._finish(sequence, self._end)
        self._ended.clear()

    def _preempt(self, preempted: Preempted, start: int) -> None:
        args = {
            "by": preempted.by.value,
            "needed_by": None if preempted.needed_by is None else preempted.needed_by.seq_id,
            "num_computed_tokens": preempted.num_computed_tokens,
            "recompute_s": preempted.recompute_s,
            "swap_s": preempted.swap_s,
        }
        phase = "swapped" if preempted.by is Preemption.SWAP else "preempted"
        self._change(self._requests[preempted.sequence], phase, start, args)

    def _admit(self, batch: ScheduledBatch, start: int) -> None:
        counts = dict(
            zip(batch.sequences, zip(batch.num_new_tokens, batch.samples, strict=True), strict=True)
        )
        for admitted in batch.admitted:
            sequence = admitted.sequence
            goes_on = admitted.was is SequenceStatus.SWAPPED and counts.get(sequence) == (1, True)
            args = {"num_cached_tokens": admitted.num_cached_tokens}
            self._change(self._requests[sequence], "decode" if goes_on else "prefill", start, args)

    def _count(self) -> None:
        scheduler, manager = self._scheduler, self._scheduler.block_manager
        num_swapped = manager.num_swapped
        states = len(scheduler.running), scheduler.num_waiting - num_swapped, num_swapped
        self._count_states(states, self._at)
        self._count_blocks((manager.num_blocks - manager.num_free_blocks, manager.num_shared))

    def _count_blocks(self, blocks: tuple[int, int]) -> None:
        if blocks != self._blocks:
            self._blocks = blocks
            self._counter("blocks", self._at, f'"used":{blocks[0]},"shared":{blocks[1]}')

    def _count_states(self, states: tuple[int, int, int], at: str) -> None:
        if states != self._states:
            self._states = states
            running, waiting, swapped = states
            self._counter("requests", at, f'"running":{running},"waiting":{waiting},"swapped":{swapped}')

    def _draw(self, end: StepEnd, num_prefill_tokens: int, num_decode_tokens: int) -> None:
        batch, start = end.batch, self._start
        transfers = ""
        if batch.transfers:
            kinds = dict(Counter(transfer.kind.value for transfer in batch.transfers))
            transfers = f",{orjson.dumps(kinds).decode()[1:-1]}"
            moved = min(self._end, start + round(end.transfer_s * _NS))
            if moved > start:
                self._slice(self._process, self._thread, "transfers", start, moved, kinds)
        # Written out, because this is most of a trace's events.
        self._add(
            f'{self._step_head}{self._num_steps - 1}",'
            f'"ts":{self._at},"dur":{(self._end - start) / 1000:.3f},'
            f'"args":{{"tokens":{num_prefill_tokens + num_decode_tokens},'
            f'"prefill_tokens":{num_prefill_tokens},"decode_tokens":{num_decode_tokens},'
            f'"sequences":{len(batch.sequences)},"admitted":{len(batch.admitted)},'
            f'"preempted":{len(batch.preempted)}{transfers}}}}}'
        )
        self._count_tokens((num_prefill_tokens, num_decode_tokens))

    def _count_tokens(self, tokens: tuple[int, int]) -> None:
        if tokens != self._tokens:
            self._tokens = tokens
            self._counter("batch tokens", self._at, f'"prefill":{tokens[0]},"decode":{tokens[1]}')

    # The phases of a request

    def _change(self, request: _Request, phase: str, at: int, args: dict[str, Any]) -> None:
        """Ends a phase and begins another one; one that took no time is left out."""
        since = request.since
        if at > since:
            if request.phase in ("prefill", "decode"):
                request.args["tokens"] = request.tokens
            shown = {"request": request.number, **request.args}
            self._slice(self._requests_process, self._threads[request.slot], request.phase, since, at, shown)
            request.since = at
        request.phase, request.args, request.tokens = phase, args, 0

    def _finish_all(self, sequences: list[Sequence]) -> None:
        """Ends those that a step has ended."""
        for sequence in sequences:
            self._finish(sequence, self._end)
        if not self._requests:  # else the counters would hold through the idle time that follows
            self._count_states((0, 0, 0), _microseconds(self._end))

    def _finish(self, sequence: Sequence, at: int, why: str | None = None) -> None:
        request = self._requests.pop(sequence)
        request.args = request.args | {"ended": why or sequence.finish_reason}
        self._change(request, "", at, {})
        self._free_since[request.slot] = max(at, request.since)
        heappush(self._free_slots, request.slot)

    # One event each

    def _slice(
        self, process: int, thread: int, name: str, start: int, end: int, args: dict[str, Any]
    ) -> None:
        self._add(
            f'{{"ph":"X","pid":{process},"tid":{thread},"name":"{name}","ts":{_microseconds(start)},'
            f'"dur":{_microseconds(end - start)},"args":{orjson.dumps(args).decode()}}}'
        )

    def _counter(self, name: str, at: str, values: str) -> None:
        self._add(f'{self._counter_head}{name}","ts":{at},"args":{{{values}}}}}')

    def _metadata(self, process: int, thread: int, name: str, args: str) -> None:
        self._add(f'{{"ph":"M","pid":{process},"tid":{thread},"name":"{name}","args":{{{args}}}}}')


def _microseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1000:.3f}"
