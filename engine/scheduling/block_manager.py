"""The KV cache's blocks: who holds which, which are free, and which of them hold a known prefix.

A pure state machine over block numbers and token ids; where a block's keys and values lie is the runner's
business, and so is moving them: an operation that needs content moved enters `Transfer`s into `transfers`,
which must be done in that order before anything is computed. Every operation on a block is O(1).

The prefix cache is a hash map from a full block's tokens to the block. A block's hash is chained to that of
the block before it, so it stands for the whole prefix. A hit counts only if the block holds exactly these
tokens and follows the very block that was hit before; so a collision is never a wrong answer. Free blocks
keep their content until they are taken for something else, least recently used first or as an eviction policy
says. A sequence releases its blocks last to first, hence the least recently used one is never followed by
another: a block is always evicted before the one it follows.

A model whose layers all have a sliding window never reads again what lies behind the widest one. Such blocks
are given back as a sequence goes on; its table keeps its indices, with `GIVEN_BACK` in their places. They can
still be found, as other free blocks can. A hit still takes the whole prefix to be known, because each block
is confirmed behind the one before; but of a hit, too, only what is not behind the window is held. Where a
block is evicted that others follow, they are forgotten with it.

Forked sequences share their blocks. One that is about to write into a shared block gets a copy of its own
(copy-on-write). A second tier of blocks takes the content of sequences that are swapped out.

With `offloads` the second tier takes cached blocks, too, when they are evicted from the first: a prefix is
found in either, and what a sequence needs of it is moved back. A known prefix is in one tier at a time.
Swapped sequences go before cached blocks there, and of these the least recently used make room.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import NamedTuple

import xxhash

from pagellm.engine.scheduling.block_checks import check_blocks
from pagellm.engine.scheduling.block_usage import BlockUsage, count_usage
from pagellm.engine.scheduling.block_window import BlockWindow
from pagellm.engine.scheduling.free_list import FreeList
from pagellm.engine.scheduling.policies import CheckedPolicies
from pagellm.engine.scheduling.prefix_cache import ROOT, CacheObserver, PrefixCache
from pagellm.engine.scheduling.ranked_blocks import RankedBlocks
from pagellm.engine.scheduling.sequence import GIVEN_BACK, Sequence


class TransferKind(Enum):
    """What is done to a block's content."""

    COPY = "copy"  # block to block
    SWAP_OUT = "swap_out"  # block to swap block
    SWAP_IN = "swap_in"  # swap block to block
    OFFLOAD = "offload"  # block that is evicted to swap block
    LOAD = "load"  # swap block that was hit to block


_OF_CACHE = (TransferKind.OFFLOAD, TransferKind.LOAD)


class Transfer(NamedTuple):
    """The content of block `source` is to be written into block `target`.

    sequence: on whose behalf; None where a block is offloaded, for whoever will want it.
    """

    kind: TransferKind
    source: int
    target: int
    sequence: Sequence | None


@dataclass
class PrefixCacheStats:
    """Tokens since the start. Sequences that come back are not counted again."""

    queries: int = 0  # of prompts that were looked up
    hits: int = 0  # of them found, in either tier
    evictions: int = 0  # forgotten to make room
    host_hits: int = 0  # found in the second tier
    offloads: int = 0  # moved there, to make room


# The hash of a block: of its tokens and of the hash of the block before it, with xxHash's XXH3, 64 bits.
HashBlock = Callable[[bytes, int], int]
chained_hash: HashBlock = xxhash.xxh3_64_intdigest


