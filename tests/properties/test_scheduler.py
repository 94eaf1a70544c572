"""Laws 1, 4, 5 and 6 of the scheduler: in its policy's order, within its budget, and nothing is lost.

A state machine adds, forks, schedules, commits and aborts in any order on caches far too small, under
every policy, also such as answer nonsense. It does the transfers in order, some
of which fail, and writes each scheduled slot of a simulated memory with the whole prefix that its keys and
values would depend on. What each step must hold is worked out anew from what the sequences say of themselves.
Each operation is done to two schedulers, which must agree: the schedule is a function of the operations.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition

from pagellm.engine.config import CompleteConfig, EngineConfig
from pagellm.engine.errors import PolicyError, RequestError
from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import Preempted, Preemption, PreemptionCosts, ScheduledBatch
from pagellm.engine.scheduling.block_manager import BlockManager, TransferKind, chained_hash
from pagellm.engine.scheduling.policies import POLICIES
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import GIVEN_BACK, Sequence, SequenceStatus
from tests.properties import policies
from tests.properties.covered import covered, rule
from tests.properties.memory import Memory, two_bits

EOS, STOP = 2, 3
MOST_ALIVE = 10

WAITING, RUNNING, SWAPPED, FINISHED = SequenceStatus

Work = list[tuple[Sequence, int]]


@dataclass
class Side:
    """One of the two schedulers, and its sequences by seq_id: all that were accepted."""

    config: CompleteConfig
    hash_block: Callable[[int, bytes], int]
    sequences: dict[int, Sequence] = field(default_factory=dict)
    num_policy_errors: int = 0

    def __post_init__(self) -> None:
        self.manager = BlockManager(
            self.config.num_blocks,
            self.config.block_size,
            self.config.enable_prefix_caching,
            self.config.num_swap_blocks,
            self.hash_block,
            self.config.window,
            self.config.enable_hierarchical_cache,
        )
        self.scheduler = Scheduler(self.config, self.manager)

    def state(self) -> list[tuple[object, ...]]:
        return [
            (s.seq_id, s.token_ids, s.block_table, s.swap_table, s.num_computed_tokens, s.status)
            for s in self.sequences.values()
        ]

    def check(self) -> None:
        self.scheduler.check()
        self.waiting = list(self.scheduler.waiting)  # which asks the policy, hence on both sides alike
        try:
            self.scheduler.policies.raise_error()
        except PolicyError:
            self.num_policy_errors += 1


class Rules:
    """What must happen, worked out from the sequences alone: whose turn it is, who makes way, who fits.

    Knows nothing of the scheduler's queues. Where the policy is none of the product's, its choices are taken
    from the batch, and all that they leave open is held to the rules.
    """

    def __init__(self, side: Side) -> None:
        self.side, self.config, self.manager = side, side.config, side.manager
        self.policy = self.config.policy
        self.is_known = self.policy in POLICIES
        self.costs = PreemptionCosts()
        self.preemption = self.config.preemption  # until a transfer fails
        self.arrival: dict[int, tuple[int, float]] = {}  # by seq_id: number and time
        self.begins_like: dict[int, int] = {}  # by seq_id of a fork that has not begun: whom it waits for
        self.served: Counter[str] = Counter()  # what each tenant has cost
        self.ended_last: list[Sequence] = []

    def alive(self) -> list[Sequence]:
        return [s for s in self.side.sequences.values() if s.status is not FINISHED]

    def waiting(self) -> list[Sequence]:
        return [
            s for s in self.alive() if s.status in (WAITING, SWAPPED) and s.seq_id not in self.begins_like
        ]

    @property
    def limit(self) -> int:
        """Tokens that a sequence may have."""
        return self.config.max_model_len

    def longest(self, sequence: Sequence) -> int:
        """Tokens of prompt and output at most. One that a full prompt gives has no place in the cache."""
        wanted = sequence.sampling_params.max_tokens
        return self.limit if wanted is None else min(self.limit, sequence.num_prompt_tokens + wanted)

    def blocks_for(self, num_tokens: int) -> int:
        return len(range(0, num_tokens, self.config.block_size))

    def behind(self, num_computed: int) -> int:
        """Leading blocks that no token from the last full block's end on sees; the last full one is kept."""
        size, full = self.config.block_size, num_computed // self.config.block_size
        ends = range(size, full * size, size)
        return sum(end <= full * size - self.config.window + 1 for end in ends) if self.config.window else 0

    def held(self, num_computed: int) -> int:
        """Blocks of so many computed tokens that are not behind the window."""
        return self.blocks_for(num_computed) - self.behind(num_computed)

    @property
    def most_chunk(self) -> int:
        """Tokens of one sequence in one step at most."""
        return min(self.config.max_prefill_chunk, self.config.max_num_batched_tokens)

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens take at once: what is seen, and the longest chunk."""
        if not self.config.window:
            return self.blocks_for(num_tokens)
        seen = max(1, self.blocks_for(self.config.window - 1))
        return min(self.blocks_for(num_tokens), seen + 1 + self.blocks_for(self.most_chunk))

    def slots_next(self, sequence: Sequence, num_computed: int) -> int:
        """The tokens that a running sequence must have slots for."""
        if not self.config.window:
            return sequence.num_tokens
        return min(sequence.num_tokens, num_computed + self.most_chunk)

    def slots_at_first(self, sequence: Sequence, num_computed: int) -> int:
        """Those when it is admitted: all that it can ever fill, if it made way too often."""
        num_tokens = sequence.num_tokens
        if self.is_guaranteed(sequence):
            num_tokens = max(num_tokens, self.longest(sequence) - 1)
        if self.config.window:
            most = self.behind(num_computed) + self.most_blocks(num_tokens)
            num_tokens = min(num_tokens, most * self.config.block_size)
        return num_tokens

    def can_guarantee(self, sequence: Sequence, running: list[Sequence]) -> bool:
        """With a window, those that keep what they have must at any time find what each can ever need."""
        if not (self.config.window and self.is_guaranteed(sequence)):
            return True
        guaranteed = [s for s in running if self.is_guaranteed(s)]
        needs = (self.most_blocks(self.longest(s) - 1) for s in [sequence, *guaranteed])
        return sum(needs) <= self.config.num_blocks

    def accept(self, sequence: Sequence, forks: list[Sequence], now: float) -> None:
        for new in (sequence, *forks):
            tenant = new.sampling_params.tenant
            active = {s.sampling_params.tenant for s in self.alive()}
            if tenant not in active:
                others = active or {s.sampling_params.tenant for s in self.ended_last}
                least = min((self.served[other] for other in others), default=0)
                self.served[tenant] = max(self.served[tenant], least)
            self.arrival[new.seq_id] = len(self.arrival), now
            self.side.sequences[new.seq_id] = new
        for child in forks:
            self.begins_like[child.seq_id] = sequence.seq_id

    def abort(self, sequence: Sequence) -> None:
        """The next completion of its prompt takes the place of one that others wait for."""
        self.ended_last = [sequence]
        self.begins_like.pop(sequence.seq_id, None)
        forks = [child for child, parent in self.begins_like.items() if parent == sequence.seq_id]
        for child in forks[:1]:
            del self.begins_like[child]
        for child in forks[1:]:
            self.begins_like[child] = forks[0]

    def is_guaranteed(self, sequence: Sequence) -> bool:
        return sequence.num_preemptions >= self.config.max_preemptions

    def order(self, sequence: Sequence) -> tuple[float, int]:
        """The place in the policy's order, as the documentation has it."""
        number, time = self.arrival[sequence.seq_id]
        params = sequence.sampling_params
        if self.policy == "priority":
            return params.priority, number
        if self.policy == "shortest_job":
            return self.longest(sequence) + 100 * time, number
        if self.policy == "slo":
            return math.inf if params.deadline_s is None else time + params.deadline_s, number
        return 0, number

    def may_be_next(
        self, sequence: Sequence, waiting: list[Sequence], status: dict[Sequence, SequenceStatus]
    ) -> bool:
        """Whether it is its turn: those that made way too often, those swapped out, then the rest."""

        def rank(s: Sequence) -> int:
            return 0 if self.is_guaranteed(s) else 1 if status[s] is SWAPPED else 2

        peers = [s for s in waiting if rank(s) == rank(sequence)]
        if min(map(rank, waiting)) < rank(sequence):
            return False
        if not self.is_known:
            return True
        if self.policy == "fair" and rank(sequence) == 2:
            tenant = sequence.sampling_params.tenant
            if self.served[tenant] > min(self.served[s.sampling_params.tenant] for s in peers):
                return False
            peers = [s for s in peers if s.sampling_params.tenant == tenant]
        return sequence is min(peers, key=self.order)

    def victim(self, candidates: list[Sequence], reported: list[Preempted], index: int) -> Sequence:
        if not self.is_known:
            assert index < len(reported), "somebody had to make way"
            assert reported[index].sequence in candidates
            return reported[index].sequence
        if self.policy == "fair":
            return max(candidates, key=lambda s: (self.served[s.sampling_params.tenant], self.order(s)))
        return max(candidates, key=self.order)


