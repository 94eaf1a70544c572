"""What a scheduler did, step by step: a plain record of each step, and a file of them as JSON lines.

Built from the batch and the scheduler alone, so that a simulated run gives the same records as a real one.
Nothing of this runs unless somebody asks for it.
"""

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from pagellm.engine.config import CompleteConfig
from pagellm.engine.errors import ConfigError
from pagellm.engine.scheduling.scheduler import ScheduledBatch, Scheduler
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus

StepRecord = dict[str, Any]
# Settings of which no decision of a scheduler follows: num_swap_blocks says what swap_dir comes to.
NO_DECISIONS = ("swap_dir", "step_log", "num_threads", "quantization")


class StepRecorder:
    """Makes the records of one scheduler's steps. The record of a step:

    step: its number. start_s: when it was scheduled, on the scheduler's clock. transfer_s, duration_s: what
    moving blocks, and all of it, took.
    added, ended: sequences taken in since the step before, and those that ended otherwise than in `finished`.
    scheduled: [sequence, tokens computed before, tokens computed now, whether a token was sampled].
    admitted: [sequence, the state it waited in, tokens the prefix cache had].
    preempted: who made way for whom, how, and the seconds that either way was expected to cost.
    forked: [sequence, the one whose blocks it shares].
    tables: [sequence, first changed index, blocks from there on] of each scheduled sequence whose block table
    is not what it was when it was recorded last.
    transfers: block contents moved, by kind. finished: [sequence, reason].
    costs: what the scheduler expected preemption to cost, in seconds for a token and for a block.
    running, waiting, swapped: sequences when the step was scheduled. blocks: used, free, shared (references
    beyond the first), unwritten_slots (allocated and not computed yet), swap_used. cache: tokens of prompts
    looked up, found and forgotten since the start.
    config, in the first record: the settings that decisions follow from, with nothing left open.
    """

    def __init__(self, scheduler: Scheduler, config: CompleteConfig | None = None) -> None:
        self._scheduler = scheduler
        self._config = config
        self._num_steps = 0
        self._added: list[StepRecord] = []
        self._ended: list[list[Any]] = []
        self._tables: dict[int, list[int]] = {}  # as recorded last, by seq_id

    def added(self, sequence: Sequence) -> None:
        """A sequence was taken in."""
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
        """A sequence ended without `commit`: aborted, or cut at a stop string."""
        self._ended.append([sequence.seq_id, sequence.finish_reason])
        self._tables.pop(sequence.seq_id, None)

    def scheduled(self, batch: ScheduledBatch) -> StepRecord:
        """The record of a batch that was just scheduled, before anything of it is done."""
        scheduler = self._scheduler
        waiting = list(scheduler.waiting)
        record: StepRecord = {
            "step": self._num_steps,
            "start_s": scheduler.stats.now,
            "transfer_s": 0.0,
            "duration_s": 0.0,
            "added": self._added,
            "ended": self._ended,
            "scheduled": [
                [sequence.seq_id, sequence.num_computed_tokens, count, samples]
                for sequence, count, samples in zip(
                    batch.sequences, batch.num_new_tokens, batch.samples, strict=True
                )
            ],
            "admitted": [[a.sequence.seq_id, a.was.value, a.num_cached_tokens] for a in batch.admitted],
            "preempted": [
                {
                    "sequence": p.sequence.seq_id,
                    "by": p.by.value,
                    "needed_by": p.needed_by.seq_id,
                    "num_computed_tokens": p.num_computed_tokens,
                    "recompute_s": p.recompute_s,
                    "swap_s": p.swap_s,
                }
                for p in batch.preempted
            ],
            "forked": [
                [child.seq_id, parent.seq_id] for parent, forks in batch.forks.items() for child in forks
            ],
            "tables": self._changed_tables(batch),
            "transfers": dict(Counter(transfer.kind.value for transfer in batch.transfers)),
            "finished": [],
            "costs": asdict(scheduler.costs),
            "running": len(scheduler.running),
            "waiting": sum(sequence.status is SequenceStatus.WAITING for sequence in waiting),
            "swapped": sum(sequence.status is SequenceStatus.SWAPPED for sequence in waiting),
            "blocks": scheduler.block_manager.usage(),
            "cache": asdict(scheduler.block_manager.stats),
        }
        if self._num_steps == 0 and self._config is not None:
            settings = asdict(self._config)
            record["config"] = {name: settings[name] for name in settings if name not in NO_DECISIONS}
        self._num_steps += 1
        self._added, self._ended = [], []
        return record

    def finished(self, record: StepRecord, sequences: list[Sequence]) -> None:
        """Completes a record with what `commit` returned."""
        record["finished"] = [[sequence.seq_id, sequence.finish_reason] for sequence in sequences]
        for sequence in sequences:
            self._tables.pop(sequence.seq_id, None)

    def _changed_tables(self, batch: ScheduledBatch) -> list[list[Any]]:
        changed = []
        for sequence in batch.sequences:
            before, table = self._tables.get(sequence.seq_id, []), sequence.block_table
            if before != table:
                same = next(
                    (i for i, (a, b) in enumerate(zip(before, table, strict=False)) if a != b),
                    min(len(before), len(table)),
                )
                changed.append([sequence.seq_id, same, table[same:]])
                self._tables[sequence.seq_id] = list(table)
        return changed


class StepLogFile:
    """A file that gets one line of JSON for each record."""

    def __init__(self, path: str) -> None:
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"step_log: {path}: {error.strerror}, expected a file to write to") from error

    def write(self, record: StepRecord) -> None:
        """Appends a record. Raises `OSError`."""
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
