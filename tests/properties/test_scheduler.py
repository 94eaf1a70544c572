"""Laws 1, 4, 5 and 6 of the scheduler: fair, within its budget, and nothing that was accepted is lost.

A state machine adds, schedules, commits and aborts in any order on caches that are far too small. Between
`schedule` and `commit` it stands in for the model: each scheduled slot of a simulated memory is written with
the whole prefix that its keys and values would depend on, after all that the step reads has been checked.
Each operation is done to two schedulers, which must agree: the schedule is a function of the operations.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_manager import BlockManager, chained_hash
from engine.config import EngineConfig
from engine.errors import RequestError
from engine.outputs import FinishReason
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch, Scheduler
from engine.sequence import Sequence, SequenceStatus

Tokens = tuple[int, ...]

EOS, STOP = 2, 3
MOST_ALIVE = 8


def two_bits(previous: int, tokens: bytes) -> int:
    """Collides all the time, but tells some blocks apart."""
    return chained_hash(previous, tokens) & 3


@dataclass(frozen=True)
class Before:
    """What `schedule` found: copies that it cannot change."""

    running: list[Sequence]
    waiting: list[Sequence]
    tables: dict[Sequence, list[int]]
    remaining: dict[Sequence, int]


@dataclass
class Served:
    """One scheduler, and the memory that its batches are computed in."""

    config: EngineConfig
    hash_block: Callable[[int, bytes], int]
    sequences: dict[int, Sequence] = field(default_factory=dict)  # all that were accepted, by seq_id

    def __post_init__(self) -> None:
        assert self.config.num_blocks is not None
        self.manager = BlockManager(
            self.config.num_blocks,
            self.config.block_size,
            self.config.enable_prefix_caching,
            self.hash_block,
        )
        self.scheduler = Scheduler(self.config, self.manager)
        self.memory: list[list[Tokens | None]] = [
            [None] * self.config.block_size for _ in range(self.config.num_blocks)
        ]

    def check(self) -> None:
        """The scheduler's own check, and the order of arrival in both queues together."""
        self.scheduler.check()
        queue = [*self.scheduler.running, *self.scheduler.waiting]
        ids = [sequence.seq_id for sequence in queue]
        assert ids == sorted(ids), "somebody was overtaken"
        alive = [s.seq_id for s in self.sequences.values() if s.status is not SequenceStatus.FINISHED]
        assert ids == alive, "an accepted sequence is in no queue"

    def schedule(self) -> ScheduledBatch:
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        before = Before(
            running,
            waiting,
            {s: list(s.block_table) for s in running},
            {s: s.num_tokens - s.num_computed_tokens for s in running},
        )
        batch = self.scheduler.schedule()
        self._check_schedule(batch, before)
        return batch

    def run(self, batch: ScheduledBatch) -> None:
        """What a runner does with a batch: read all that came before each chunk, write the chunk."""
        written: set[tuple[int, int]] = set()
        for sequence, count in zip(batch.sequences, batch.num_new_tokens, strict=True):
            start = sequence.num_computed_tokens
            for position in range(start, start + count):
                block, slot = self._slot(sequence, position)
                assert (block, slot) not in written, "two sequences write to one slot"
                written.add((block, slot))
                self.memory[block][slot] = tuple(sequence.token_ids[: position + 1])
        # The kernels write all new slots of a layer before they read: nothing written may disturb a reader.
        for sequence, count in zip(batch.sequences, batch.num_new_tokens, strict=True):
            for position in range(sequence.num_computed_tokens + count):
                block, slot = self._slot(sequence, position)
                own = tuple(sequence.token_ids[: position + 1])
                assert self.memory[block][slot] == own, f"wrong KV at position {position} of {sequence}"

    def commit(self, batch: ScheduledBatch, tokens: list[int]) -> list[Sequence]:
        """Commits; each sequence must get exactly its token, and the end that follows from its request."""
        sampled = dict(zip(compress(batch.sequences, batch.samples), tokens, strict=True))
        aborted = {s for s in batch.sequences if s.status is SequenceStatus.FINISHED}
        expected_tokens = {s: list(s.token_ids) for s in batch.sequences}
        expected_computed = {
            s: s.num_computed_tokens + n for s, n in zip(batch.sequences, batch.num_new_tokens, strict=True)
        }
        finished = self.scheduler.commit(batch, tokens)
        for sequence in batch.sequences:
            if sequence in aborted:
                assert sequence.token_ids == expected_tokens[sequence]
                assert sequence not in finished
                continue
            if sequence in sampled:
                expected_tokens[sequence].append(sampled[sequence])
            assert sequence.token_ids == expected_tokens[sequence]
            reason = self.expected_reason(sequence) if sequence in sampled else None
            assert sequence.finish_reason == reason
            assert (sequence in finished) == (reason is not None)
            if reason is None:
                assert sequence.num_computed_tokens == expected_computed[sequence]
                self._check_computed_blocks_are_found(sequence)
        return finished

    def expected_reason(self, sequence: Sequence) -> FinishReason | None:
        """What a sequence that just got a token must end with."""
        params, outputs = sequence.sampling_params, sequence.num_output_tokens
        stops = {STOP} & set(params.stop_token_ids) | ({EOS} if not params.ignore_eos else set())
        if outputs > params.min_tokens and sequence.token_ids[-1] in stops:
            return FinishReason.STOP
        if sequence.num_tokens >= self.longest(sequence):
            return FinishReason.LENGTH
        return None

    @property
    def limit(self) -> int:
        """Tokens that a sequence may have."""
        capacity = self.config.capacity_tokens
        return min(capacity, self.config.max_model_len or capacity)

    def longest(self, sequence: Sequence) -> int:
        """Tokens that a sequence has at most when it ends; a prompt always gives one."""
        wanted = sequence.sampling_params.max_tokens
        by_length = max(self.limit, sequence.num_prompt_tokens + 1)
        return by_length if wanted is None else min(by_length, sequence.num_prompt_tokens + wanted)

    def _check_schedule(self, batch: ScheduledBatch, before: Before) -> None:
        continued, preempted, budget = self._expected_of_running(before)
        assert list(zip(batch.sequences, batch.num_new_tokens, strict=True))[: len(continued)] == continued
        assert batch.preempted == preempted
        admitted = batch.sequences[len(continued) :]
        assert admitted == before.waiting[: len(admitted)]
        assert not (admitted and preempted), "what was taken from one was given to a later one"
        for sequence, count in list(zip(batch.sequences, batch.num_new_tokens, strict=True))[
            len(continued) :
        ]:
            assert count == min(budget, sequence.num_tokens - sequence.num_computed_tokens)
            if not self.config.enable_prefix_caching or not sequence.reads_cache:
                assert sequence.num_computed_tokens == 0
            budget -= count
        assert batch.sequences or not (before.running or before.waiting), "a step without work"
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        assert all(count > 0 for count in batch.num_new_tokens)
        for sequence, count, samples in zip(
            batch.sequences, batch.num_new_tokens, batch.samples, strict=True
        ):
            assert samples == (sequence.num_computed_tokens + count == sequence.num_tokens)
            assert count <= sequence.num_tokens - sequence.num_computed_tokens
        assert self.scheduler.running == [s for s in before.running if s not in preempted] + admitted
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        if not preempted and budget and len(self.scheduler.running) < self.config.max_num_seqs:
            self._check_nobody_waits_in_vain()

    def _expected_of_running(self, before: Before) -> tuple[list[tuple[Sequence, int]], list[Sequence], int]:
        """Oldest first within the budget; the youngest makes way for a block, if need be for itself."""
        tables = {sequence: list(table) for sequence, table in before.tables.items()}
        running, preempted = list(before.running), []
        continued: list[tuple[Sequence, int]] = []
        budget = self.config.max_num_batched_tokens
        for sequence in before.running:
            if budget == 0 or sequence not in running:
                break
            if len(tables[sequence]) * self.config.block_size < sequence.num_tokens:
                while sequence in running and len(set().union(*tables.values())) == self.manager.num_blocks:
                    preempted.append(running.pop())
                    del tables[preempted[-1]]
                if sequence not in running:
                    break
                tables[sequence].append(-1 - sequence.seq_id)
            continued.append((sequence, min(budget, before.remaining[sequence])))
            budget -= continued[-1][1]
        return continued, preempted, budget

    def _check_nobody_waits_in_vain(self) -> None:
        """With budget and places left, the first in the queue waits only for blocks."""
        if self.scheduler.waiting:
            sequence = self.scheduler.waiting[0]
            assert -(-sequence.num_tokens // self.config.block_size) > self.manager.num_free_blocks
            assert not self.manager.can_allocate(sequence, self.manager.cached_prefix(sequence))

    def _check_computed_blocks_are_found(self, sequence: Sequence) -> None:
        """Another one that begins alike hits all full blocks, unless hashes collide."""
        alike = Sequence(10**6, [*sequence.token_ids[: sequence.num_computed_tokens], 0], SamplingParams())
        full = sequence.num_computed_tokens // self.config.block_size
        if not self.config.enable_prefix_caching:
            assert self.manager.cached_prefix(alike) == []
        elif self.hash_block is chained_hash:
            assert self.manager.cached_prefix(alike) == sequence.block_table[:full]

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        index, slot = divmod(position, self.config.block_size)
        return sequence.block_table[index], slot


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    block_size = draw(st.integers(1, 4))
    num_blocks = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 10, 12]))
    return EngineConfig(
        block_size=block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=draw(st.sampled_from([True, True, False])),
        max_num_seqs=draw(st.sampled_from([1, 2, 3, 4, 5, 5])),
        max_num_batched_tokens=draw(st.integers(1, 12)),
        max_model_len=draw(st.none() | st.integers(1, block_size * num_blocks + 2)),
    )


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.none() | st.integers(1, 12))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, 2 if max_tokens is None else min(2, max_tokens))),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([(), (STOP,)])),
    )