@dataclass(frozen=True)
class Before:
    """What `schedule` found: copies that it cannot change."""

    running: list[Sequence]
    waiting: list[Sequence]
    tables: dict[Sequence, list[int]]
    remaining: dict[Sequence, int]
    computed: dict[Sequence, int]
    status: dict[Sequence, SequenceStatus]
    num_preemptions: dict[Sequence, int]
    cached: set[int]
    num_free_swap: int
    prefills_alone: bool


class Expected:
    """What a step does with those that run: exactly, and in which order."""

    def __init__(self, rules: Rules, before: Before, batch: ScheduledBatch) -> None:
        self.rules, self.before, self.batch = rules, before, batch
        self.running = list(before.running)
        self.tables = {s: list(table) for s, table in before.tables.items()}
        self.num_free_swap = before.num_free_swap
        self.budget = rules.config.max_num_batched_tokens
        self.decodes: Work = []
        self.prefills: Work = []
        self.preempted: list[tuple[Sequence, Preemption, Sequence, int]] = []
        self._new_blocks = count(GIVEN_BACK - 1, -1)
        decodes = [s for s in before.running if before.remaining[s] == 1]
        if not before.prefills_alone:
            self.make_room(decodes)
        self.make_room([s for s in before.running if before.remaining[s] > 1])
        if not before.prefills_alone:
            self.decode(decodes)
        self.prefill()
        if before.prefills_alone and not self.prefills and not batch.admitted:
            self.make_room(decodes)
            self.decode(decodes)

    @property
    def num_free(self) -> int:
        return self.rules.manager.num_blocks - len(set().union(*self.tables.values()) - {GIVEN_BACK})

    def decode(self, decodes: list[Sequence]) -> None:
        self.decodes = [(sequence, 1) for sequence in decodes if sequence in self.running]
        self.budget -= len(self.decodes)

    def make_room(self, sequences: list[Sequence]) -> None:
        """Each writes into blocks of its own; for those, others make way, at the worst itself."""
        for sequence in sequences:
            while sequence in self.running and self.num_needed(sequence) > self.num_free:
                candidates = [
                    s
                    for s in self.running
                    if self.before.num_preemptions[s] < self.rules.config.max_preemptions
                ]
                victim = self.rules.victim(candidates, self.batch.preempted, len(self.preempted))
                self.preempt(victim, sequence)
            if sequence in self.running:
                self.give_blocks(sequence)

    def num_needed(self, sequence: Sequence) -> int:
        slots = self.rules.slots_next(sequence, self.before.computed[sequence])
        missing = self.rules.blocks_for(slots) - len(self.tables[sequence])
        return max(0, missing) + self.needs_copy(sequence)

    def needs_copy(self, sequence: Sequence) -> bool:
        """Whether the first token to be computed lies in a block that others have or can find."""
        index = self.before.computed[sequence] // self.rules.config.block_size
        own = self.tables[sequence]
        if index == len(own):
            return False
        others = (table for s, table in self.tables.items() if s is not sequence)
        return own[index] in self.before.cached or any(own[index] in table for table in others)

    def give_blocks(self, sequence: Sequence) -> None:
        table = self.tables[sequence]
        if self.needs_copy(sequence):
            table[self.before.computed[sequence] // self.rules.config.block_size] = next(self._new_blocks)
        slots = self.rules.slots_next(sequence, self.before.computed[sequence])
        while len(table) < self.rules.blocks_for(slots):
            table.append(next(self._new_blocks))

    def preempt(self, victim: Sequence, needed_by: Sequence) -> None:
        computed = self.before.computed[victim]
        blocks = self.rules.held(computed)
        mode, costs = self.rules.preemption, self.rules.costs
        saves = 2 * blocks * costs.swap_block_s < computed * costs.recompute_token_s
        swaps = (mode == "swap" or (mode == "auto" and saves)) and 0 < blocks <= self.num_free_swap
        self.num_free_swap -= blocks * swaps
        by = Preemption.SWAP if swaps else Preemption.RECOMPUTE
        self.preempted.append((victim, by, needed_by, computed))
        self.running.remove(victim)
        del self.tables[victim]

    def prefill(self) -> None:
        for sequence in self.before.running:
            remaining = self.before.remaining[sequence]
            if remaining > 1 and sequence in self.running and self.budget:
                self.prefills.append((sequence, self.chunk(remaining)))
                self.budget -= self.prefills[-1][1]

    def chunk(self, remaining: int) -> int:
        return min(remaining, self.budget, self.rules.config.max_prefill_chunk)


class Driver:
    """Drives two schedulers that are told the same, and checks the first."""

    def __init__(self, config: CompleteConfig, hash_block: Callable[[int, bytes], int]) -> None:
        self.config = config
        self.collides = hash_block is two_bits
        self.sides = [Side(config, hash_block), Side(config, hash_block)]
        self.main = self.sides[0]
        self.scheduler, self.manager = self.main.scheduler, self.main.manager
        self.rules = Rules(self.main)
        self.memory = Memory(
            self.manager.num_blocks, config.block_size, config.num_swap_blocks, config.window
        )
        self.batches: list[ScheduledBatch] = []  # between schedule and commit: one of each scheduler
        self.ran = False
        self.was_reset = False
        self.now = 0.0

    def everywhere(self, do: Callable[[Side], None]) -> None:
        for side in self.sides:
            do(side)

    def add(self, seq_id: int, prompt: list[int], params: SamplingParams, reads_cache: bool) -> None:
        """Takes a sequence and its forks in, or refuses them at the door and nobody notices."""
        for side in self.sides:
            first, *forks = (
                Sequence(seq_id + i, prompt, params.of_completion(i), frozenset({EOS}), reads_cache)
                for i in range(params.n)
            )
            add = side.scheduler.add
            self._accept(first, forks, side, lambda s, forks=forks, add=add: add(s, self.now, forks))

    def fork(self, parent_id: int, child_id: int, tokens: list[int], params: SamplingParams) -> None:
        """Shares blocks where it can: what both begin with is computed, and there is a seat."""
        for side in self.sides:
            parent = side.sequences[parent_id]
            child = Sequence(child_id, tokens, params, frozenset({EOS}))
            seats = len(side.scheduler.running)
            shares = (
                len(tokens) > 1
                and parent.status is RUNNING
                and not self.rules.is_guaranteed(parent)
                and seats < min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
                and len(tokens) - 1 <= parent.num_computed_tokens
                and parent.token_ids[: len(tokens) - 1].tolist() == tokens[:-1]
                and parent.sampling_params.cache_salt == params.cache_salt
                and self.rules.behind(len(tokens) - 1) == self.rules.behind(parent.num_computed_tokens)
            )
            free = side.manager.num_free_blocks
            accepted = self._accept(
                child, [], side, lambda s, side=side, p=parent: side.scheduler.fork(p, s, self.now)
            )
            if accepted:
                assert (child.status is RUNNING) == shares
                assert side.manager.num_free_blocks == free, "sharing takes no block"
            if accepted and shares and side is self.main:
                self._check_shares(parent, child, len(tokens) - 1)

    def _accept(
        self, sequence: Sequence, forks: list[Sequence], side: Side, give: Callable[[Sequence], None]
    ) -> bool:
        length = sequence.num_tokens
        if not 1 <= length <= self.rules.limit:
            with pytest.raises(RequestError, match=f"prompt: found {length or 'no'} tokens"):
                give(sequence)
            return False
        if side is self.main:
            self.rules.accept(sequence, forks, self.now)
        for new in (sequence, *forks):
            side.sequences[new.seq_id] = new
        give(sequence)
        covered["sequences"] += side is self.main
        return True

    def abort(self, seq_id: int) -> None:
        for side in self.sides:
            sequence = side.sequences[seq_id]
            status, ended, tokens = sequence.status, sequence.finish_reason, list(sequence.token_ids)
            if side is self.main:
                if seq_id in self.rules.begins_like:
                    covered["aborts of a fork without a token"] += 1
                else:
                    covered[f"aborts of one {status.value}"] += 1
                if status is not FINISHED:
                    self.rules.abort(sequence)
            side.scheduler.abort(sequence)
            assert sequence.status is FINISHED
            assert sequence.finish_reason == (ended or "abort")
            assert list(sequence.token_ids) == tokens
            assert sequence.block_table == sequence.swap_table == []

    def schedule(self) -> None:
        before = self._before()
        self.batches = [side.scheduler.schedule(self.now, self.rules.costs) for side in self.sides]
        self.ran = False
        self._check_schedule(self.batches[0], before)
        assert self.memory.holds_what_the_cache_says(self.manager), "what is not computed is cached"
        a, b = (
            (
                [(s.seq_id, s.block_table) for s in batch.sequences],
                batch.num_new_tokens,
                batch.samples,
                [
                    (p.sequence.seq_id, p.by, p.needed_by.seq_id, p.num_computed_tokens)
                    for p in batch.preempted
                ],
                [(x.sequence.seq_id, x.was, x.num_cached_tokens, x.num_host_tokens) for x in batch.admitted],
                [(*t[:3], t.sequence and t.sequence.seq_id) for t in batch.transfers],
            )
            for batch in self.batches
        )
        assert a == b, "the same operations gave another schedule"

    def run(self, failures: list[bool]) -> None:
        """What a driver does with a batch: the transfers in order, some of which fail, then the tokens."""
        fails = cycle(failures)
        while self.manager.transfers:
            self._transfer(next(fails))
        batch = self.batches[0]
        written: set[tuple[int, int]] = set()
        for sequence, num_new in zip(batch.sequences, batch.num_new_tokens, strict=True):
            if sequence.status is FINISHED:
                continue
            start = sequence.num_computed_tokens
            for position in range(start, start + num_new):
                index, slot = divmod(position, self.config.block_size)
                assert (sequence.block_table[index], slot) not in written, "two sequences write to one slot"
                written.add((sequence.block_table[index], slot))
            self.memory.write(sequence, start, start + num_new)
        # The kernels write all new slots of a layer before they read: nothing written may disturb a reader.
        counts = dict(zip(batch.sequences, batch.num_new_tokens, strict=True))
        for sequence in self.scheduler.running:
            num_tokens = sequence.num_computed_tokens + counts.get(sequence, 0)
            assert self.memory.holds(sequence, num_tokens), f"wrong KV: {sequence}"
        self.ran = True

    def _transfer(self, fails: bool) -> None:
        """Does the next transfer; one that fails costs those who count on it what they had, and nobody else.

        From then on nothing is offloaded, and what is in the second tier is not found any more.
        """
        a, b = (side.manager.transfers[0] for side in self.sides)
        assert a[:3] == b[:3]
        self.memory.move(a, fails)
        covered["failed transfers" if fails else f"transfers: {a.kind.value}"] += 1
        for side, batch in zip(self.sides, self.batches, strict=True):
            transfer = side.manager.transfers[0]
            if not fails:
                side.manager.transferred()
                continue
            self.rules.preemption = "recompute"
            lost = [] if transfer.sequence is None else [transfer.sequence]
            if side.manager.offloads:
                targets = {t.target for t in side.manager.transfers if t.kind is TransferKind.LOAD}
                lost += [s for s in side.scheduler.running if targets & set(s.block_table) and s not in lost]
            before = [(list(s.token_ids), s.num_preemptions, s.status) for s in lost]
            side.scheduler.transfer_failed(transfer, batch)
            side.manager.transferred()
            assert not side.manager.offloads
            assert side.manager.num_offloaded_blocks == 0
            for sequence, (tokens, num_preemptions, status) in zip(lost, before, strict=True):
                assert (list(sequence.token_ids), sequence.num_preemptions) == (tokens, num_preemptions)
                if status is FINISHED:
                    assert sequence.status is FINISHED
                    continue
                assert (sequence.status, sequence.num_computed_tokens) == (WAITING, 0)
                assert sequence.block_table == sequence.swap_table == []
                assert sequence not in batch.sequences
                assert sequence not in batch.sampled
            side.check()

    def interrupt(self, num_transfers: int) -> None:
        """A step that is given up, after so many of its transfers: the next one goes on from there."""
        for _ in range(min(num_transfers, len(self.manager.transfers))):
            self._transfer(False)
        self.batches = []
        covered["interrupted steps"] += 1

    def recover(self, num_lost: int) -> None:
        """All of them wait anew, in their order, without the last tokens of their outputs."""
        kept = {s.seq_id: max(s.num_prompt_tokens, s.num_tokens - num_lost) for s in self.rules.alive()}
        tokens = {seq_id: list(self.main.sequences[seq_id].token_ids[:n]) for seq_id, n in kept.items()}
        self.batches = []
        for side in self.sides:
            side.scheduler.recover({side.sequences[seq_id]: n for seq_id, n in kept.items()})
        self.rules.begins_like.clear()
        self.rules.served.clear()
        self.rules.ended_last = []
        self.memory.forget_tokens(kept)
        for sequence in self.rules.alive():
            assert list(sequence.token_ids) == tokens[sequence.seq_id]
            assert (sequence.status, sequence.num_computed_tokens) == (WAITING, 0)
            assert sequence.block_table == sequence.swap_table == sequence.forks == []
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert self.manager.num_free_swap_blocks == self.manager.num_swap_blocks
        assert self.manager.num_cached_blocks == 0
        covered["recoveries"] += 1

    def commit(self, tokens: list[list[int]]) -> None:
        """Each sequence must get exactly its tokens, and the end that follows from its request."""
        batch = self.batches[0]
        given = list(islice(cycle(tokens), len(batch.sampled)))
        expected, steps = self._expected_commit(batch, given)
        num_tokens = {s: s.num_tokens for s in expected}
        finished = self.scheduler.commit(batch, given)
        assert self.sides[1].scheduler.commit(self.batches[1], given) is not finished
        self.batches = []
        assert [s for s, reason in steps if reason is not None] == finished
        self.rules.ended_last = finished[-1:] or self.rules.ended_last
        for sequence, (token_ids, computed) in expected.items():
            assert list(sequence.token_ids) == token_ids
            if sequence.status is RUNNING:
                assert sequence.num_computed_tokens == computed
        assert batch.num_output_tokens == sum(s.num_tokens - before for s, before in num_tokens.items())
        for sequence, reason in steps:
            assert sequence.finish_reason == reason
            if reason is not None:
                assert sequence.block_table == sequence.swap_table == []
        assert self.memory.holds_what_the_cache_says(self.manager), "what is not computed is cached"
        for sequence in self.scheduler.running:
            assert self.memory.holds(sequence, sequence.num_computed_tokens), f"wrong KV: {sequence}"
        self._check_computed_blocks_are_found()

    def _expected_commit(
        self, batch: ScheduledBatch, given: list[list[int]]
    ) -> tuple[dict[Sequence, tuple[list[int], int]], list[tuple[Sequence, FinishReason | None]]]:
        """Tokens and computed tokens of each, and how each that gets tokens goes on, in order."""
        expected: dict[Sequence, tuple[list[int], int]] = {}
        steps: list[tuple[Sequence, FinishReason | None]] = []
        tokens = iter(given)
        for sequence, num_new, samples in zip(
            batch.sequences, batch.num_new_tokens, batch.samples, strict=True
        ):
            gets = next(tokens) if samples else []
            served = num_new + 2 * len(gets)
            is_alive, computed = sequence.status is not FINISHED, sequence.num_computed_tokens + num_new
            for child in batch.forks.get(sequence, []) if samples else []:
                new = next(tokens)
                served += 2 * len(new)
                if self.rules.begins_like.get(child.seq_id) == sequence.seq_id:
                    del self.rules.begins_like[child.seq_id]
                    child_ids, reason = self._expected_end(child, new)
                    steps.append((child, reason))
                    expected[child] = child_ids, child.num_tokens
                    covered["forks"] += 1
            expected[sequence] = list(sequence.token_ids), computed
            if is_alive and samples:
                token_ids, reason = self._expected_end(sequence, gets)
                steps.append((sequence, reason))
                expected[sequence] = token_ids, computed
            self.rules.served[sequence.sampling_params.tenant] += served
        return expected, steps

    def _expected_end(self, sequence: Sequence, new: list[int]) -> tuple[list[int], FinishReason | None]:
        """Its tokens with the new ones up to one that ends it, and the reason."""
        token_ids, reason = list(sequence.token_ids), None
        for index, token in enumerate(new):
            token_ids.append(token)
            reason = self._expected_reason(sequence, token_ids)
            if reason is not None:
                covered["tokens behind an end"] += len(new) - index - 1
                break
        covered["several tokens at once"] += len(token_ids) > sequence.num_tokens + 1
        return token_ids, reason

    def _expected_reason(self, sequence: Sequence, token_ids: list[int]) -> FinishReason | None:
        """What a sequence that just got a token must end with."""
        params, outputs = sequence.sampling_params, len(token_ids) - sequence.num_prompt_tokens
        stops = {STOP} & set(params.stop_token_ids) | ({EOS} if not params.ignore_eos else set())
        if outputs > params.min_tokens and token_ids[-1] in stops:
            return FinishReason.STOP
        if len(token_ids) >= self.rules.longest(sequence):
            return FinishReason.LENGTH
        return None

    def check(self) -> None:
        """Each accepted sequence is in one place and its state says which; tables and tiers agree."""
        self.everywhere(Side.check)
        rules, alive = self.rules, self.rules.alive()
        to_begin = [s for s in alive if s.seq_id in rules.begins_like]
        running = [s for s in alive if s.status is RUNNING]
        assert len(self.scheduler.running) == len(running)
        assert set(self.scheduler.running) == set(running)
        waiting = self.main.waiting
        assert len(waiting) == len(alive) - len(running) - len(to_begin)
        assert set(waiting) == set(rules.waiting())
        assert self.scheduler.has_unfinished == bool(alive)
        assert all(s.num_preemptions <= self.config.max_preemptions for s in alive)
        if rules.is_known and rules.policy != "fair":
            status = {s: s.status for s in waiting}
            in_order = (rules.may_be_next(s, waiting[i:], status) for i, s in enumerate(waiting))
            assert all(in_order), "the queue is out of order"
        for sequence in alive:
            assert sequence.num_cached_tokens <= sequence.num_prompt_tokens
            parent = rules.begins_like.get(sequence.seq_id)
            assert parent is None or sequence in self.main.sequences[parent].forks
        is_sound = rules.is_known or rules.policy.rpartition(":")[2].startswith("Whimsical")
        assert all(side.num_policy_errors <= (not is_sound) for side in self.sides)

    def finish(self) -> None:
        """Nothing accepted is lost: each step computes a token or makes somebody wait, so all ends."""
        if self.batches:
            self.run([False])
            self.commit([[0]])
        most_steps = sum(
            (self.rules.longest(s) + 1) * (self.config.max_preemptions - s.num_preemptions + 1)
            for s in self.rules.alive()
        )
        for _ in range(most_steps):
            if not self.scheduler.has_unfinished:
                break
            self.schedule()
            self.run([False])
            self.commit([[0]])
        self.check()
        assert not self.scheduler.has_unfinished
        assert self.sides[0].state() == self.sides[1].state()
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert self.manager.num_free_swap_blocks == self.manager.num_swap_blocks
        assert not self.scheduler.waiting
        assert all(s.finish_reason is not None for s in self.main.sequences.values())
        covered["evictions"] += self.manager.stats.evictions // self.config.block_size
        covered["policies that went wrong"] += self.main.num_policy_errors
        most = max((s.num_preemptions for s in self.main.sequences.values()), default=0)
        covered["most preemptions of one"] = max(covered["most preemptions of one"], most)

    def _before(self) -> Before:
        running = list(self.scheduler.running)
        alive = self.rules.alive()
        return Before(
            running,
            self.rules.waiting(),
            {s: list(s.block_table) for s in running},
            {s: s.num_tokens - s.num_computed_tokens for s in running},
            {s: s.num_computed_tokens for s in alive},
            {s: s.status for s in alive},
            {s: s.num_preemptions for s in alive},
            set(self.manager._cache),
            self.manager.num_free_swap_blocks,
            self.scheduler.policies.prefills_alone,
        )

    def _check_schedule(self, batch: ScheduledBatch, before: Before) -> None:
        expected = Expected(self.rules, before, batch)
        work = list(zip(batch.sequences, batch.num_new_tokens, strict=True))
        continued = expected.decodes + expected.prefills
        assert work[: len(continued)] == continued
        reported = [(p.sequence, p.by, p.needed_by, p.num_computed_tokens) for p in batch.preempted]
        assert reported == expected.preempted
        for victim, by, _, computed in reported:
            assert victim.status is (SWAPPED if by is Preemption.SWAP else WAITING)
            assert victim.num_preemptions == before.num_preemptions[victim] + 1
            assert victim.num_computed_tokens == (computed if by is Preemption.SWAP else 0)
            covered[f"preemptions by {by.value}"] += 1
        self._check_admission(batch, before, expected, work[len(continued) :])
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        assert work or reported or not (before.running or before.waiting), "a step without work"
        for (sequence, num_new), samples in zip(work, batch.samples, strict=True):
            remaining = sequence.num_tokens - sequence.num_computed_tokens
            assert 1 <= num_new <= remaining
            assert num_new <= self.config.max_prefill_chunk
            assert samples == (num_new == remaining)
            forks = [c.seq_id for c in batch.forks.get(sequence, [])]
            begin = [c for c, parent in self.rules.begins_like.items() if parent == sequence.seq_id]
            assert forks == (begin if samples else [])
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        swaps = [t for t in batch.transfers if t.kind is TransferKind.SWAP_OUT]
        out = sum(self.rules.held(c) for _, by, _, c in reported if by is Preemption.SWAP)
        assert len(swaps) >= out, "content is given up before it is moved"

    def _check_admission(self, batch: ScheduledBatch, before: Before, expected: Expected, work: Work) -> None:
        admitted = [record.sequence for record in batch.admitted]
        assert admitted == [sequence for sequence, _ in work]
        assert not (admitted and batch.preempted), "what was taken from one was given to another"
        assert self.scheduler.running == expected.running + admitted
        waiting, budget = list(before.waiting), expected.budget
        for record, (sequence, num_new) in zip(batch.admitted, work, strict=True):
            assert self.rules.may_be_next(sequence, waiting, before.status), f"{sequence} overtook: {waiting}"
            waiting.remove(sequence)
            assert record.was is before.status[sequence]
            num_cached = record.num_cached_tokens
            assert num_cached % self.config.block_size == 0
            if record.was is SWAPPED:
                assert sequence.num_computed_tokens == before.computed[sequence]
                covered["swap-ins"] += 1
            else:
                assert sequence.num_computed_tokens == num_cached
                assert num_cached == 0 or (self.config.enable_prefix_caching and sequence.reads_cache)
            assert record.num_host_tokens <= num_cached
            covered["cache hits"] += num_cached > 0
            covered["hits in the second tier"] += record.num_host_tokens > 0
            covered["cache hits under colliding hashes"] += num_cached > 0 and self.collides
            remaining = sequence.num_tokens - sequence.num_computed_tokens
            assert num_new == min(remaining, budget, self.config.max_prefill_chunk)
            budget -= num_new
            slots = self.rules.slots_at_first(sequence, sequence.num_computed_tokens)
            assert len(sequence.block_table) == self.rules.blocks_for(slots)
            others = expected.running + admitted[: admitted.index(sequence)]
            assert self.rules.can_guarantee(sequence, others)
            covered["admissions that keep what they have"] += self.rules.is_guaranteed(sequence)
        watermark = int(self.config.watermark * self.manager.num_blocks)
        if admitted and len(expected.running) + len(admitted) > 1:
            assert self.manager.num_free_blocks >= watermark, "no room is left to grow"
        seats = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        if not batch.preempted and budget and len(self.scheduler.running) < seats and waiting:
            spare = watermark if self.scheduler.running else 0
            assert any(
                self.rules.may_be_next(s, waiting, {s: s.status for s in waiting})
                and not self._fits(s, spare)
                for s in waiting
            ), "they wait in vain"

    def _fits(self, sequence: Sequence, spare: int) -> bool:
        """Whether one that waits could be admitted now."""
        prefix = self.manager.cached_prefix(sequence)
        computed = len(prefix) * self.config.block_size
        if sequence.status is SWAPPED:
            computed = sequence.num_computed_tokens
        slots = self.rules.slots_at_first(sequence, computed)
        fits = self.manager.can_allocate(slots, prefix, spare, computed)
        return fits and self.rules.can_guarantee(sequence, self.scheduler.running)

    def _check_shares(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        assert child.block_table == parent.block_table[: self.rules.blocks_for(num_tokens)]
        assert child.num_computed_tokens == num_tokens
        covered["forks"] += 1

    def _check_computed_blocks_are_found(self) -> None:
        """Another one that begins alike hits all full blocks; collisions cost nothing."""
        for sequence in self.scheduler.running[:1]:
            tokens = [*sequence.token_ids[: sequence.num_computed_tokens], 0]
            salt = sequence.sampling_params.cache_salt
            alike = Sequence(10**6, tokens, SamplingParams(cache_salt=salt))
            full = sequence.num_computed_tokens // self.config.block_size
            if not self.config.enable_prefix_caching:
                assert self.manager.cached_prefix(alike) == []
            elif not self.was_reset and sequence.num_registered_blocks >= full:
                behind, hits = (
                    self.rules.behind(sequence.num_computed_tokens),
                    self.manager.cached_prefix(alike),
                )
                if not (self.config.window and self.manager.stats.evictions + self.manager.stats.offloads):
                    assert len(hits) == full
                    assert hits[behind:] == sequence.block_table[behind:full]
                covered["blocks behind the window"] += behind


CUSTOM = ["Whimsical", "WhimsicalPrefillFirst", "Faulty", "Faulty", "FaultyPrefillFirst"]


mostly = st.sampled_from([True, True, True, False])


@st.composite
def configs(draw: st.DrawFn) -> CompleteConfig:
    block_size = draw(st.integers(1, 4))
    num_blocks = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 10, 12]))
    preemption = draw(st.sampled_from(["recompute", "swap", "swap", "auto", "auto"]))
    caches, offloads = draw(st.sampled_from([(True, False), (True, True), (True, True), (False, False)]))
    some = st.integers(1, 8)
    swap_blocks = {"recompute": some if offloads else st.none(), "swap": some, "auto": st.none() | some}
    policy = draw(st.sampled_from([*POLICIES, *POLICIES, *CUSTOM]))
    return EngineConfig(
        block_size=block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=caches,
        enable_hierarchical_cache=offloads,
        max_num_seqs=draw(st.sampled_from([1, 2, 3, 5, 5, 8])),
        max_num_batched_tokens=draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 12])),
        max_model_len=draw(st.none() | st.none() | st.integers(1, block_size * num_blocks + 2)),
        max_prefill_chunk=draw(st.sampled_from([None, None, 1, 2, 5])),
        window=draw(st.sampled_from([None, None, None, 1, 2, 3, 4, 6, 9])),
        policy=policy if policy in POLICIES else f"tests.properties.policies:{policy}",
        preemption=preemption,
        num_swap_blocks=draw(swap_blocks[preemption]),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.0, 0.25, 0.5])),
        max_preemptions=draw(st.sampled_from([1, 1, 2, 3, 8, 8])),
    ).complete(context=draw(st.sampled_from([None, None, 30])))


