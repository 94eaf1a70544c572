"""Laws 4 and 5: blocks are conserved, and a prefix-cache hit is always right and never missed.

A state machine drives a `BlockManager` as a scheduler would, with prompts over a tiny alphabet so that
prefixes are shared all the time, and with hashes that collide. It is held against two things that know
nothing of it: a memory in which each computed slot remembers the whole prefix that its keys and values depend
on, and a naive model of the cache that names content by its tokens and derives everything else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import note, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_manager import BlockManager, chained_hash
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

Tokens = tuple[int, ...]
Hash = Callable[[int, bytes], int]

MOST_ALIVE = 6


def two_bits(previous: int, tokens: bytes) -> int:
    """Collides all the time, but tells some blocks apart."""
    return chained_hash(previous, tokens) & 3


def constant(previous: int, tokens: bytes) -> int:
    """Every block collides with every other one."""
    return 7


@dataclass(frozen=True)
class Cached:
    """A block in the cache, named by the tokens from the sequence's start to the block's end."""

    prefix: Tokens


@dataclass(frozen=True)
class Private:
    """A block that one sequence alone can name."""

    seq_id: int
    index: int


@dataclass
class NaiveCache:
    """What the manager should do, by content: no block numbers, no counts, no hash map, no linked list.

    held: of each sequence with blocks, what each is. idle: cached content that nobody holds, the first to be
    evicted first. offered: of each sequence, its blocks that are private or cached for good.
    """

    num_blocks: int
    block_size: int
    caches: bool
    hash_block: Hash
    held: dict[int, list[Cached | Private]] = field(default_factory=dict)
    idle: list[Cached] = field(default_factory=list)
    offered: dict[int, int] = field(default_factory=dict)

    @property
    def num_free(self) -> int:
        return self.num_blocks - len({block for table in self.held.values() for block in table})

    @property
    def cached(self) -> set[Cached]:
        held = {block for table in self.held.values() for block in table if isinstance(block, Cached)}
        return held | set(self.idle)

    def hits(self, tokens: Tokens) -> list[Cached]:
        """All leading blocks that are cached, but never the last token."""
        hits: list[Cached] = []
        for end in range(self.block_size, len(tokens), self.block_size):
            if Cached(tokens[:end]) not in self.cached:
                break
            hits.append(Cached(tokens[:end]))
        return hits

    def can_admit(self, tokens: Tokens, hits: list[Cached]) -> bool:
        free_for_others = self.num_free - len(set(hits) & set(self.idle))
        return self._blocks_for(tokens) - len(hits) <= free_for_others

    def admit(self, seq_id: int, tokens: Tokens, hits: list[Cached]) -> None:
        self.idle = [block for block in self.idle if block not in hits]
        self.held[seq_id] = list(hits)
        self.offered[seq_id] = len(hits)
        while len(self.held[seq_id]) < self._blocks_for(tokens):
            self.take(seq_id)

    def take(self, seq_id: int) -> None:
        """Blocks that nobody can find are used up before cached content is evicted."""
        if self.num_free == len(self.idle):
            self.idle.pop(0)
        self.held[seq_id].append(Private(seq_id, len(self.held[seq_id])))

    def computed(self, seq_id: int, tokens: Tokens) -> None:
        """All of `tokens` are computed: full blocks behind cached ones enter the cache, once."""
        if not self.caches:
            return
        table, full = self.held[seq_id], len(tokens) // self.block_size
        for index in range(self.offered[seq_id], full):
            block = Cached(tokens[: (index + 1) * self.block_size])
            if index and isinstance(table[index - 1], Private):
                continue
            if block not in self.cached and self._hash(block) in {self._hash(other) for other in self.cached}:
                continue  # the first that has a hash keeps it
            table[index] = block
            self.idle = [other for other in self.idle if other != block]
        self.offered[seq_id] = full

    def free(self, seq_id: int) -> None:
        """Last block first, so that no block is evicted before one that follows it."""
        table = self.held.pop(seq_id, [])
        for block in reversed(table):
            if isinstance(block, Cached) and not any(block in other for other in self.held.values()):
                self.idle.append(block)

    def _blocks_for(self, tokens: Tokens) -> int:
        return len(range(0, len(tokens), self.block_size))

    def _hash(self, block: Cached) -> int:
        value = 0
        for start in range(0, len(block.prefix), self.block_size):
            piece = block.prefix[start : start + self.block_size]
            value = self.hash_block(value, b"".join(token.to_bytes(4, "little") for token in piece))
        return value


token_ids = st.sampled_from([0, 0, 0, 1])
prompts = st.lists(token_ids, min_size=1, max_size=14)
picks = st.integers(0, 10**6)


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences come, are computed in pieces, grow, are preempted, come back and go."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.seen: list[Sequence] = []
        self.next_seq_id = 0

    @initialize(
        num_blocks=st.sampled_from([1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 10, 12]),
        block_size=st.sampled_from([1, 2, 2, 3, 4, 5]),
        caches=st.sampled_from([True, True, True, False]),
        hash_block=st.sampled_from([chained_hash, chained_hash, two_bits, constant]),
    )
    def configure(self, num_blocks: int, block_size: int, caches: bool, hash_block: Hash) -> None:
        self.manager = BlockManager(num_blocks, block_size, caches, hash_block)
        self.model = NaiveCache(num_blocks, block_size, caches, hash_block)
        self.memory: list[list[Tokens | None]] = [[None] * block_size for _ in range(num_blocks)]

    @precondition(lambda self: len(self.waiting) + len(self.running) < MOST_ALIVE)
    @rule(prompt=prompts, reads_cache=st.sampled_from([True, True, True, True, False]))
    def new(self, prompt: list[int], reads_cache: bool) -> None:
        self._new(prompt, reads_cache)

    @precondition(lambda self: self.seen and len(self.waiting) + len(self.running) < MOST_ALIVE)
    @rule(
        pick=picks,
        length=st.sampled_from([1, 2, 3, 4, 5, 6, 8, 10, 14]),
        suffix=st.lists(token_ids, max_size=3),
    )
    def new_with_the_beginning_of_another(self, pick: int, length: int, suffix: list[int]) -> None:
        """Also of one that is gone: what it left in the cache is still to be found."""
        self._new(self._pick(self.seen, pick).token_ids[:length] + suffix, True)

    @precondition(lambda self: self.waiting)
    @rule(pick=picks)
    def admit(self, pick: int) -> None:
        self._admit(self._pick(self.waiting, pick))

    @precondition(lambda self: self.waiting)
    @rule(pick=picks, others=st.lists(picks, max_size=1))
    def admit_and_compute_whole(self, pick: int, others: list[int]) -> None:
        chosen = {self._pick(self.waiting, p) for p in (pick, *others)}
        for sequence in sorted(chosen, key=lambda s: s.seq_id):
            self._admit(sequence)
        self._compute({s: s.num_tokens for s in self.running if s in chosen})

    @precondition(lambda self: self.running)
    @rule(chosen=st.lists(st.tuples(picks, st.integers(1, 8)), min_size=1, max_size=3))
    def step(self, chosen: list[tuple[int, int]]) -> None:
        """Computes some tokens of some sequences at once: first the memory is written, then all register."""
        self._compute({self._pick(self.running, pick): count for pick, count in chosen})

    @precondition(lambda self: any(s.num_computed_tokens == s.num_tokens for s in self.running))
    @rule(pick=picks, token=token_ids)
    def append(self, pick: int, token: int) -> None:
        """A token is sampled when all are computed; it need not get its slot at once."""
        sequence = self._pick([s for s in self.running if s.num_computed_tokens == s.num_tokens], pick)
        sequence.token_ids.append(token)

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def grow(self, pick: int) -> None:
        sequence = self._pick(self.running, pick)
        needs_a_block = len(sequence.block_table) * self.manager.block_size < sequence.num_tokens
        can_grow = self.manager.can_grow(sequence)
        assert can_grow == (not needs_a_block or self.model.num_free > 0)
        if can_grow:
            before = list(sequence.block_table)
            self.manager.grow(sequence)
            assert sequence.block_table[: len(before)] == before
            assert len(sequence.block_table) == len(before) + needs_a_block
            if needs_a_block:
                self.model.take(sequence.seq_id)

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def preempt(self, pick: int) -> None:
        sequence = self._pick(self.running, pick)
        self._free(sequence)
        self.running.remove(sequence)
        self.waiting.append(sequence)

    @precondition(lambda self: self.running or self.waiting)
    @rule(pick=picks)
    def finish(self, pick: int) -> None:
        """Running or not: a sequence without blocks has none to give back."""
        sequence = self._pick(self.running + self.waiting, pick)
        self._free(sequence)
        self.manager.free(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.manager.check()
        referenced = {block for sequence in self.running for block in sequence.block_table}
        assert self.manager.num_free_blocks + len(referenced) == self.manager.num_blocks
        assert self.manager.num_free_blocks == self.model.num_free

    @invariant()
    def sequences_share_exactly_the_blocks_that_the_model_shares(self) -> None:
        """Hence every reference count is the model's too."""
        block_of: dict[Cached | Private, int] = {}
        name_of: dict[int, Cached | Private] = {}
        for sequence in self.running:
            names = self.model.held[sequence.seq_id]
            for name, block in zip(names, sequence.block_table, strict=True):
                assert block_of.setdefault(name, block) == block, f"{name} lies in two blocks"
                assert name_of.setdefault(block, name) == name, f"block {block} serves as two"

    @invariant()
    def computed_positions_hold_the_sequences_own_prefix(self) -> None:
        for sequence in self.running:
            self._check_memory(sequence, sequence.block_table, sequence.num_computed_tokens)

    @invariant()
    def every_hit_is_right_and_what_can_be_hit_is_hit(self) -> None:
        for sequence in self.waiting:
            hits = self.manager.cached_prefix(sequence)
            assert len(hits) == len(self._expected_hits(sequence))
            assert len(set(hits)) == len(hits)
            assert hits == self.manager.cached_prefix(sequence), "a question changed the answer"
            self._check_memory(sequence, hits, len(hits) * self.manager.block_size)

    def teardown(self) -> None:
        """When all sequences are gone, all blocks are free: the next one can have every one of them."""
        if not hasattr(self, "manager"):
            return
        for sequence in self.running:
            self.manager.free(sequence)
            self.manager.check()
        assert self.manager.num_free_blocks == self.manager.num_blocks
        size = self.manager.num_blocks * self.manager.block_size
        everything = Sequence(self.next_seq_id, [2] * size, SamplingParams())
        assert self.manager.can_allocate(everything, [])
        self.manager.allocate(everything, [])
        assert sorted(everything.block_table) == list(range(self.manager.num_blocks))
        self.manager.check()

    def _new(self, prompt: list[int], reads_cache: bool) -> None:
        self.waiting.append(Sequence(self.next_seq_id, prompt, SamplingParams(), reads_cache=reads_cache))
        self.seen.append(self.waiting[-1])
        note(f"sequence {self.next_seq_id}: {prompt}")
        self.next_seq_id += 1

    def _admit(self, sequence: Sequence) -> None:
        tokens = tuple(sequence.token_ids)
        hits = self._expected_hits(sequence)
        prefix = self.manager.cached_prefix(sequence)
        fits = self.manager.can_allocate(sequence, prefix)
        assert fits == self.model.can_admit(tokens, hits)
        if not fits:
            return
        self.manager.allocate(sequence, prefix)
        self.model.admit(sequence.seq_id, tokens, hits)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        assert sequence.block_table[: len(prefix)] == prefix
        assert len(sequence.block_table) == -(-len(tokens) // self.manager.block_size)
        assert sequence.num_computed_tokens == len(prefix) * self.manager.block_size
        assert sequence.num_computed_tokens < len(tokens), "no token is left to compute"

    def _compute(self, counts: dict[Sequence, int]) -> None:
        writes: dict[tuple[int, int], Tokens] = {}
        for sequence, count in list(counts.items()):
            start = sequence.num_computed_tokens
            slots = len(sequence.block_table) * self.manager.block_size
            counts[sequence] = min(count, sequence.num_tokens - start, slots - start)
            for position in range(start, start + counts[sequence]):
                block, slot = self._slot(sequence, position)
                assert (block, slot) not in writes, "two sequences write to one slot"
                writes[block, slot] = tuple(sequence.token_ids[: position + 1])
        for (block, slot), prefix in writes.items():
            self.memory[block][slot] = prefix
        for sequence, count in counts.items():
            sequence.num_computed_tokens += count
            self.manager.register(sequence)
            self.model.computed(sequence.seq_id, tuple(sequence.token_ids[: sequence.num_computed_tokens]))
            self.manager.check()

    def _free(self, sequence: Sequence) -> None:
        self.manager.free(sequence)
        self.model.free(sequence.seq_id)
        assert sequence.block_table == []
        assert sequence.num_computed_tokens == 0

    def _expected_hits(self, sequence: Sequence) -> list[Cached]:
        return self.model.hits(tuple(sequence.token_ids)) if sequence.reads_cache else []

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        index, slot = divmod(position, self.manager.block_size)
        return sequence.block_table[index], slot

    def _check_memory(self, sequence: Sequence, table: list[int], num_tokens: int) -> None:
        for position in range(num_tokens):
            index, slot = divmod(position, self.manager.block_size)
            own = tuple(sequence.token_ids[: position + 1])
            assert self.memory[table[index]][slot] == own, f"wrong KV at position {position} of {sequence}"

    @staticmethod
    def _pick(sequences: list[Sequence], pick: int) -> Sequence:
        return sequences[pick % len(sequences)]


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=400, stateful_step_count=50)
