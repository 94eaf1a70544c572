"""Which tokens run in the next step: one budget for prefill chunks and decodes, first come first served.

A pure state machine, driven by the engine and by the simulator through the same calls: `add`, `schedule`,
`commit` and `abort`. It knows no clock, no text and no arrays. A sequence is admitted when all of its tokens
fit into free blocks; when a running one needs a block and none is free, the youngest running sequence is
preempted: it gives its blocks back, waits at the head of the queue, and is computed again (most of it is then
still in the prefix cache).
"""

from collections import deque
from dataclasses import dataclass, field

from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.errors import RequestError
from engine.outputs import FinishReason
from engine.sequence import Sequence, SequenceStatus


@dataclass
class ScheduledBatch:
    """The work of one step: of each sequence the next so many tokens after its computed ones."""

    sequences: list[Sequence] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(
        default_factory=list
    )  # whether that reaches the last token: the next is sampled
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(self.num_new_tokens)


class Scheduler:
    """Owns the queues: every sequence it was given is waiting, running or finished, in order of arrival."""

    def __init__(self, config: EngineConfig, block_manager: BlockManager) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.max_len = min(
            config.max_model_len or config.capacity_tokens,
            block_manager.num_blocks * block_manager.block_size,
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_unfinished(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Takes a new sequence in. Raises `RequestError` if its prompt could never be computed."""
        length = sequence.num_tokens
        if length == 0:
            raise RequestError("prompt: found no tokens, expected at least one")
        if length > self.max_len:
            raise RequestError(
                f"prompt: found {length} tokens, expected at most {self.max_len}, what max_model_len and the "
                "KV cache allow"
            )
        max_tokens = sequence.sampling_params.max_tokens
        # A prompt that fills everything still gives one token, which needs no slot of its own.
        sequence.max_len = self.max_len if max_tokens is None else min(length + max_tokens, self.max_len)
        self.waiting.append(sequence)

    def schedule(self) -> ScheduledBatch:
        """Chooses the next step's work and gives it its blocks. `commit` must follow before the next call."""
        batch = ScheduledBatch()
        budget = self._continue_running(batch, self.max_num_batched_tokens)
        if not batch.preempted:
            self._admit_waiting(batch, budget)
        return batch

    def commit(self, batch: ScheduledBatch, token_ids: list[int]) -> list[Sequence]:
        """Takes note that a batch has been computed; returns the sequences that this finished.

        token_ids: one for each sequence whose tokens are now all computed (`batch.samples`), in order.
        Sequences that were aborted since `schedule` are passed over.
        """
        finished = []
        sampled = iter(token_ids)
        for sequence, count, samples in zip(
            batch.sequences, batch.num_new_tokens, batch.samples, strict=True
        ):
            token_id = next(sampled) if samples else None
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            sequence.num_computed_tokens += count
            self.block_manager.register(sequence)
            if token_id is not None:
                sequence.token_ids.append(token_id)
                reason = self._finish_reason(sequence, token_id)
                if reason is not None:
                    self._finish(sequence, reason)
                    finished.append(sequence)
        if finished:
            self.running = [s for s in self.running if s.status is SequenceStatus.RUNNING]
        return finished

    def abort(self, sequence: Sequence, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends a sequence that was added, whatever state it is in; a finished one stays as it is."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._finish(sequence, reason)

    def check(self) -> None:
        """Asserts that queues, states and blocks agree."""
        self.block_manager.check()
        assert len(self.running) <= self.max_num_seqs
        assert all(s.status is SequenceStatus.RUNNING and s.block_table for s in self.running)
        assert all(s.status is SequenceStatus.WAITING and not s.block_table for s in self.waiting)
        held = {block for s in self.running for block in s.block_table}
        assert len(held) + self.block_manager.num_free_blocks == self.block_manager.num_blocks

    def _continue_running(self, batch: ScheduledBatch, budget: int) -> int:
        """Schedules running sequences, oldest first, preempting the youngest for blocks; returns the rest."""
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            while not self.block_manager.can_grow(sequence):
                victim = self.running.pop()
                self._preempt(victim, batch)
                if victim is sequence:
                    return budget
            self.block_manager.grow(sequence)
            budget -= self._schedule(sequence, batch, budget)
            index += 1
        return budget

    def _admit_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            prefix = self.block_manager.cached_prefix(sequence)
            if not self.block_manager.can_allocate(sequence, prefix):
                return
            self.waiting.popleft()
            self.block_manager.allocate(sequence, prefix)
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            budget -= self._schedule(sequence, batch, budget)

    def _schedule(self, sequence: Sequence, batch: ScheduledBatch, budget: int) -> int:
        remaining = len(sequence.token_ids) - sequence.num_computed_tokens
        count = min(remaining, budget)
        batch.sequences.append(sequence)
        batch.num_new_tokens.append(count)
        batch.samples.append(count == remaining)
        return count

    def _preempt(self, sequence: Sequence, batch: ScheduledBatch) -> None:
        self.block_manager.free(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)
        batch.preempted.append(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.block_manager.free(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if (
            token_id in sequence.stop_token_ids
            and sequence.num_output_tokens > sequence.sampling_params.min_tokens
        ):
            return FinishReason.STOP
        if len(sequence.token_ids) >= sequence.max_len:
            return FinishReason.LENGTH
        return None
