"""The free blocks in the order in which they are taken; any of them can leave the queue at once."""

from array import array
from collections.abc import Iterable, Iterator


class FreeList:
    """A queue of block numbers that any member can leave in O(1): a doubly linked list in two arrays.

    size: how many there are.
    """

    def __init__(self, num_blocks: int) -> None:
        end = num_blocks  # a sentinel that closes the ring
        self._next = array("i", range(1, num_blocks + 1))
        self._next.append(0)
        self._previous = array("i", [end])
        self._previous.extend(range(num_blocks))
        self._end = end
        self.size = num_blocks

    def __iter__(self) -> Iterator[int]:
        block = self._next[self._end]
        while block != self._end:
            yield block
            block = self._next[block]

    def pop_first(self) -> int:
        """Takes out the block that stands first."""
        block: int = self._next[self._end]
        self.remove(block)
        return block

    def pop_many(self, count: int) -> list[int]:
        """Takes out the blocks that stand first, in order; there must be so many."""
        following = self._next
        blocks, block = [], following[self._end]
        for _ in range(count):
            blocks.append(block)
            block = following[block]
        following[self._end], self._previous[block] = block, self._end
        self.size -= count
        return blocks

    def remove(self, block: int) -> None:
        """Takes out a block, wherever it stands."""
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self.size -= 1

    def append(self, block: int) -> None:
        """Puts a block behind all others."""
        self._insert(block, self._previous[self._end], self._end)

    def extend(self, blocks: Iterable[int]) -> None:
        """Puts blocks behind all others, one after the other."""
        previous, following, size = self._previous, self._next, self.size
        last = previous[self._end]
        for block in blocks:
            following[last], previous[block] = block, last
            last = block
            size += 1
        following[last], previous[self._end] = self._end, last
        self.size = size

    def prepend(self, block: int) -> None:
        """Puts a block before all others."""
        self._insert(block, self._end, self._next[self._end])

    def _insert(self, block: int, before: int, after: int) -> None:
        self._previous[block], self._next[block] = before, after
        self._next[before] = self._previous[after] = block
        self.size += 1