@st.composite
def params(draw: st.DrawFn) -> dict[str, Any]:
    max_tokens = draw(st.sampled_from([None, None, None, 1, 3, 8, 12]))
    tenant = draw(st.sampled_from(["", "", "a", "b"]))
    return {
        "n": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "max_tokens": max_tokens,
        "min_tokens": draw(st.integers(0, 2 if max_tokens is None else min(2, max_tokens))),
        "ignore_eos": draw(mostly),
        "stop_token_ids": draw(st.sampled_from([(), (STOP,)])),
        "tenant": tenant,
        "cache_salt": draw(st.sampled_from(["", "", tenant])),
        "priority": draw(st.integers(-1, 1)),
        "deadline_s": draw(st.sampled_from([None, 0.0, 1.0, 3.0])),
    }


faults = st.sampled_from(list(policies.FAULTS)).flatmap(
    lambda method: st.tuples(st.just(method), st.sampled_from(policies.FAULTS[method]))
)
prompts = st.one_of([st.lists(st.sampled_from([0, 0, 1, EOS]), max_size=size) for size in (3, 6, 12)])
sampled = st.sampled_from([*[0] * 10, *[1] * 4, EOS, STOP])
# Mostly one a step; of several at once those behind an end are dropped.
at_once = st.one_of([st.lists(sampled, min_size=1, max_size=most) for most in (1, 1, 1, 2, 5)])
sampled_tokens = st.lists(at_once, min_size=5, max_size=5)
failures = st.sampled_from([[False]] * 4 + [[True], [True, False], [False, False, True]])
costs = st.builds(PreemptionCosts, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.25, 2.0]))
picks = st.integers(0, 10**6)


