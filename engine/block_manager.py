"""The KV cache's blocks: who holds which, which are free, and which of them hold a known prefix.

A pure state machine over block numbers and token ids; where a block's keys and values lie is the runner's
business. Every operation on a block is O(1).

The prefix cache is a map from a hash to a full block. A block's hash is chained to that of the block before
it, so it stands for the whole prefix. A hit counts only if the block holds exactly these tokens and follows
the very block that was hit before; so a collision costs a miss, never a wrong answer. Free blocks keep their
content until they are taken for something else, least recently used first. A sequence releases its blocks
last to first, hence a block is always evicted before the one it follows.
"""

from array import array
from collections.abc import Callable, Iterator

import xxhash

from engine.sequence import Sequence

_NONE = -1


def chained_hash(previous: int, tokens: bytes) -> int:
    """The hash of a block whose predecessor has hash `previous` (0 for the first): xxHash's XXH3, 64 bits."""
    return int(xxhash.xxh3_64_intdigest(tokens, previous))


class _FreeList:
    """A queue of block numbers that any member can leave in O(1): a doubly linked list in two arrays."""

    def __init__(self, num_blocks: int) -> None:
        end = num_blocks  # a sentinel that closes the ring
        self._next = array("q", [*range(1, num_blocks + 1), 0])
        self._previous = array("q", [end, *range(num_blocks)])
        self._end = end
        self._size = num_blocks

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        block = self._next[self._end]
        while block != self._end:
            yield block
            block = self._next[block]

    def pop_first(self) -> int:
        block: int = self._next[self._end]
        self.remove(block)
        return block

    def remove(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self._size -= 1

    def append(self, block: int) -> None:
        self._insert(block, self._previous[self._end], self._end)

    def prepend(self, block: int) -> None:
        self._insert(block, self._end, self._next[self._end])

    def _insert(self, block: int, before: int, after: int) -> None:
        self._previous[block], self._next[block] = before, after
        self._next[before] = self._previous[after] = block
        self._size += 1


class BlockManager:
    """Owns one invariant, conservation: a block is free or referenced, and never counted twice.

    hash_block: replaces `chained_hash`, so that tests can make it collide.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        hash_block: Callable[[int, bytes], int] = chained_hash,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._hash_block = hash_block
        self._free = _FreeList(num_blocks)
        self._reference_counts = array("q", bytes(8 * num_blocks))
        self._holders: dict[int, Sequence] = {}  # by seq_id: the sequences with a block table
        # The prefix cache: what each registered block holds, and the block that holds each hash.
        self._cached: dict[int, int] = {}
        self._contents: dict[int, tuple[int, int, bytes]] = {}  # block: (hash, block before it, tokens)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence references, whether they hold a known prefix or not."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that a sequence without blocks can begin with; changes nothing.

        At least the last token is left to be computed, because its logits are wanted.
        """
        blocks: list[int] = []
        if not self.enable_prefix_caching or not sequence.reads_cache:
            return blocks
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._lookup(sequence, index, blocks[-1] if blocks else _NONE)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_allocate(self, sequence: Sequence, prefix: list[int]) -> bool:
        """Whether all tokens of a sequence without blocks fit beside what is referenced now."""
        reused = sum(1 for block in prefix if self._reference_counts[block] == 0)
        return self.blocks_for(sequence.num_tokens) - len(prefix) + reused <= len(self._free)

    def allocate(self, sequence: Sequence, prefix: list[int]) -> None:
        """Gives a sequence without blocks its cached prefix and new blocks for the rest of its tokens."""
        for block in prefix:
            self._reference(block)
        sequence.block_table.extend(prefix)
        sequence.num_registered_blocks = len(prefix)
        sequence.num_computed_tokens = len(prefix) * self.block_size
        for _ in range(self.blocks_for(sequence.num_tokens) - len(prefix)):
            sequence.block_table.append(self._take())
        self._holders[sequence.seq_id] = sequence

    def can_grow(self, sequence: Sequence) -> bool:
        """Whether a running sequence has, or can get, a slot for its last token."""
        return len(sequence.block_table) * self.block_size >= sequence.num_tokens or len(self._free) > 0

    def grow(self, sequence: Sequence) -> None:
        """Gives a running sequence a slot for its last token."""
        if len(sequence.block_table) * self.block_size < sequence.num_tokens:
            sequence.block_table.append(self._take())

    def register(self, sequence: Sequence) -> None:
        """Enters the sequence's full computed blocks into the prefix cache.

        Where another block already holds the same prefix, the sequence takes that one over and gives its own
        back: their bits are equal, because a token's keys and values depend on the tokens before it alone.
        """
        if not self.enable_prefix_caching:
            return
        table = sequence.block_table
        full = sequence.num_computed_tokens // self.block_size
        for index in range(sequence.num_registered_blocks, full):
            block, before = table[index], table[index - 1] if index else _NONE
            if before != _NONE and before not in self._contents:
                break  # a collision broke the chain: nothing behind it could ever be found
            known = self._lookup(sequence, index, before)
            if known is not None:
                self._reference(known)
                table[index] = known
                self._release(block)
            elif (block_hash := sequence.block_hashes[index]) not in self._cached:
                self._cached[block_hash] = block
                self._contents[block] = (block_hash, before, self._tokens(sequence, index))
        sequence.num_registered_blocks = full

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks from a sequence; those in the prefix cache stay findable until they are reused."""
        if self._holders.pop(sequence.seq_id, None) is None:
            return
        for block in reversed(sequence.block_table):
            self._release(block)
        sequence.block_table.clear()
        sequence.num_registered_blocks = 0
        sequence.num_computed_tokens = 0

    def check(self) -> None:
        """Asserts conservation and that the prefix cache names no block that holds anything else."""
        free = list(self._free)
        assert len(free) == len(set(free)) == len(self._free), "the free list names a block twice"
        counts = [0] * self.num_blocks
        for sequence in self._holders.values():
            for block in sequence.block_table:
                counts[block] += 1
            assert len(set(sequence.block_table)) == len(sequence.block_table), "a block twice in one table"
        assert counts == list(self._reference_counts), "a reference count differs from the block tables"
        assert {block for block in range(self.num_blocks) if counts[block] == 0} == set(free)
        assert len(self._cached) == len(self._contents)
        position = {block: place for place, block in enumerate(free)}
        for block, (block_hash, before, tokens) in self._contents.items():
            assert self._cached[block_hash] == block, "a hash names another block"
            before_hash = self._contents[before][0] if before != _NONE else 0
            assert self._hash_block(before_hash, tokens) == block_hash, "a hash is not that of the content"
            if before in position:
                outlives = block not in position or position[block] > position[before]
                assert not outlives, "a block would outlive the one it follows"
        for sequence in self._holders.values():
            for index in range(sequence.num_computed_tokens // self.block_size):
                content = self._contents.get(sequence.block_table[index])
                assert content is None or content[2] == self._tokens(sequence, index), "wrong tokens"

    def _tokens(self, sequence: Sequence, index: int) -> bytes:
        start = index * self.block_size
        return array("i", sequence.token_ids[start : start + self.block_size]).tobytes()

    def _block_hash(self, sequence: Sequence, index: int) -> int:
        """The hash of a full block of the sequence's tokens; each is computed once."""
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            previous = hashes[-1] if hashes else 0
            hashes.append(self._hash_block(previous, self._tokens(sequence, len(hashes))))
        return hashes[index]

    def _lookup(self, sequence: Sequence, index: int, before: int) -> int | None:
        """The cached block that holds the sequence's block `index` behind block `before`."""
        block = self._cached.get(self._block_hash(sequence, index))
        if block is None:
            return None
        _, cached_before, tokens = self._contents[block]
        if cached_before != before or tokens != self._tokens(sequence, index):
            return None
        return block

    def _take(self) -> int:
        """A free block for new content; what it held is forgotten."""
        block = self._free.pop_first()
        content = self._contents.pop(block, None)
        if content is not None:
            del self._cached[content[0]]
        self._reference_counts[block] = 1
        return block

    def _reference(self, block: int) -> None:
        if self._reference_counts[block] == 0:
            self._free.remove(block)
        self._reference_counts[block] += 1

    def _release(self, block: int) -> None:
        self._reference_counts[block] -= 1
        if self._reference_counts[block] == 0:
            if block in self._contents:
                self._free.append(block)
            else:
                self._free.prepend(block)
