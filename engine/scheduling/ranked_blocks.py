"""The free blocks in the order of an eviction policy: takes the place of `FreeList` where there is one.

Knows which free blocks hold a known prefix and what policies may see of each; what a prefix is, and who holds
which block, is the block manager's business.
"""

from array import array
from collections.abc import Hashable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any

from pagellm.engine.scheduling.policies import BlockView, CheckedPolicies
from pagellm.engine.scheduling.prefix_cache import PrefixCache


class RankedBlocks:
    """Empty blocks, which are taken first, and free ones that hold a known prefix, in a policy's order.

    Of these only such are candidates as no known block follows. all_are_candidates: that does not matter,
    because those that follow are forgotten with a block.
    """

    def __init__(
        self, num_blocks: int, cache: PrefixCache, policies: CheckedPolicies, all_are_candidates: bool
    ) -> None:
        self._cache = cache
        self._policies = policies
        self._all_are_candidates = all_are_candidates
        self._empty = list(range(num_blocks - 1, -1, -1))  # a stack
        self._known: dict[int, list[Any] | None] = {}  # and the entry of a candidate
        self._heaps: dict[Hashable, list[list[Any]]] = {}  # of [key, when it became free, block or None]
        self._num_replaced = policies.num_replaced
        self._clock = 0  # counts what happens to blocks
        self._depth = array("i", [0]) * num_blocks
        self._hits = array("i", [0]) * num_blocks
        self._known_since = array("q", [0]) * num_blocks
        self._last_used = array("q", [0]) * num_blocks

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self._empty) + len(self._known)

    @property
    def num_empty(self) -> int:
        """Blocks that hold nothing known."""
        return len(self._empty)

    def __iter__(self) -> Iterator[int]:
        """The empty ones as they are taken, then the others, the first that became free first."""
        yield from reversed(self._empty)
        yield from sorted(self._known, key=self._last_used.__getitem__)

    def pop_first(self) -> int:
        """Takes out an empty block, or else the one that the policy gives up first."""
        if self._empty:
            return self._empty.pop()
        heap = self._first_heap()
        block: int = heap[0][2]
        self.remove(block)
        return block

    def remove(self, block: int) -> None:
        """Takes out a block that holds a known prefix."""
        entry = self._known.pop(block)
        if entry is not None:
            entry[2] = None

    def append(self, block: int) -> None:
        """Takes in a block that holds a known prefix and has just been used."""
        self._clock += 1
        self._last_used[block] = self._clock
        self._known[block] = None
        self._offer(block)

    def extend(self, blocks: Iterable[int]) -> None:
        """Takes in such blocks one after the other."""
        for block in blocks:
            self.append(block)

    def prepend(self, block: int) -> None:
        """Takes in a block that holds nothing known."""
        self._empty.append(block)

    def became_known(self, block: int, depth: int) -> None:
        """Takes note that the prefix cache knows a block. depth: blocks before it in its prefix."""
        self._clock += 1
        self._depth[block] = depth
        self._hits[block] = 0
        self._known_since[block] = self._last_used[block] = self._clock
        self._tell("on_known", block)

    def hit(self, block: int) -> None:
        """Takes note that a request begins with a known block."""
        self._hits[block] += 1
        self._tell("on_hit", block)

    def evicted(self, block: int) -> None:
        """Takes note that a block is given up, and what it held is no longer in the first tier."""
        self._tell("on_evict", block)

    def lost_follower(self, block: int) -> None:
        """Takes note that a block that followed this one is forgotten, or no longer in the first tier."""
        if block in self._known and self._known[block] is None:
            self._offer(block)

    def forget_all(self) -> None:
        """Takes note that the cache knows nothing any more."""
        self._empty[:0] = sorted(self._known, key=self._last_used.__getitem__, reverse=True)
        self._known.clear()
        self._heaps.clear()

    def check(self) -> None:
        """Asserts that every block that may be given up can be chosen, and no other."""
        assert not any(block in self._cache for block in self._empty)
        for block, entry in self._known.items():
            assert block in self._cache
            assert (entry is not None) == self._may_go(block), "one that others follow would be given up"
            assert entry is None or entry[2] == block
        live = [entry for heap in self._heaps.values() for entry in heap if entry[2] is not None]
        assert len(live) == sum(entry is not None for entry in self._known.values())

    def _tell(self, event: str, block: int) -> None:
        if event in self._policies.block_events:
            self._policies.on_block(event, self._view(block))

    def _view(self, block: int) -> BlockView:
        """What a policy sees of a block."""
        block_hash = self._cache.hash_of(block)
        return BlockView(
            block_hash,
            self._depth[block],
            self._hits[block],
            self._known_since[block],
            self._last_used[block],
            self._policies.next_use(block_hash),
        )

    def _may_go(self, block: int) -> bool:
        return self._all_are_candidates or not self._cache.is_followed(block)

    def _offer(self, block: int) -> None:
        """Makes a block that may be given up a candidate."""
        if not self._may_go(block):
            return
        view = self._view(block)
        queue = self._policies.block_queue(view)
        entry = [self._policies.block_order(view), self._last_used[block], block]
        self._known[block] = entry
        heap = self._heaps.setdefault(queue, [])
        heappush(heap, entry)
        if len(heap) > 2 * len(self._known) + 16:
            heap[:] = [entry for entry in heap if entry[2] is not None]
            heapify(heap)

    def _first_heap(self) -> list[list[Any]]:
        """The heap whose first one is to be given up."""
        if self._policies.num_replaced != self._num_replaced:
            self._ask_again()
        for queue, heap in list(self._heaps.items()):
            while heap and heap[0][2] is None:
                heappop(heap)
            if not heap:
                del self._heaps[queue]
        if len(self._heaps) == 1:
            return next(iter(self._heaps.values()))
        return self._heaps[min(self._heaps, key=self._policies.block_queue_order)]

    def _ask_again(self) -> None:
        """Asks anew about all: another policy answers now."""
        self._num_replaced = self._policies.num_replaced
        self._heaps.clear()
        for block in sorted(self._known, key=self._last_used.__getitem__):
            self._known[block] = None
            self._offer(block)
