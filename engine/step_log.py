"""What a scheduler did, step by step: a plain record of each step, and a file of them as JSON lines.

Built from what a step loop tells, so that a simulated run gives the same records as a real one. Nothing of
this runs unless somebody asks for it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count, repeat
from typing import Any, NotRequired, TypedDict

import orjson

from pagellm.engine.config import CompleteConfig
from pagellm.engine.errors import ConfigError
from pagellm.engine.progress import say
from pagellm.engine.scheduling.batch import Admitted, Preempted, PreemptionCosts, ScheduledBatch
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepEnd, StepListener, StepLoop
from pagellm.engine.scheduling.stride import Change, Stride

# Settings of which no decision of a scheduler follows: num_swap_blocks says what swap_dir comes to.
NO_DECISIONS = (
    "swap_dir",
    "step_log",
    "num_threads",
    "quantization",
    "generation_config",
    "reasoning_markers",
    "tool_call_parser",
)

_LINE = orjson.OPT_APPEND_NEWLINE
_BUFFER_BYTES = 2**17  # of a file's lines that are written together


class AddedRecord(TypedDict):
    """A sequence that was taken in."""

    sequence: int
    arrival_s: float
    num_prompt_tokens: int
    max_len: int
    priority: float
    tenant: str
    deadline_s: float | None


class PreemptedRecord(TypedDict):
    """Who made way for whom, how, and the seconds that either way was expected to cost."""

    sequence: int
    by: str
    needed_by: int | None  # None: a policy wanted it
    num_computed_tokens: int
    recompute_s: float
    swap_s: float


class StepRecord(TypedDict):
    """One step. Sequences are named by their seq_id, and blocks by their numbers."""

    step: int  # its number
    start_s: float  # when it was scheduled, on the driver's clock
    transfer_s: float  # what moving blocks took
    duration_s: float  # what all of it took, from being scheduled to having its tokens
    added: list[AddedRecord]  # since the step before
    ended: list[tuple[int, str]]  # since then otherwise than in `finished`, with the reason
    scheduled: list[tuple[int, int, int, bool]]  # tokens computed before, and now; whether one is sampled
    # The state it waited in, tokens the prefix cache had, and of these those in its second tier.
    admitted: list[tuple[int, str, int, int]]
    preempted: list[PreemptedRecord]
    forked: list[tuple[int, int]]  # the sequence, and the one whose blocks it shares
    # Of each scheduled sequence whose block table is not what it was when it was recorded last: the first
    # index that changed, and the blocks from there on.
    tables: list[tuple[int, int, list[int]]]
    transfers: dict[str, int]  # block contents moved, by kind
    finished: list[tuple[int, str]]  # with the reason
    costs: dict[str, float]  # what preemption was expected to cost: seconds for a token, and for a block
    running: int  # sequences when the step was scheduled
    waiting: int
    swapped: int
    blocks: dict[str, int]  # as in `BlockUsage`
    cache: dict[str, int]  # as in `PrefixCacheStats`
    config: NotRequired[dict[str, Any]]  # in the first record: what decisions follow from, nothing left open
    replica: NotRequired[int]  # where there are several


class StepRecorder(StepListener):
    """Makes the records of one scheduler's steps, and gives each to `write` when the step has ended.

    Records share what is the same in many of them: they are not to be changed.
    """

    takes_strides = True

    def __init__(
        self,
        scheduler: Scheduler,
        write: Callable[[StepRecord], None],
        config: CompleteConfig | None = None,
        replica: int | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._write = write
        self._config = config
        self._replica = replica
        self._num_steps = 0
        self._record: StepRecord | None = None  # of the step under way
        self._costs = scheduler.costs  # as recorded last
        # A step in which nothing happens, as most of them nearly are: records are made of it, because to copy
        # it costs little, and making them is most of what logging costs.
        self._quiet: StepRecord = {
            "step": 0,
            "start_s": 0.0,
            "transfer_s": 0.0,
            "duration_s": 0.0,
            "added": [],
            "ended": [],
            "scheduled": [],
            "admitted": [],
            "preempted": [],
            "forked": [],
            "tables": [],
            "transfers": {},
            "finished": [],
            "costs": _costs(scheduler.costs),
            "running": 0,
            "waiting": 0,
            "swapped": 0,
            "blocks": {},
            "cache": {},
        }
        self._added: list[AddedRecord] = []
        self._ended: list[tuple[int, str]] = []
        self._tables: dict[int, list[int]] = {}  # as recorded last, by seq_id
        self._changed: dict[Sequence, int] = {}  # with tables to be recorded, from this index on

    def added(self, sequence: Sequence) -> None:
        params = sequence.sampling_params
        self._added.append(
            {
                "sequence": sequence.seq_id,
                "arrival_s": sequence.arrival_time,
                "num_prompt_tokens": sequence.num_prompt_tokens,
                "max_len": sequence.max_len,
                "priority": params.priority,
                "tenant": params.tenant,
                "deadline_s": params.deadline_s,
            }
        )

    def ended(self, sequence: Sequence) -> None:
        self._ended.append(_end_of(sequence))
        self._forget(sequence)

    def left(self, sequence: Sequence, why: str) -> None:
        self._ended.append((sequence.seq_id, why))
        self._forget(sequence)

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        if self._record is not None:  # that step was given up, and nothing of it was computed
            self._record["scheduled"] = []
            self._write(self._record)
        scheduler, manager = self._scheduler, self._scheduler.block_manager
        self._record = record = self._quiet.copy()
        record["step"], record["start_s"] = self._num_steps, now
        record["scheduled"] = [
            (sequence.seq_id, sequence.num_computed_tokens, count, samples)
            for sequence, count, samples in zip(
                batch.sequences, batch.num_new_tokens, batch.samples, strict=True
            )
        ]
        if self._added:
            record["added"], self._added = self._added, []
        if self._ended:
            record["ended"], self._ended = self._ended, []
        if batch.admitted:
            record["admitted"] = list(map(_admitted, batch.admitted))
        if batch.preempted:
            record["preempted"] = list(map(_preempted, batch.preempted))
        if batch.forks:
            record["forked"] = list(_forked(batch))
        if batch.transfers:
            record["transfers"] = dict(Counter(transfer.kind.value for transfer in batch.transfers))
        if scheduler.costs is not self._costs:
            self._costs = scheduler.costs
            self._quiet["costs"] = record["costs"] = _costs(scheduler.costs)
        num_swapped = manager.num_swapped
        record["running"] = len(scheduler.running)
        record["waiting"] = scheduler.num_waiting - num_swapped
        record["swapped"] = num_swapped
        self._note_blocks(record, batch)
        if self._num_steps == 0 and self._config is not None:
            settings = asdict(self._config)
            record["config"] = {name: settings[name] for name in settings if name not in NO_DECISIONS}
        if self._replica is not None:
            record["replica"] = self._replica
        self._num_steps += 1

    def committed(self, end: StepEnd) -> None:
        record, self._record = self._record, None
        if record is None:
            return  # this began to listen in the middle of the step
        record["duration_s"], record["transfer_s"] = end.duration_s, end.transfer_s
        if end.finished:
            record["finished"] = self._finished(end.finished)
        self._write(record)

    def strode(self, stride: Stride) -> None:
        record = self._record
        assert record is not None
        batch = stride.batch
        num_sequences = len(batch.sequences)
        # What is scheduled in each step behind the first: a token more of each sequence.
        scheduled = zip(
            *[
                zip(repeat(seq_id), count(num_computed + 1), repeat(1), repeat(True), strict=False)
                for seq_id, num_computed, *_ in record["scheduled"]
            ],
            strict=False,
        )
        quiet, blocks = self._quiet.copy(), record["blocks"]
        for name in ("running", "waiting", "swapped", "cache"):
            quiet[name] = record[name]
        if self._replica is not None:
            quiet["replica"] = self._replica
        changes = iter((*stride.changes, None))
        change = next(changes)
        ends = zip(stride.times, stride.durations_s, strict=False)
        first, last, write = record["step"], len(stride.durations_s) - 1, self._write
        for step, (start_s, duration_s) in enumerate(ends):
            if step:
                record = quiet.copy()
                record["step"], record["start_s"] = first + step, start_s
                record["scheduled"] = list(next(scheduled))
                blocks = blocks.copy()
                blocks["unwritten_slots"] -= num_sequences
                if change is not None and change.step == step:
                    record["tables"] = self._tables_of(change, batch)
                    used = self._scheduler.block_manager.num_blocks - change.num_free_blocks
                    blocks["used"], blocks["free"] = used, change.num_free_blocks
                    blocks["shared"] = change.num_shared
                    blocks["swap_cached"] = change.num_offloaded_blocks
                    blocks["unwritten_slots"] += change.num_new_slots
                    quiet["cache"] = record["cache"] = record["cache"] | {
                        "evictions": change.num_evicted_tokens
                    }
                    change = next(changes)
                record["blocks"] = blocks
            record["duration_s"] = duration_s
            if step == last and stride.finished:
                record["finished"] = self._finished(stride.finished)
            write(record)
        self._num_steps += last
        self._record = None

    def _tables_of(self, change: Change, batch: ScheduledBatch) -> list[tuple[int, int, list[int]]]:
        """What has changed of the tables of a batch, in its order."""
        changed = {sequence: (index, blocks) for sequence, index, blocks in change.tables}
        tables = []
        for sequence in batch.sequences:
            if sequence in changed:
                index, blocks = changed[sequence]
                before = self._tables[sequence.seq_id][:index]
                tables += self._new_table(sequence.seq_id, index, before + blocks)
        return tables

    def _note_blocks(self, record: StepRecord, batch: ScheduledBatch) -> None:
        manager = self._scheduler.block_manager
        if batch.changed_tables or self._changed:
            record["tables"] = self._new_tables(batch)
        used, free, shared, unwritten_slots, swap_used, swap_cached = manager.usage()
        record["blocks"] = {
            "used": used,
            "free": free,
            "shared": shared,
            "unwritten_slots": unwritten_slots,
            "swap_used": swap_used,
            "swap_cached": swap_cached,
        }
        stats = manager.stats
        record["cache"] = {
            "queries": stats.queries,
            "hits": stats.hits,
            "evictions": stats.evictions,
            "host_hits": stats.host_hits,
            "offloads": stats.offloads,
        }

    def _new_tables(self, batch: ScheduledBatch) -> list[tuple[int, int, list[int]]]:
        pending = self._changed
        for sequence, index in batch.changed_tables.items():
            pending[sequence] = min(index, pending.get(sequence, index))
        tables = []
        for sequence in batch.sequences:
            same = pending.pop(sequence, None)
            if same is not None:
                tables += self._new_table(sequence.seq_id, same, sequence.block_table)
        return tables

    def _new_table(self, seq_id: int, same: int, table: list[int]) -> list[tuple[int, int, list[int]]]:
        """What is new in a table that is the same up to an index; nothing, if nothing is."""
        recorded = self._tables.setdefault(seq_id, [])
        while same < len(recorded) and same < len(table) and recorded[same] == table[same]:
            same += 1  # one that came back has begun with what it had before
        if same == len(table) == len(recorded):
            return []
        recorded[same:] = table[same:]
        return [(seq_id, same, table[same:])]

    def _finished(self, sequences: list[Sequence]) -> list[tuple[int, str]]:
        for sequence in sequences:
            self._forget(sequence)
        return list(map(_end_of, sequences))

    def _forget(self, sequence: Sequence) -> None:
        self._tables.pop(sequence.seq_id, None)
        self._changed.pop(sequence, None)


def _end_of(sequence: Sequence) -> tuple[int, str]:
    assert sequence.finish_reason is not None
    return sequence.seq_id, sequence.finish_reason


def _costs(costs: PreemptionCosts) -> dict[str, float]:
    return {"recompute_token_s": costs.recompute_token_s, "swap_block_s": costs.swap_block_s}


def _admitted(admitted: Admitted) -> tuple[int, str, int, int]:
    sequence, was, num_cached = admitted.sequence, admitted.was, admitted.num_cached_tokens
    return sequence.seq_id, was.value, num_cached, admitted.num_host_tokens


def _forked(batch: ScheduledBatch) -> Iterator[tuple[int, int]]:
    for parent, forks in batch.forks.items():
        for child in forks:
            yield child.seq_id, parent.seq_id


def _preempted(preempted: Preempted) -> PreemptedRecord:
    return {
        "sequence": preempted.sequence.seq_id,
        "by": preempted.by.value,
        "needed_by": None if preempted.needed_by is None else preempted.needed_by.seq_id,
        "num_computed_tokens": preempted.num_computed_tokens,
        "recompute_s": preempted.recompute_s,
        "swap_s": preempted.swap_s,
    }


class StepLogFile:
    """A file that gets one line of JSON for each record.

    is_live: each line is in the file at once, so that what happened is known however the process ends.
    """

    def __init__(self, path: str, is_live: bool = True) -> None:
        self._is_live = is_live
        try:
            self._file = open(path, "wb", _BUFFER_BYTES)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"step_log: {path}: {error.strerror}, expected a file to write to") from error

    def write(self, record: StepRecord) -> None:
        """Appends a record. Raises `OSError`."""
        self._file.write(orjson.dumps(record, option=_LINE))
        if self._is_live:
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class LiveStepLog:
    """The log of an engine at work. That it cannot be written is said once, and stops no request."""

    def __init__(self, loop: StepLoop, file: StepLogFile, config: CompleteConfig) -> None:
        self.file = file
        self._loop = loop
        self._path = config.step_log
        self._is_open = True
        self._recorder = StepRecorder(loop.scheduler, self._write, config)
        loop.listen(self._recorder)

    def close(self, said: bool = False) -> None:
        """Ends the log. said: that it cannot be written is known."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.ignore(self._recorder)
        try:
            self.file.close()
        except OSError as error:
            if not said:
                say(f"step_log: {self._path}: {error.strerror}")

    def _write(self, record: StepRecord) -> None:
        try:
            self.file.write(record)
        except OSError as error:
            say(f"step_log: {self._path}: {error.strerror}; it ends here")
            self.close(said=True)
