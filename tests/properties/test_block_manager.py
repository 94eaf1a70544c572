"""Laws 4 and 5: blocks are conserved, and a prefix-cache hit is always right and never missed.

A state machine drives a `BlockManager` as a scheduler would, with prompts over a tiny alphabet so that
prefixes are shared all the time, and with hashes that collide. It is held against two things that know
nothing of it: a memory in which each computed slot remembers the whole prefix that its keys and values depend
on, and a naive model that names content by its tokens and derives everything else.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import note, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition

from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.block_manager import (
    BlockManager,
    HashBlock,
    PrefixCacheStats,
    Transfer,
    TransferKind,
    chained_hash,
)
from pagellm.engine.scheduling.block_usage import BlockUsage
from pagellm.engine.scheduling.prefix_cache import ROOT
from pagellm.engine.scheduling.sequence import GIVEN_BACK, Sequence, SequenceStatus
from tests.properties.covered import covered, rule
from tests.properties.memory import Memory, constant, names_of_cached_blocks, two_bits

Tokens = tuple[int, ...]
MOST_ALIVE = 6
OFFLOAD = TransferKind.OFFLOAD


@dataclass(frozen=True)
class Cached:
    """A block in the cache, named by its salt and the tokens from the sequence's start to the block's end."""

    salt: str
    prefix: Tokens


@dataclass(frozen=True)
class Private:
    """A block that nobody can find; forks share it."""

    number: int


@dataclass(frozen=True)
class Behind:
    """In the place of a block behind the window."""


Name = Cached | Private
BEHIND = Behind()


@dataclass
class NaiveManager:
    """What the manager should do, by content: no block numbers, no counts, no hash map, no linked list.

    held: of each sequence with blocks, what each is. swapped: of each one that is swapped out, its blocks
    there. idle: cached content that nobody holds, the first to be evicted first. host: that of the second
    tier, likewise; loading: of it, what is just being moved to the first. offered: of each sequence, its
    blocks that are private or cached for good.
    """

    num_blocks: int
    block_size: int
    caches: bool
    num_swap_blocks: int
    window: int = 0
    offloads: bool = False
    held: dict[int, list[Name | Behind]] = field(default_factory=dict)
    swapped: dict[int, int] = field(default_factory=dict)
    idle: list[Cached] = field(default_factory=list)
    host: list[Cached] = field(default_factory=list)
    loading: list[Cached] = field(default_factory=list)
    num_loading: int = 0
    offered: dict[int, int] = field(default_factory=dict)
    stats: PrefixCacheStats = field(default_factory=PrefixCacheStats)
    num_private: int = 0

    @property
    def references(self) -> Counter[Name]:
        return Counter(
            block for table in self.held.values() for block in table if not isinstance(block, Behind)
        )

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self.references)

    @property
    def num_free_swap(self) -> int:
        return self.num_swap_blocks - sum(self.swapped.values())

    @property
    def first_tier(self) -> set[Cached]:
        return {block for block in self.references if isinstance(block, Cached)} | set(self.idle)

    @property
    def cached(self) -> set[Cached]:
        return self.first_tier | set(self.host) | set(self.loading)

    def hits(self, salt: str, tokens: Tokens) -> list[Cached]:
        """All leading full blocks that are cached."""
        hits: list[Cached] = []
        cached = self.cached
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            if Cached(salt, tokens[:end]) not in cached:
                break
            hits.append(Cached(salt, tokens[:end]))
        return hits

    def behind(self, num_computed: int) -> int:
        """Leading blocks, none of whose tokens is seen by one behind the last full block.

        The last full block is no such block, whatever the window.
        """
        full = num_computed // self.block_size
        ends = range(self.block_size, full * self.block_size, self.block_size)
        unseen = full * self.block_size - self.window + 1  # tokens that one there does not see
        return sum(end <= unseen for end in ends) if self.window else 0

    def fits(self, num_tokens: int, hits: list[Cached], spare: int, num_computed: int) -> bool:
        behind = self.behind(num_computed)
        free_for_others = self.num_free - len(set(hits[behind:]) & set(self.idle)) - spare
        num_new = (
            self.blocks_for(num_tokens) - max(behind, len(hits)) + len(set(hits[behind:]) & set(self.host))
        )
        return num_new <= free_for_others

    def admit(self, seq_id: int, num_tokens: int, hits: list[Cached], num_computed: int) -> None:
        behind = self.behind(num_computed)
        self.loading = [name for name in hits[behind:] if name in self.host]
        self.num_loading = len(self.loading)
        for tier in (self.idle, self.host):
            passed = [block for block in hits[:behind][::-1] if block in tier]  # used, though not held
            tier[:] = [block for block in tier if block not in hits] + passed
        held = [BEHIND if name in self.loading else name for name in hits[behind:]]
        self.held[seq_id] = [*[BEHIND] * behind, *held]
        for index, name in enumerate(hits):
            if index >= behind and self.held[seq_id][index] == BEHIND:
                own: Name = self.take()
                if name in self.loading:  # else it was forgotten to make room for it
                    self.loading.remove(name)
                    own = name
                self.held[seq_id][index] = own
        self.num_loading = 0
        self.offered[seq_id] = max(behind, len(hits))
        while len(self.held[seq_id]) < self.blocks_for(num_tokens):
            self.held[seq_id].append(self.take())
        self.swapped.pop(seq_id, None)

    def take(self) -> Private:
        """Blocks that nobody can find are used up before cached content is evicted."""
        if self.num_free == len(self.idle):
            evicted = self.idle[0]
            if self.offloads and self.num_free_swap > self.num_loading:
                self.offload(evicted)
            else:
                self.evict(evicted)
        return self.private()

    def offload(self, evicted: Cached) -> None:
        """To make room for it the least recently used one goes, which it may follow."""
        if len(self.host) == self.num_free_swap - self.num_loading:
            self.evict(self.host[0])
        if evicted in self.idle:
            self.idle.remove(evicted)
            self.host.append(evicted)
            self.stats.offloads += self.block_size
            covered["offloads"] += 1

    def evict(self, evicted: Cached) -> None:
        """And all that follows it."""
        lost = {
            name
            for name in self.cached
            if name.salt == evicted.salt and name.prefix[: len(evicted.prefix)] == evicted.prefix
        }
        self.forget(lost)
        self.stats.evictions += self.block_size * len(lost)
        covered["evictions"] += 1
        covered["evictions of what others follow"] += len(lost) > 1

    def forget(self, lost: set[Cached]) -> None:
        """Nobody can find these; who shared a block still shares it."""
        for names in (self.idle, self.host, self.loading):
            names[:] = [name for name in names if name not in lost]
        nameless = {name: self.private() for name in self.references if name in lost}
        for table in self.held.values():
            table[:] = [nameless.get(name, name) if isinstance(name, Cached) else name for name in table]

    def private(self) -> Private:
        self.num_private += 1
        return Private(self.num_private)

    def needs_block(self, seq_id: int, index: int) -> bool:
        """To write into its block `index`: there must be one, its own, that nobody can find."""
        table = self.held[seq_id]
        return index == len(table) or isinstance(table[index], Cached) or self.references[table[index]] > 1

    def grow(self, seq_id: int, index: int) -> bool:
        """Returns whether content is copied."""
        table = self.held[seq_id]
        if index == len(table):
            table.append(self.take())
            return False
        shared, table[index] = table[index], self.take()
        self.rest([shared])
        return True

    def fork(self, parent: int, child: int, num_tokens: int) -> None:
        self.held[child] = self.held[parent][: self.blocks_for(num_tokens)]
        self.offered[child] = min(self.offered[parent], num_tokens // self.block_size)

    def computed(self, seq_id: int, salt: str, tokens: Tokens) -> None:
        """All of `tokens` are computed: full blocks behind cached ones enter the cache, once."""
        if self.caches:
            self.offer(seq_id, salt, tokens)
        table, behind = self.held[seq_id], self.behind(len(tokens))
        released = [block for block in table[:behind] if block != BEHIND]
        table[:behind] = [BEHIND] * behind
        self.rest(released[::-1])
        covered["blocks behind the window"] += len(released)

    def offer(self, seq_id: int, salt: str, tokens: Tokens) -> None:
        table, full = self.held[seq_id], len(tokens) // self.block_size
        for index in range(self.offered[seq_id], full):
            if index and not isinstance(table[index - 1], Cached):
                break
            name, own = Cached(salt, tokens[: (index + 1) * self.block_size]), table[index]
            known = name in self.first_tier
            if name in self.host:
                self.host.remove(name)
                covered["offloaded blocks that were computed again"] += 1
            table[index] = name
            self.idle = [other for other in self.idle if other != name]
            if not known:  # the sequence's own block becomes the known one, for all that share it
                for other in self.held.values():
                    other[:] = [name if block == own else block for block in other]
        self.offered[seq_id] = full

    def free(self, seq_id: int) -> None:
        """Last block first, so that no block is evicted before one that follows it."""
        self.rest(self.held.pop(seq_id, [])[::-1])
        self.swapped.pop(seq_id, None)

    def rest(self, released: Iterable[Name | Behind]) -> None:
        """Cached content that nobody holds any more can be evicted, the first released first."""
        references = self.references
        self.idle += [block for block in released if isinstance(block, Cached) and not references[block]]

    def swap_out(self, seq_id: int, num_tokens: int) -> None:
        num_taken = self.blocks_for(num_tokens) - self.behind(num_tokens)
        for taken in range(num_taken):
            if len(self.host) == self.num_free_swap - taken:
                self.evict(self.host[0])
                covered["cached blocks that made room for swapped sequences"] += 1
        self.free(seq_id)
        self.swapped[seq_id] = self.blocks_for(num_tokens) - self.behind(num_tokens)

    def reset(self) -> None:
        """Nobody can find anything; who shared a block still shares it."""
        self.forget(self.cached)

    def blocks_for(self, num_tokens: int) -> int:
        return len(range(0, num_tokens, self.block_size))


token_ids = st.sampled_from([0, 0, 0, 1])
prompts = st.lists(token_ids, min_size=1, max_size=14)
salts = st.sampled_from(["", "", "", "salt", "other"])
picks = st.integers(0, 10**6)
mostly = st.sampled_from([True, True, False])


class Mirror:
    """What somebody knows who observes the cache from its beginning: each hash, and what was said of it."""

    def __init__(self) -> None:
        self.known: Counter[tuple[int, int]] = Counter()  # by tier and hash
        self.said: dict[int, tuple[int | None, bytes, str]] = {}

    def stored(self, block_hash: int, parent_hash: int | None, tokens: bytes, salt: str, tier: int) -> None:
        assert parent_hash is None or self.known[0, parent_hash] or self.known[1, parent_hash]
        self.known[tier, block_hash] += 1
        self.said[block_hash] = parent_hash, tokens, salt

    def removed(self, block_hash: int, tier: int) -> None:
        assert self.known[tier, block_hash] > 0
        self.known[tier, block_hash] -= 1

    def cleared(self) -> None:
        assert not any(count and tier for (tier, _), count in self.known.items()), "what is offloaded is not"
        self.known.clear()


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences come, are computed in pieces, grow, fork, are preempted or swapped out, come back and go.

    Transfers are done, in order, before the next tokens are computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Sequence] = []  # swapped ones, too
        self.running: list[Sequence] = []
        self.seen: list[Sequence] = []
        self.tables: dict[Sequence, list[int]] = {}  # as they were when a change was told last
        self.next_seq_id = 0
        covered["examples of the block manager"] += 1

    @initialize(
        num_blocks=st.sampled_from([1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 10, 12]),
        block_size=st.sampled_from([1, 2, 2, 3, 4, 5]),
        caches=st.sampled_from([True, True, True, False]),
        num_swap_blocks=st.sampled_from([0, 1, 2, 3, 5, 8]),
        hash_block=st.sampled_from([chained_hash, chained_hash, two_bits, constant]),
        window=st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5, 7, 9]),
        offloads=st.booleans(),
    )
    def configure(
        self,
        num_blocks: int,
        block_size: int,
        caches: bool,
        num_swap_blocks: int,
        hash_block: HashBlock,
        window: int,
        offloads: bool,
    ) -> None:
        self.manager = BlockManager(
            num_blocks, block_size, caches, num_swap_blocks, hash_block, window, offloads
        )
        self.model = NaiveManager(num_blocks, block_size, caches, num_swap_blocks, window, offloads)
        self.memory = Memory(num_blocks, block_size, num_swap_blocks, window)
        self.mirror = Mirror()
        self.manager.observe_cache(self.mirror)
        self.collides = hash_block is not chained_hash

    @precondition(lambda self: len(self.waiting) + len(self.running) < MOST_ALIVE)
    @rule(
        prompt=prompts,
        reads_cache=st.sampled_from([True, True, True, True, False]),
        salt=salts,
        at_once=mostly,
    )
    def new(self, prompt: list[int], reads_cache: bool, salt: str, at_once: bool) -> None:
        self._arrive(self._new(prompt, salt, reads_cache), at_once)

    @precondition(lambda self: self.seen and len(self.waiting) + len(self.running) < MOST_ALIVE)
    @rule(
        pick=picks,
        length=st.sampled_from([1, 2, 3, 4, 5, 6, 8, 10, 14]),
        suffix=st.lists(token_ids, max_size=3),
        salt=st.none() | salts,
        at_once=mostly,
    )
    def new_with_the_beginning_of_another(
        self, pick: int, length: int, suffix: list[int], salt: str | None, at_once: bool
    ) -> None:
        """Also of one that is gone: what it left in the cache is still to be found, under its own salt."""
        other = self._pick(self.seen, pick)
        salt = other.sampling_params.cache_salt if salt is None else salt
        self._arrive(self._new([*other.token_ids[:length], *suffix], salt, True), at_once)

    @precondition(lambda self: self.waiting)
    @rule(pick=picks, more=st.sampled_from([0, 0, 0, 1, 3, 7]), spare=st.sampled_from([0, 0, 0, 1, 2]))
    def admit(self, pick: int, more: int, spare: int) -> None:
        self._admit(self._pick(self.waiting, pick), more, spare)

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

    @precondition(lambda self: any(self._wants_slot(s) for s in self.running))
    @rule(pick=picks)
    def grow(self, pick: int) -> None:
        self._grow(self._pick([s for s in self.running if self._wants_slot(s)], pick))

    @precondition(lambda self: self.running)
    @rule(tokens=st.lists(token_ids, min_size=1, max_size=6))
    def decode_all(self, tokens: list[int]) -> None:
        self._decode_all(tokens)

    @precondition(
        lambda self: (
            any(self._can_fork(s) for s in self.running)
            and len(self.waiting) + len(self.running) < MOST_ALIVE
        )
    )
    @rule(pick=picks, shorter=st.sampled_from([0, 0, 0, 1, 2, 5]), token=token_ids)
    def fork(self, pick: int, shorter: int, token: int) -> None:
        """Shares what is computed, all of it or less, and goes on with another token."""
        parent = self._pick([s for s in self.running if self._can_fork(s)], pick)
        shared = max(1, parent.num_computed_tokens - shorter)
        can_fork = self.model.behind(shared) == self.model.behind(parent.num_computed_tokens)
        assert self.manager.can_fork(parent, shared) == can_fork
        if not can_fork:
            return
        child = self._new([*parent.token_ids[:shared], token], parent.sampling_params.cache_salt, True)
        table = list(parent.block_table)
        self.manager.fork(parent, child, shared)
        self.model.fork(parent.seq_id, child.seq_id, shared)
        assert child.block_table == table[: self.model.blocks_for(shared)]
        assert parent.block_table == table
        assert child.num_computed_tokens == shared
        self.running.append(child)
        covered["forks"] += 1

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def preempt(self, pick: int) -> None:
        sequence = self._pick(self.running, pick)
        self._free(sequence)
        sequence.num_preemptions += 1
        self.running.remove(sequence)
        self.waiting.append(sequence)
        covered["preemptions by recompute"] += 1

    @precondition(lambda self: self.running and self.model.num_swap_blocks)
    @rule(pick=picks, token=token_ids)
    def swap_out(self, pick: int, token: int) -> None:
        """One that has something left to compute, as all have between steps."""
        sequence = self._pick(self.running, pick)
        if sequence.num_computed_tokens == sequence.num_tokens:
            sequence.token_ids.append(token)
        behind = self.model.behind(sequence.num_computed_tokens)
        num_blocks = self.model.blocks_for(sequence.num_computed_tokens) - behind
        possible = self.manager.can_swap_out(sequence)
        assert possible == (0 < num_blocks <= self.model.num_free_swap)
        if not possible:
            return
        table, num_transfers = list(sequence.block_table), len(self.manager.transfers)
        self.manager.swap_out(sequence)
        transfers = list(self.manager.transfers)[num_transfers:]
        assert len(set(sequence.swap_table)) == len(sequence.swap_table)
        self.model.swap_out(sequence.seq_id, sequence.num_computed_tokens)
        assert [(t.kind, t.source) for t in transfers] == [
            (TransferKind.SWAP_OUT, block) for block in table[behind : behind + num_blocks]
        ]
        assert [t.target for t in transfers] == sequence.swap_table
        assert all(t.sequence is sequence for t in transfers)
        assert sequence.block_table == []
        assert sequence.status is SequenceStatus.SWAPPED
        sequence.num_preemptions += 1
        self.running.remove(sequence)
        self.waiting.append(sequence)
        covered["preemptions by swap"] += 1

    @precondition(lambda self: self.running or self.waiting)
    @rule(pick=picks)
    def finish(self, pick: int) -> None:
        """In any state: a sequence without blocks has none to give back."""
        sequence = self._pick(self.running + self.waiting, pick)
        self._free(sequence)
        self.manager.free(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    @precondition(lambda self: self.model.offloads and self.model.idle)
    @rule()
    def evict_all_that_is_free(self) -> None:
        """One takes all free blocks and goes at once."""
        sequence = self._new([2], "", False)
        self.waiting.append(sequence)
        self._admit(sequence, self.model.num_free * self.manager.block_size - 1)
        assert not self.model.idle
        self._free(sequence)
        self.running.remove(sequence)

    @precondition(lambda self: self.running and self.model.cached)
    @rule(tokens=st.lists(token_ids, min_size=3, max_size=6))
    def reset_cache(self, tokens: list[int]) -> None:
        """And all go on, so that there is soon something to be found again."""
        self.manager.reset_cache()
        self.model.reset()
        covered["cache resets"] += 1
        self._decode_all(tokens)

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.manager.check()
        assert self.manager.num_free_blocks == self.model.num_free
        assert self.manager.num_free_swap_blocks == self.model.num_free_swap
        assert self.manager.stats == self.model.stats

    @invariant()
    def sequences_share_exactly_the_blocks_that_the_model_shares(self) -> None:
        """And each block is counted as often as the model has it in a table."""
        block_of: dict[Name, int] = {}
        name_of: dict[int, Name] = {}
        written: Counter[int] = Counter()
        size = self.manager.block_size
        for sequence in self.running:
            names = self.model.held[sequence.seq_id]
            for index, (name, block) in enumerate(zip(names, sequence.block_table, strict=True)):
                assert (name == BEHIND) == (block == GIVEN_BACK)
                if isinstance(name, Behind):
                    continue
                assert block_of.setdefault(name, block) == block, f"{name} lies in two blocks"
                assert name_of.setdefault(block, name) == name, f"block {block} serves as two"
                filled = min(size, max(0, sequence.num_computed_tokens - index * size))
                written[block] = max(written[block], filled)
        references = self.model.references
        counts = [references[name_of[b]] if b in name_of else 0 for b in range(self.manager.num_blocks)]
        assert list(self.manager._reference_counts)[: self.manager.num_blocks] == counts
        assert self.manager.usage() == BlockUsage(
            used=len(references),
            free=self.model.num_free,
            shared=references.total() - len(references),
            unwritten_slots=len(references) * size - written.total(),
            swap_used=self.model.num_swap_blocks - self.model.num_free_swap,
            swap_cached=len(self.model.host),
        )
        assert self.manager.num_swapped == len(self.model.swapped)

    @invariant()
    def each_table_that_changed_is_told(self) -> None:
        for sequence, index in self.manager.take_changed_tables().items():
            self.tables.setdefault(sequence, [])[index:] = sequence.block_table[index:]
        for sequence in self.running:
            assert self.tables[sequence] == sequence.block_table
        assert self.manager.take_changed_tables() == {}

    @invariant()
    def computed_positions_hold_the_sequences_own_prefix(self) -> None:
        if not self.manager.transfers:
            for sequence in self.running:
                assert self.memory.holds(sequence, sequence.num_computed_tokens), f"wrong KV: {sequence}"

    @invariant()
    def the_cache_knows_exactly_what_the_model_knows(self) -> None:
        """And what it names a block by is what the block holds."""
        names = names_of_cached_blocks(self.manager)
        assert len(set(names.values())) == len(names)
        assert {Cached(*name) for name in names.values()} == self.model.cached
        assert self.memory.holds_what_the_cache_says(self.manager)

    @invariant()
    def who_observes_the_cache_knows_what_it_knows(self) -> None:
        cache = self.manager._cache
        tiers = ((int(block >= self.manager.num_blocks), cache.hash_of(block)) for block in cache)
        assert +self.mirror.known == Counter(tiers)
        if not self.collides:
            for block in cache:
                before = cache.before(block)
                parent = None if before == ROOT else cache.hash_of(before)
                said = parent, cache.tokens(block), cache.salt_of(block)
                assert self.mirror.said[cache.hash_of(block)] == said

    @invariant()
    def every_hit_is_right_and_what_can_be_hit_is_hit(self) -> None:
        for sequence in self.waiting:
            hits = self.manager.cached_prefix(sequence)
            assert len(hits) == len(self._expected_hits(sequence))
            for end in range(len(hits)):
                assert self.manager.prefix_grew(sequence, hits[:end])
            if sequence.reads_cache and not sequence.swap_table:
                assert not self.manager.prefix_grew(sequence, hits)
            num_tokens = len(hits) * self.manager.block_size
            assert GIVEN_BACK not in hits
            after = self.memory.moved(self.manager.transfers)
            assert after.holds(sequence, num_tokens, hits), f"a wrong hit: {sequence}"

    def teardown(self) -> None:
        """When all sequences are gone, all blocks are free: the next one can have every one of them."""
        if not hasattr(self, "manager"):
            return
        self._transfer()
        self.computed_positions_hold_the_sequences_own_prefix()
        for sequence in self.running + self.waiting:
            self.manager.free(sequence)
            self.manager.check()
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert self.manager.num_free_swap_blocks == self.manager.num_swap_blocks
        size = self.manager.num_blocks * self.manager.block_size
        everything = Sequence(self.next_seq_id, [2] * size, SamplingParams())
        assert self.manager.can_allocate(size, [])
        self.manager.allocate(everything, [], size)
        assert sorted(everything.block_table) == list(range(self.manager.num_blocks))
        self.manager.check()

    def _new(self, prompt: list[int], salt: str, reads_cache: bool) -> Sequence:
        params = SamplingParams(cache_salt=salt)
        sequence = Sequence(self.next_seq_id, prompt, params, reads_cache=reads_cache)
        self.seen.append(sequence)
        note(f"sequence {self.next_seq_id}: {prompt} {salt!r}")
        self.next_seq_id += 1
        return sequence

    def _arrive(self, sequence: Sequence, at_once: bool) -> None:
        self.waiting.append(sequence)
        if at_once:
            self._admit(sequence)
            self._compute({s: s.num_tokens for s in self.running if s is sequence})

    def _admit(self, sequence: Sequence, more: int = 0, spare: int = 0) -> None:
        swapped, computed = list(sequence.swap_table), sequence.num_computed_tokens
        num_tokens = sequence.num_tokens + more
        hits = self._expected_hits(sequence)
        prefix = self.manager.cached_prefix(sequence)
        size = self.manager.block_size
        num_computed = computed if swapped else len(hits) * size
        fits = self.manager.can_allocate(num_tokens, prefix, spare, num_computed)
        assert fits == self.model.fits(num_tokens, hits, spare, num_computed)
        if not fits:
            return
        behind = self.model.behind(num_computed)
        num_transfers = len(self.manager.transfers)
        loaded = [block for block in prefix[behind:] if block >= self.manager.num_blocks]
        if swapped:
            self.manager.swap_in(sequence, prefix, num_tokens)
            moved = list(self.manager.transfers)[num_transfers:]
            assert [t for t in moved if t.kind is TransferKind.SWAP_IN] == [
                (TransferKind.SWAP_IN, slot, block, sequence)
                for slot, block in list(zip(swapped, sequence.block_table[behind:], strict=False))[
                    max(0, len(prefix) - behind) :
                ]
            ]
            assert sequence.num_computed_tokens == computed
            assert sequence.swap_table == []
            covered["swap-ins"] += 1
        else:
            self.manager.allocate(sequence, prefix, num_tokens)
            assert sequence.num_computed_tokens == len(prefix) * size
            if self.model.caches and sequence.reads_cache and not sequence.was_admitted:
                self.model.stats.queries += sequence.num_tokens
                self.model.stats.hits += len(hits) * size
                self.model.stats.host_hits += len(set(hits) & set(self.model.host)) * size
        self.model.admit(sequence.seq_id, num_tokens, hits, num_computed)
        covered["hits behind the window"] += len(hits) > behind > 0
        moved = [t for t in list(self.manager.transfers)[num_transfers:] if t.kind is TransferKind.LOAD]
        assert [t.source + self.manager.num_blocks for t in moved] == loaded
        assert all(t.sequence is sequence for t in moved)
        covered["hits in the second tier"] += bool(loaded)
        targets = {t.source + self.manager.num_blocks: t.target for t in moved}
        prefix = [targets.get(block, block) for block in prefix]
        sequence.was_admitted = True
        covered["cache hits"] += bool(hits)
        covered["cache hits under colliding hashes"] += bool(hits) and self.collides
        assert sequence.status is SequenceStatus.RUNNING
        self.waiting.remove(sequence)
        self.running.append(sequence)
        assert sequence.block_table[: max(behind, len(prefix))] == [GIVEN_BACK] * behind + prefix[behind:]
        assert len(sequence.block_table) == -(-num_tokens // size)
        assert sequence.num_computed_tokens < sequence.num_tokens, "no token is left to compute"

    def _wants_slot(self, sequence: Sequence) -> bool:
        """Whether its last token is the only one without a slot of its own."""
        last = sequence.num_tokens - 1
        return sequence.num_computed_tokens == last >= sequence.num_slots

    def _can_fork(self, sequence: Sequence) -> bool:
        return sequence.num_computed_tokens >= max(1, sequence.num_tokens - 1)

    def _grow(self, sequence: Sequence) -> None:
        """Where the last block is shared, the content moves to one of its own."""
        index = (sequence.num_tokens - 1) // self.manager.block_size
        needs = self.model.needs_block(sequence.seq_id, index)
        can_grow = self.manager.can_grow(sequence)
        assert can_grow == (not needs or self.model.num_free > 0)
        if not can_grow:
            return
        before, transfers = list(sequence.block_table), self._moved_for_sequences()
        self.manager.grow(sequence)
        after = sequence.block_table
        if needs and self.model.grow(sequence.seq_id, index):
            transfers.append(Transfer(TransferKind.COPY, before[index], after[index], sequence))
            assert after == [*before[:index], after[index], *before[index + 1 :]]
            assert after[index] != before[index]
            covered["copies"] += 1
        else:
            assert after[: len(before)] == before
            assert len(after) == len(before) + needs
        self.manager.grow(sequence)
        assert self._moved_for_sequences() == transfers, "growing twice for one token changes nothing"
        assert sequence.num_slots >= sequence.num_tokens

    def _moved_for_sequences(self) -> list[Transfer]:
        """What is not: blocks that are offloaded, whose content the memory shows to be in the right place."""
        return [transfer for transfer in self.manager.transfers if transfer.kind is not OFFLOAD]

    def _decode_all(self, tokens: list[int]) -> None:
        """What comes after one step of each, as far as blocks go."""
        for token, sequence in zip(tokens, list(self.running), strict=False):
            if sequence.num_computed_tokens == sequence.num_tokens:
                sequence.token_ids.append(token)
            if self._wants_slot(sequence):
                self._grow(sequence)
        self._compute(dict.fromkeys(self.running, 1))

    def _transfer(self) -> None:
        while self.manager.transfers:
            self.memory.move(self.manager.transfers[0])
            self.manager.transferred()

    def _compute(self, counts: dict[Sequence, int]) -> None:
        self._transfer()
        self.computed_positions_hold_the_sequences_own_prefix()
        writes: set[tuple[int, int]] = set()
        ends: dict[Sequence, int] = {}
        for sequence, count in counts.items():
            start = sequence.num_computed_tokens
            ends[sequence] = max(start, min(start + count, sequence.num_tokens, sequence.num_slots))
            for position in range(start, ends[sequence]):
                index, slot = divmod(position, self.manager.block_size)
                written = sequence.block_table[index], slot
                assert written not in writes, "two sequences write to one slot"
                writes.add(written)
            self.memory.write(sequence, start, ends[sequence])
        for sequence, end in ends.items():
            sequence.num_computed_tokens = end
            self.manager.register(sequence)
            salt = sequence.sampling_params.cache_salt
            self.model.computed(sequence.seq_id, salt, tuple(sequence.token_ids[:end]))
            self.manager.check()

    def _free(self, sequence: Sequence) -> None:
        self.manager.free(sequence)
        self.model.free(sequence.seq_id)
        assert sequence.block_table == sequence.swap_table == []
        assert sequence.num_computed_tokens == 0

    def _expected_hits(self, sequence: Sequence) -> list[Cached]:
        """Never the last token, nor what had not been computed when it was swapped out."""
        if not self.model.caches or not (sequence.reads_cache or sequence.swap_table):
            return []
        usable = sequence.num_computed_tokens if sequence.swap_table else sequence.num_tokens - 1
        return self.model.hits(sequence.sampling_params.cache_salt, tuple(sequence.token_ids[:usable]))

    @staticmethod
    def _pick(sequences: list[Sequence], pick: int) -> Sequence:
        return sequences[pick % len(sequences)]


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=2000, stateful_step_count=40)