class BlockManager:
    """Owns one invariant, conservation: a block is free or referenced, and never counted twice.

    num_swap_blocks: blocks of the second tier. hash_block: replaces `chained_hash`, so that tests can make it
    collide. window: the tokens that the widest window of all layers holds; 0 where a layer sees everything.
    offloads: whether cached blocks that are evicted go to the second tier.

    Where the second tier's blocks stand beside the first's, as in `PrefixCache`, its block b is number
    num_blocks + b.

    transfers: what is still to be moved, in order. They outlive a step that was given up, because the block
    tables count on them.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        num_swap_blocks: int = 0,
        hash_block: HashBlock = chained_hash,
        window: int = 0,
        offloads: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_swap_blocks = num_swap_blocks
        self.window = BlockWindow(window, block_size)
        self.stats = PrefixCacheStats()
        # Whether full blocks are to be entered into the cache, or given back behind the window.
        self.registers = enable_prefix_caching or window > 0
        self.num_releases = 0  # how often a block became free: what did not fit before may fit after
        self.offloads = offloads and enable_prefix_caching and num_swap_blocks > 0
        self._hash_block = hash_block
        self._free: FreeList | RankedBlocks = FreeList(num_blocks)
        self._ranked: RankedBlocks | None = None  # the same, where an eviction policy is asked
        self._policies: CheckedPolicies | None = None
        self._reference_counts = array("i", [0]) * (num_blocks + num_swap_blocks)
        self._cache = self._new_cache(window > 0)
        self._forgets_one = not window and not self.offloads  # an evicted block, and none with it
        self._free_swap = FreeList(num_swap_blocks)  # that no swapped sequence holds
        self.transfers: deque[Transfer] = deque()
        # By seq_id: the sequences with blocks in the first tier and in the second.
        self._holders: dict[int, Sequence] = {}
        self._swapped: dict[int, Sequence] = {}
        self._changed_tables: dict[Sequence, int] = {}  # the first index that changed
        self._num_references = 0
        self._partly_shared: set[int] = set()  # blocks of which a fork took over fewer slots than all

    def evict_by(self, policies: CheckedPolicies) -> None:
        """Lets the eviction policy of several say which blocks are given up first, before any is used."""
        self._policies = policies
        if policies.ranks_blocks and self.enable_prefix_caching:
            assert self._free.size == self.num_blocks, "blocks are in use"
            self._cache = self._new_cache(knows_followers=True)
            self._ranked = RankedBlocks(self.num_blocks, self._cache, policies, self.window.tokens > 0)
            self._free = self._ranked
            self._forgets_one = False

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence references, whether they hold a known prefix or not."""
        return self._free.size

    @property
    def num_shared(self) -> int:
        """References to blocks beyond the first of each."""
        return self._num_references - self.num_blocks + self._free.size

    @property
    def num_cached_blocks(self) -> int:
        """Blocks of the first tier that hold a known prefix, whether a sequence references them or not."""
        return len(self._cache) - self._cache.num_offloaded

    @property
    def num_offloaded_blocks(self) -> int:
        """Blocks of the second tier that hold a known prefix."""
        return self._cache.num_offloaded

    @property
    def num_changes(self) -> int:
        """How often the prefix cache has come to know a block, or forgotten one."""
        return self._cache.num_changes

    @property
    def num_free_swap_blocks(self) -> int:
        """Blocks of the second tier that no swapped sequence holds; they may hold a known prefix."""
        return self._free_swap.size

    @property
    def num_swapped(self) -> int:
        """Sequences whose content is in the second tier."""
        return len(self._swapped)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def held_blocks(self, num_computed: int) -> int:
        """Blocks that hold the computed tokens of a sequence and are not given back."""
        return self.blocks_for(num_computed) - self.window.num_behind(num_computed)

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks of either tier that a sequence without blocks can begin with; changes nothing.

        At least the last token is left to be computed, because its logits are wanted. Of a swapped sequence's
        tokens, those count that it has computed.
        """
        blocks: list[int] = []
        before = ROOT
        for index in range(self._most_cached(sequence)):
            block = self._find(sequence, index, before)
            if block is None:
                break
            blocks.append(block)
            before = block
        return blocks

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Tokens that the cache has of a sequence without blocks.

        What was found last is remembered with the block that it ended with. As long as the cache knows that
        block, it knows all that come before it, so only what follows is looked for.
        """
        most = self._most_cached(sequence)
        count, block, known_as = sequence.cached_hint
        if not 0 < count <= most or self._cache.known_since(block) != known_as:
            count, block = 0, ROOT
        while count < most:
            following = self._find(sequence, count, block)
            if following is None:
                break
            count, block = count + 1, following
        sequence.cached_hint = count, block, self._cache.known_since(block) if count else 0
        return count * self.block_size

    def num_offloaded_tokens(self, prefix: list[int]) -> int:
        """Tokens of a cached prefix that lie in the second tier."""
        return self.block_size * sum(1 for block in prefix if block >= self.num_blocks)

    def prompt_hashes(self, sequence: Sequence) -> list[int]:
        """The hashes of the blocks that a sequence could begin with if the cache knew all of them."""
        count = (sequence.num_prompt_tokens - 1) // self.block_size
        return [self._block_hash(sequence, index) for index in range(count)]

    def prefix_grew(self, sequence: Sequence, prefix: list[int]) -> bool:
        """Whether `cached_prefix` may find more than the prefix that it found before."""
        index = len(prefix)
        if not self.enable_prefix_caching or (index + 1) * self.block_size >= sequence.num_tokens:
            return False
        return self._find(sequence, index, prefix[-1] if prefix else ROOT) is not None

    def can_allocate(
        self, num_tokens: int, prefix: list[int], spare: int = 0, num_computed: int | None = None
    ) -> bool:
        """Whether `num_tokens` tokens that begin with cached blocks fit and leave `spare` blocks free.

        num_computed: tokens that are computed then, if there are more than the cached ones.
        """
        num_reused = len(prefix)
        if self.window.tokens:
            behind = self.window.num_behind(num_computed or len(prefix) * self.block_size)
            prefix, num_reused = prefix[behind:], max(behind, num_reused)
        reused = sum(1 for block in prefix if self._reference_counts[block] == 0) if prefix else 0
        return self.blocks_for(num_tokens) - num_reused + reused + spare <= self._free.size

    def allocate(self, sequence: Sequence, prefix: list[int], num_tokens: int) -> None:
        """Gives a sequence without blocks its cached prefix and new blocks, `num_tokens` tokens in all.

        What it has computed elsewhere (see `hand_over`) is taken to be in them.
        """
        if self.enable_prefix_caching and sequence.reads_cache and not sequence.was_admitted:
            self.stats.queries += sequence.num_tokens
            self.stats.hits += len(prefix) * self.block_size
            if self.offloads:
                self.stats.host_hits += self.num_offloaded_tokens(prefix)
        sequence.num_computed_tokens = max(sequence.num_computed_tokens, len(prefix) * self.block_size)
        self._fill_table(sequence, prefix, num_tokens)

    def can_grow(self, sequence: Sequence, num_tokens: int | None = None) -> bool:
        """Whether a running sequence has, or can get, a slot of its own for each token to be computed.

        num_tokens: up to which; None: all.
        """
        num_tokens = num_tokens or len(sequence.token_ids)
        if self._free.size >= num_tokens - sequence.num_computed_tokens:
            return True  # a token takes one block at most
        num_new = self.blocks_for(num_tokens) - len(sequence.block_table)
        return max(0, num_new) + self.needs_copy(sequence) <= self._free.size

    def would_offload(self, count: int) -> bool:
        """Whether to take so many free blocks would move what one of them holds to the second tier."""
        if not self.offloads:
            return False
        if self._ranked is not None:
            return count > self._ranked.num_empty
        return any(map(self._knows, islice(self._free, count)))

    def needs_copy(self, sequence: Sequence) -> bool:
        """Whether the next token to be computed lies in a block that is not its own to write into.

        That is one that others hold, and one that is known: a fork may have less of its parent's block than
        its parent had computed.
        """
        index = sequence.num_computed_tokens // self.block_size
        table = sequence.block_table
        if index == len(table):
            return False
        return self._reference_counts[table[index]] > 1 or self._knows(table[index])

    def grow(self, sequence: Sequence, num_tokens: int | None = None) -> None:
        """Gives a running sequence a slot of its own for each token to be computed.

        num_tokens: up to which; None: all. A shared block with room for the first of them is exchanged for a
        copy.
        """
        num_tokens = num_tokens or len(sequence.token_ids)
        table = sequence.block_table
        if self.needs_copy(sequence):
            index = sequence.num_computed_tokens // self.block_size
            shared, table[index] = table[index], self._take()
            self._release((shared,))
            self.transfers.append(Transfer(TransferKind.COPY, shared, table[index], sequence))
            self._note_change(sequence, index)
        while len(table) * self.block_size < num_tokens:
            self._note_change(sequence, len(table))
            table.append(self._take())
        sequence.num_slots = len(table) * self.block_size

    def can_fork(self, parent: Sequence, num_tokens: int) -> bool:
        """Whether a running sequence still has the blocks that its first `num_tokens` tokens need."""
        behind = self.window.num_behind
        return behind(num_tokens) == behind(parent.num_computed_tokens)

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Gives a sequence without blocks those of a running one that hold the tokens both begin with.

        num_tokens: how many these are; the parent must have computed them, and the child have more. They
        share every block until one of them writes into it.
        """
        full = num_tokens // self.block_size
        child.block_table.extend(parent.block_table[: self.blocks_for(num_tokens)])
        held = child.block_table[self.window.num_behind(num_tokens) :]
        for block in held:
            self._reference_counts[block] += 1
        self._num_references += len(held)
        if num_tokens % self.block_size:
            self._partly_shared.add(child.block_table[-1])
        child.block_hashes = parent.block_hashes[:full]
        child.num_computed_tokens = child.num_slots = num_tokens
        child.num_registered_blocks = min(parent.num_registered_blocks, full)
        parent.num_slots = min(parent.num_slots, parent.num_computed_tokens)
        self._holders[child.seq_id] = child
        self._note_change(child, 0)

    def register(self, sequence: Sequence) -> None:
        """Enters the sequence's full computed blocks into the prefix cache; gives back what lies behind.

        Where another block already holds the same prefix, the sequence takes that one over and gives its own
        back: their bits are equal, because a token's keys and values depend on the tokens before it alone.
        """
        full = sequence.num_computed_tokens // self.block_size
        if self.enable_prefix_caching:
            self._offer_blocks(sequence, full)
        sequence.num_registered_blocks = full
        if self.window.tokens:
            self._give_back(sequence)

    def _offer_blocks(self, sequence: Sequence, full: int) -> None:
        table, salt = sequence.block_table, sequence.sampling_params.cache_salt
        index = sequence.num_registered_blocks
        while index < full:
            before = table[index - 1] if index else ROOT
            if before == GIVEN_BACK or (before != ROOT and before not in self._cache):
                break  # the cache has forgotten it: nothing that follows it could ever be found
            self._block_hash(sequence, full - 1)
            blocks, hashes = table[index:full], sequence.block_hashes[index:full]
            run = sequence.token_ids[index * self.block_size : full * self.block_size].tobytes()
            num_added = self._cache.add(blocks, hashes, before, run, salt)
            if self._ranked is not None:
                for depth, block in enumerate(blocks[:num_added], index):
                    self._ranked.became_known(block, depth)
            index += num_added
            if index == full:
                break
            block = table[index]
            known = self._find(sequence, index, table[index - 1] if index else ROOT)
            assert known is not None
            if known >= self.num_blocks:  # it has been computed again
                self._cache.move(known, block)
                self._free_swap.remove(known - self.num_blocks)
                self._free_swap.prepend(known - self.num_blocks)
                if self._ranked is not None:
                    self._ranked.became_known(block, index)
            elif known != block:
                self._reference(known)
                table[index] = known
                self._release((block,))
                self._note_change(sequence, index)
            index += 1

    def _give_back(self, sequence: Sequence) -> None:
        """Takes from a sequence what lies behind the window, the last block first."""
        table = sequence.block_table
        index = end = self.window.num_behind(sequence.num_computed_tokens)
        while index > 0 and table[index - 1] != GIVEN_BACK:
            index -= 1
            self._release((table[index],))
            table[index] = GIVEN_BACK
        if index < end:
            self._note_change(sequence, index)

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks from a sequence; those in the prefix cache stay findable until they are reused."""
        if sequence.seq_id in self._holders:
            self._empty_table(sequence)
        elif self._swapped.pop(sequence.seq_id, None) is not None:
            for slot in sequence.swap_table:
                self._release_swap(slot)
            sequence.swap_table.clear()
        sequence.num_computed_tokens = 0

    def hand_over(self, sequence: Sequence) -> Sequence:
        """Takes a running sequence's blocks from it; returns one that keeps them until it is freed.

        The sequence keeps its computed tokens: their content goes with it, to another block manager. It must
        not come back before that one is freed.
        """
        keeper = Sequence(sequence.seq_id, sequence.token_ids, sequence.sampling_params)
        keeper.block_table, keeper.block_hashes = sequence.block_table, sequence.block_hashes
        keeper.num_computed_tokens, keeper.num_slots = sequence.num_computed_tokens, sequence.num_slots
        keeper.num_registered_blocks = sequence.num_registered_blocks
        self._holders[keeper.seq_id] = keeper
        self._changed_tables.pop(sequence, None)
        sequence.leave()
        return keeper

    def can_swap_out(self, sequence: Sequence) -> bool:
        """Whether the second tier has room for what a running sequence has computed."""
        return 0 < self.held_blocks(sequence.num_computed_tokens) <= self._free_swap.size

    def swap_out(self, sequence: Sequence) -> None:
        """Moves what a running sequence has computed to the second tier and takes all its blocks."""
        num_computed = sequence.num_computed_tokens
        first, end = self.window.num_behind(num_computed), self.blocks_for(num_computed)
        for block in sequence.block_table[first:end]:
            slot = self._take_swap()
            sequence.swap_table.append(slot)
            self.transfers.append(Transfer(TransferKind.SWAP_OUT, block, slot, sequence))
        self._empty_table(sequence)
        self._swapped[sequence.seq_id] = sequence

    def swap_in(self, sequence: Sequence, prefix: list[int], num_tokens: int) -> None:
        """Gives a swapped sequence blocks for `num_tokens` tokens; what the cache still has is not moved."""
        self._fill_table(sequence, prefix, num_tokens)
        behind = self.window.num_behind(sequence.num_computed_tokens)
        swapped = list(zip(sequence.swap_table, sequence.block_table[behind:], strict=False))
        for slot, block in swapped[max(0, len(prefix) - behind) :]:
            self.transfers.append(Transfer(TransferKind.SWAP_IN, slot, block, sequence))
        for slot in reversed(sequence.swap_table):
            self._release_swap(slot)
        sequence.swap_table.clear()
        del self._swapped[sequence.seq_id]

    def transferred(self) -> None:
        """Takes note that the first of the transfers is done, or that nobody needs it any more."""
        self.transfers.popleft()

    def give_up_offloading(self, failed: Transfer) -> list[Sequence]:
        """Forgets what is in the second tier, for a transfer to or from it has failed, and offloads no more.

        What was to be moved for the cache's sake is not moved. Returns the sequences that count on content
        which does not come now; those that hold it may have shared it.
        """
        self.offloads = False
        transfers = [failed, *self.transfers]
        targets = {transfer.target for transfer in transfers if transfer.kind is TransferKind.LOAD}
        for block in [b for b in self._cache if b >= self.num_blocks or b in targets]:
            if block in self._cache:
                self._forget(block)
        self.transfers = deque(t for t in self.transfers if t is failed or t.kind not in _OF_CACHE)
        return [s for s in self._holders.values() if not targets.isdisjoint(s.block_table)]

    def take_changed_tables(self) -> dict[Sequence, int]:
        """The sequences whose tables have changed since this was asked last, and from which index on."""
        changed, self._changed_tables = self._changed_tables, {}
        return changed

    def reset_cache(self) -> None:
        """Forgets every cached prefix; sequences keep their blocks."""
        self._cache.clear()
        if self._ranked is not None:
            self._ranked.forget_all()

    def observe_cache(self, observer: CacheObserver) -> None:
        """Lets somebody hear of what becomes known from now on and of what is forgotten."""
        self._cache.observer = observer

    def recover(self) -> None:
        """Begins anew after an operation that did not end: all blocks are free and nothing is cached.

        The sequences that had blocks are for the caller to restart; the counts of the cache go on.
        """
        new = BlockManager(
            self.num_blocks,
            self.block_size,
            self.enable_prefix_caching,
            self.num_swap_blocks,
            self._hash_block,
            self.window.tokens,
            self.offloads,
        )
        new.stats = self.stats
        if self._policies is not None:
            new.evict_by(self._policies)
        new._cache.num_changes = self._cache.num_changes + 1
        observer = self._cache.observer
        if observer is not None:
            new.observe_cache(observer)
            self._cache.tell_cleared(observer)
        vars(self).update(vars(new))

    def usage(self) -> BlockUsage:
        """Counts for a report: O(sequences that run)."""
        return count_usage(self)

    def states(self) -> bytes:
        """A byte for each block: 0 free, 1 referenced, 2 shared, and 4 more where it holds a known prefix."""
        states = bytearray(min(count, 2) for count in self._reference_counts[: self.num_blocks])
        for block in self._cache:
            if block < self.num_blocks:
                states[block] += 4
        return bytes(states)

    def check(self) -> None:
        """Asserts conservation and that the prefix cache names no block that holds anything else."""
        check_blocks(self)

    def _fill_table(self, sequence: Sequence, prefix: list[int], num_tokens: int) -> None:
        behind, table = 0, sequence.block_table
        if prefix or self.window.tokens:
            behind = self._begin_table(sequence, prefix)
        table += self._take_many(self.blocks_for(num_tokens) - len(table))
        sequence.num_registered_blocks = max(behind, len(prefix))
        sequence.num_slots = len(table) * self.block_size
        self._holders[sequence.seq_id] = sequence
        self._note_change(sequence, 0)

    def _begin_table(self, sequence: Sequence, prefix: list[int]) -> int:
        """Lets a table begin with cached blocks; returns how many of the first ones lie behind the window."""
        behind, table = self.window.num_behind(sequence.num_computed_tokens), sequence.block_table
        table.extend([GIVEN_BACK] * behind)
        table.extend(prefix[behind:])
        if self._ranked is not None:
            for block in prefix:
                if block < self.num_blocks:
                    self._ranked.hit(block)
        for block in prefix[behind:]:
            self._reference(block)
        for block in reversed(prefix[:behind]):
            if self._reference_counts[block] == 0:  # it was used, though it is not held
                free, number = self._free_place(block)
                free.remove(number)
                free.append(number)
        if self.offloads and self._cache.num_offloaded:
            self._load(sequence, prefix, behind)
        return behind

    def _load(self, sequence: Sequence, prefix: list[int], behind: int) -> None:
        """Gives a sequence blocks for what it references of the second tier, to which that is moved."""
        table = sequence.block_table
        offloaded = [index for index in range(behind, len(prefix)) if prefix[index] >= self.num_blocks]
        for index in offloaded:
            place, block = prefix[index], self._take()
            self.transfers.append(Transfer(TransferKind.LOAD, place - self.num_blocks, block, sequence))
            table[index] = block
            if place in self._cache:  # else to make room for it the cache has forgotten what it follows
                self._cache.move(place, block)
                if self._ranked is not None:
                    self._ranked.became_known(block, index)
                    self._ranked.hit(block)
        for index in reversed(offloaded):
            self._release_swap(prefix[index] - self.num_blocks)

    def _empty_table(self, sequence: Sequence) -> None:
        behind = self.window.num_behind(sequence.num_computed_tokens)
        self._release(reversed(sequence.block_table[behind:]))
        sequence.block_table.clear()
        sequence.num_registered_blocks = sequence.num_slots = 0
        del self._holders[sequence.seq_id]
        self._changed_tables.pop(sequence, None)

    def _note_change(self, sequence: Sequence, index: int) -> None:
        """Takes note that a block table is another one from an index on."""
        changed = self._changed_tables
        if changed.get(sequence, index) >= index:
            changed[sequence] = index

    def _most_cached(self, sequence: Sequence) -> int:
        """Blocks that a sequence without blocks could find in the cache at most."""
        if not self.enable_prefix_caching or not (sequence.reads_cache or sequence.swap_table):
            return 0
        num_tokens = sequence.num_computed_tokens if sequence.swap_table else sequence.num_tokens - 1
        return num_tokens // self.block_size

    def _knows(self, block: int) -> bool:
        return self.enable_prefix_caching and block in self._cache

    def _tokens(self, sequence: Sequence, index: int) -> bytes:
        start = index * self.block_size
        return sequence.token_ids[start : start + self.block_size].tobytes()

    def _root_hash(self, salt: str) -> int:
        return self._hash_block(salt.encode(), 0) if salt else 0

    def _block_hash(self, sequence: Sequence, index: int) -> int:
        """The hash of a full block of the sequence's tokens; each is computed once."""
        hashes = sequence.block_hashes
        if len(hashes) <= index:
            previous = hashes[-1] if hashes else self._root_hash(sequence.sampling_params.cache_salt)
            run = sequence.token_ids[len(hashes) * self.block_size : (index + 1) * self.block_size].tobytes()
            num_bytes, hash_block = self.block_size * sequence.token_ids.itemsize, self._hash_block
            for start in range(0, len(run), num_bytes):
                previous = hash_block(run[start : start + num_bytes], previous)
                hashes.append(previous)
        return hashes[index]

    def _find(self, sequence: Sequence, index: int, before: int) -> int | None:
        """The cached block that holds the sequence's block `index` behind block `before`."""
        block_hash = self._block_hash(sequence, index)
        tokens = self._tokens(sequence, index)
        return self._cache.find(block_hash, before, tokens, sequence.sampling_params.cache_salt)

    def _new_cache(self, knows_followers: bool) -> PrefixCache:
        num_blocks = self.num_blocks if self.enable_prefix_caching else 0
        num_swap_blocks = self.num_swap_blocks if self.offloads else 0
        return PrefixCache(num_blocks, self.block_size, knows_followers, num_swap_blocks)

    def _take(self) -> int:
        """A free block for new content; what it held is no longer in the first tier."""
        block = self._free.pop_first()
        self._reference_counts[block] = 1
        self._num_references += 1
        if self._knows(block):
            self._evict(block)
        return block

    def _take_many(self, count: int) -> list[int]:
        """Free blocks, the same as one after the other."""
        if count <= 0:
            return []
        if not self._forgets_one or not isinstance(self._free, FreeList):
            return [self._take() for _ in range(count)]  # what is evicted with one may be the next
        blocks = self._free.pop_many(count)
        if self.enable_prefix_caching:
            self.stats.evictions += self.block_size * self._cache.remove(blocks)
        counts = self._reference_counts
        for block in blocks:
            counts[block] = 1
        self._num_references += count
        return blocks

    def _evict(self, block: int) -> None:
        """Moves what a known block holds that is to be reused to the second tier, or forgets it."""
        if self._forgets_one:
            self._cache.remove((block,))
            self.stats.evictions += self.block_size
            return
        if self.offloads and self._free_swap.size:
            slot, before = self._take_swap(), self._cache.before(block)
            if block in self._cache:  # it may have followed what that slot held
                self._cache.move(block, self.num_blocks + slot)
                self.transfers.append(Transfer(TransferKind.OFFLOAD, block, slot, None))
                self.stats.offloads += self.block_size
                if self._ranked is not None:
                    self._ranked.evicted(block)
                    self._ranked.lost_follower(before)
            self._release_swap(slot)
            return
        self.stats.evictions += self.block_size * self._forget(block)

    def _forget(self, block: int) -> int:
        """Forgets a known block and all that follow it; returns how many."""
        before = self._cache.before(block)
        forgotten = self._cache.forget(block)
        for other in forgotten:
            if self._ranked is not None and other < self.num_blocks:
                self._ranked.evicted(other)
            if self._reference_counts[other] == 0:  # free blocks that hold nothing known are taken first
                free, number = self._free_place(other)
                free.remove(number)
                free.prepend(number)
        if self._ranked is not None:
            self._ranked.lost_follower(before)
        return len(forgotten)

    def _take_swap(self) -> int:
        """A block of the second tier for new content; what it held is forgotten."""
        slot = self._free_swap.pop_first()
        place = self.num_blocks + slot
        self._reference_counts[place] = 1
        if self._cache.num_offloaded and place in self._cache:
            self.stats.evictions += self.block_size * self._forget(place)
        return slot

    def _release_swap(self, slot: int) -> None:
        """Gives a block of the second tier back, which stays findable if it holds a known prefix."""
        place = self.num_blocks + slot
        self._reference_counts[place] = 0
        if self._cache.num_offloaded and place in self._cache:
            self._free_swap.append(slot)
        else:
            self._free_swap.prepend(slot)

    def _free_place(self, block: int) -> tuple[FreeList | RankedBlocks, int]:
        """The list of free blocks that one belongs into, and its number there."""
        if block < self.num_blocks:
            return self._free, block
        return self._free_swap, block - self.num_blocks

    def _reference(self, block: int) -> None:
        if block >= self.num_blocks:  # held as long as it takes to move it
            self._free_swap.remove(block - self.num_blocks)
            self._reference_counts[block] = 1
            return
        if self._reference_counts[block] == 0:
            self._free.remove(block)
        self._reference_counts[block] += 1
        self._num_references += 1

    def _release(self, blocks: Iterable[int]) -> None:
        """Takes a reference from each of some blocks, one after the other."""
        freed, counts, num_references = [], self._reference_counts, 0
        for block in blocks:
            counts[block] = count = counts[block] - 1
            num_references += 1
            if not count:
                freed.append(block)
        self._num_references -= num_references
        if not freed:
            return
        self.num_releases += len(freed)
        if self._partly_shared:
            self._partly_shared.difference_update(freed)
        caches = self.enable_prefix_caching
        self._free.extend(self._cache.known(freed) if caches else ())
        for block in self._cache.unknown(freed) if caches else freed:
            self._free.prepend(block)