prompts = st.lists(st.sampled_from([0, 0, 1, EOS]), max_size=12)
sampled_tokens = st.lists(st.sampled_from([0, 0, 0, 0, 0, 0, 1, 1, EOS, STOP]), min_size=5, max_size=5)
picks = st.integers(0, 10**6)
mostly = st.sampled_from([True, True, True, False])


class SchedulerMachine(RuleBasedStateMachine):
    """Two schedulers that are told the same, in every order that the calls allow."""

    def __init__(self) -> None:
        super().__init__()
        self.next_seq_id = 0
        self.batches: list[ScheduledBatch] | None = None  # between schedule and commit: one of each scheduler

    @initialize(config=configs(), hash_block=st.sampled_from([chained_hash, chained_hash, two_bits]))
    def configure(self, config: EngineConfig, hash_block: Callable[[int, bytes], int]) -> None:
        self.twins = [Served(config, hash_block), Served(config, hash_block)]

    @precondition(lambda self: self._num_alive() < MOST_ALIVE)
    @rule(arrivals=st.lists(st.tuples(prompts, params()), min_size=1, max_size=4), reads_cache=mostly)
    def add(self, arrivals: list[tuple[list[int], SamplingParams]], reads_cache: bool) -> None:
        for prompt, params in arrivals:
            self._add(prompt, params, reads_cache)

    @precondition(lambda self: self.twins[0].sequences and self._num_alive() < MOST_ALIVE)
    @rule(pick=picks, length=st.integers(1, 12), params=params())
    def add_with_the_beginning_of_another(self, pick: int, length: int, params: SamplingParams) -> None:
        sequences = list(self.twins[0].sequences.values())
        self._add(sequences[pick % len(sequences)].token_ids[:length], params, True)

    @precondition(lambda self: self.batches is None)
    @rule()
    def schedule_and_run(self) -> None:
        self._schedule_and_run()

    @precondition(lambda self: self.batches is not None)
    @rule(tokens=sampled_tokens)
    def commit(self, tokens: list[int]) -> None:
        self._commit(tokens)

    @precondition(lambda self: self.twins[0].scheduler.has_unfinished)
    @rule(token_lists=st.lists(sampled_tokens, min_size=1, max_size=4))
    def some_steps(self, token_lists: list[list[int]]) -> None:
        """Steps as an engine takes them, so that sequences get somewhere."""
        for tokens in token_lists:
            if self.batches is None:
                self._schedule_and_run()
            self._commit(tokens)

    @precondition(lambda self: self.twins[0].sequences)
    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        """Whether it waits, runs, was preempted, has finished, or is being computed right now."""
        seq_id = list(self.twins[0].sequences)[pick % len(self.twins[0].sequences)]
        for twin in self.twins:
            sequence = twin.sequences[seq_id]
            ended = sequence.finish_reason
            tokens = list(sequence.token_ids)
            twin.scheduler.abort(sequence)
            assert sequence.status is SequenceStatus.FINISHED
            assert sequence.finish_reason == ended or (ended is None and sequence.finish_reason == "abort")
            assert sequence.token_ids == tokens
            assert sequence.block_table == []

    @rule()
    def abort_a_stranger(self) -> None:
        """One that was never accepted is refused or ignored; the invariants see that no one else notices."""
        for twin in self.twins:
            with contextlib.suppress(ValueError):
                twin.scheduler.abort(Sequence(10**6, [0], SamplingParams()))

    @invariant()
    def queues_and_blocks_agree(self) -> None:
        for twin in self.twins:
            twin.check()

    @invariant()
    def the_twins_agree(self) -> None:
        a, b = (
            [
                (s.seq_id, s.token_ids, s.block_table, s.num_computed_tokens, s.status, s.finish_reason)
                for s in twin.sequences.values()
            ]
            for twin in self.twins
        )
        assert a == b

    def teardown(self) -> None:
        """Nothing accepted is lost: the oldest computes a token in every step, so all end within a bound."""
        if not hasattr(self, "twins"):
            return
        if self.batches is not None:
            self._commit([0] * 5)
        twin = self.twins[0]
        most_steps = sum(
            twin.longest(s) for s in twin.sequences.values() if s.status is not SequenceStatus.FINISHED
        )
        for _ in range(most_steps):
            if not twin.scheduler.has_unfinished:
                break
            self._schedule_and_run()
            self._commit([0] * 5)
            self.queues_and_blocks_agree()
        self.the_twins_agree()
        for twin in self.twins:
            assert not twin.scheduler.has_unfinished
            assert twin.manager.num_free_blocks == twin.manager.num_blocks
            assert all(s.status is SequenceStatus.FINISHED for s in twin.sequences.values())
            assert all(s.finish_reason is not None for s in twin.sequences.values())

    def _num_alive(self) -> int:
        return len(self.twins[0].scheduler.waiting) + len(self.twins[0].scheduler.running)

    def _add(self, prompt: list[int], params: SamplingParams, reads_cache: bool) -> None:
        """Takes a sequence in, or refuses it at the door and nobody notices."""
        for twin in self.twins:
            sequence = Sequence(self.next_seq_id, prompt, params, frozenset({EOS}), reads_cache)
            if 1 <= len(prompt) <= twin.limit:
                twin.scheduler.add(sequence)
                twin.sequences[sequence.seq_id] = sequence
                assert twin.scheduler.waiting[-1] is sequence
            else:
                with pytest.raises(RequestError, match=f"prompt: found {len(prompt) or 'no'} tokens"):
                    twin.scheduler.add(sequence)
        self.next_seq_id += 1

    def _schedule_and_run(self) -> None:
        batches = []
        for twin in self.twins:
            batch = twin.schedule()
            twin.check()
            twin.run(batch)
            batches.append(batch)
        a, b = (
            ([s.seq_id for s in x.sequences], x.num_new_tokens, x.samples, [s.seq_id for s in x.preempted])
            for x in batches
        )
        assert a == b, "the same operations gave another schedule"
        self.batches = batches

    def _commit(self, tokens: list[int]) -> None:
        assert self.batches is not None
        for twin, batch in zip(self.twins, self.batches, strict=True):
            twin.commit(batch, tokens[: sum(batch.samples)])
        self.batches = None


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=300, stateful_step_count=40)