class SchedulerMachine(RuleBasedStateMachine):
    """Everything that can be called, in every order that is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.next_seq_id = 0
        covered["examples of the scheduler"] += 1

    @initialize(
        config=configs(),
        hash_block=st.sampled_from([chained_hash, chained_hash, two_bits]),
        fault=faults,
        after=st.sampled_from([0, 1, 3, 10]),
        costs=costs,
    )
    def configure(
        self,
        config: CompleteConfig,
        hash_block: Callable[[int, bytes], int],
        fault: tuple[str, object],
        after: int,
        costs: PreemptionCosts,
    ) -> None:
        policies.Faulty.method, policies.Faulty.answer = fault
        policies.Faulty.after = after
        self.driver = Driver(config, hash_block)
        self.driver.rules.costs = costs

    @precondition(lambda self: self._num_alive() < MOST_ALIVE)
    @rule(
        arrivals=st.lists(st.tuples(prompts, params()), min_size=1, max_size=4),
        reads_cache=mostly,
        wait_s=st.sampled_from([0.0, 0.0, 0.0625, 0.5]),
    )
    def add(self, arrivals: list[tuple[list[int], dict[str, Any]]], reads_cache: bool, wait_s: float) -> None:
        for prompt, params in arrivals:
            self.driver.now += wait_s
            self._add(prompt, SamplingParams(**params), reads_cache)

    @precondition(lambda self: self.driver.main.sequences and self._num_alive() < MOST_ALIVE)
    @rule(pick=picks, length=st.integers(1, 12), params=params())
    def add_with_the_beginning_of_another(self, pick: int, length: int, params: dict[str, Any]) -> None:
        self._add(list(self._pick(pick).token_ids[:length]), SamplingParams(**params), True)

    @precondition(
        lambda self: (
            self.driver.main.sequences
            and self._num_alive() < MOST_ALIVE
            and not self.driver.manager.transfers
        )  # what one of them moves cannot be shared yet
    )
    @rule(pick=picks, shorter=st.sampled_from([0, 0, 0, 1, 3]), token=st.integers(0, 1), params=params())
    def fork(self, pick: int, shorter: int, token: int, params: dict[str, Any]) -> None:
        """Of one in any state; of one that runs, mostly at the place where it is."""
        candidates = self.driver.scheduler.running or list(self.driver.main.sequences.values())
        parent = candidates[pick % len(candidates)]
        length = max(1, (parent.num_computed_tokens or parent.num_tokens) - shorter)
        tokens = [*parent.token_ids[:length], token]
        self.driver.fork(parent.seq_id, self.next_seq_id, tokens, SamplingParams(**params | {"n": 1}))
        self.next_seq_id += 1

    @precondition(lambda self: not self.driver.batches)
    @rule(wait_s=st.sampled_from([0.0, 0.0625, 1.0]), costs=costs)
    def schedule(self, wait_s: float, costs: PreemptionCosts) -> None:
        """Time has passed, and what the driver measures has changed."""
        self.driver.now += wait_s
        self.driver.rules.costs = costs
        self.driver.schedule()

    @precondition(lambda self: self.driver.batches and not self.driver.ran)
    @rule(failures=failures)
    def run(self, failures: list[bool]) -> None:
        self.driver.run(failures)

    @precondition(lambda self: self.driver.batches and self.driver.manager.transfers)
    @rule(num_transfers=st.integers(0, 3))
    def interrupt(self, num_transfers: int) -> None:
        self.driver.interrupt(num_transfers)

    @precondition(lambda self: self.driver.rules.alive())
    @rule(num_lost=st.integers(0, 2))
    def recover(self, num_lost: int) -> None:
        self.driver.recover(num_lost)

    @precondition(lambda self: self.driver.batches)
    @rule(tokens=sampled_tokens)
    def commit(self, tokens: list[list[int]]) -> None:
        if not self.driver.ran:
            self.driver.run([False])
        self.driver.commit(tokens)

    @precondition(lambda self: self.driver.scheduler.has_unfinished)
    @rule(token_lists=st.lists(sampled_tokens, min_size=2, max_size=8), failures=failures)
    def some_steps(self, token_lists: list[list[list[int]]], failures: list[bool]) -> None:
        """Steps as an engine takes them, so that sequences get somewhere."""
        for tokens in token_lists:
            if not self.driver.batches:
                self.driver.schedule()
            if not self.driver.ran:
                self.driver.run(failures)
            self.driver.commit(tokens)
            self.driver.check()

    @precondition(lambda self: self.driver.main.sequences)
    @rule(pick=picks, alive=mostly)
    def abort(self, pick: int, alive: bool) -> None:
        """Whether it waits, runs, was preempted, has finished, has not begun or is being computed."""
        sequences = (alive and self.driver.rules.alive()) or list(self.driver.main.sequences.values())
        self.driver.abort(sequences[pick % len(sequences)].seq_id)
        # One that was never accepted is refused or ignored; the invariants see that no one else notices.
        for side in self.driver.sides:
            with contextlib.suppress(LookupError, ValueError):
                side.scheduler.abort(Sequence(10**6, [0], SamplingParams()))

    @precondition(lambda self: self.driver.scheduler.running and list(self.driver.manager._cache))
    @rule()
    def reset_cache(self) -> None:
        self.driver.everywhere(lambda side: side.manager.reset_cache())
        self.driver.was_reset = True
        covered["cache resets"] += 1

    @invariant()
    def nothing_is_lost_and_all_agree(self) -> None:
        self.driver.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.finish()

    def _num_alive(self) -> int:
        return len(self.driver.rules.alive())

    def _pick(self, pick: int) -> Sequence:
        sequences = list(self.driver.main.sequences.values())
        return sequences[pick % len(sequences)]

    def _add(self, prompt: list[int], params: SamplingParams, reads_cache: bool) -> None:
        self.driver.add(self.next_seq_id, prompt, params, reads_cache)
        self.next_seq_id += params.n


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=2000, stateful_step_count=30)
