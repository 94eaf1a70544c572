"""Which cached block is given up when a new one is needed and none is empty."""

from collections.abc import Hashable

from pagellm.engine.scheduling.policies.policy import Key, Policy
from pagellm.engine.scheduling.policies.views import BlockView


class EvictionPolicy(Policy):
    """The least recently used first.

    Free blocks that hold a known prefix are asked about; one that others follow is never given up before
    them, because nobody could find them any more. Where there is a second tier, that is of the first alone:
    what is given up goes to the second, and a block that comes back has become known. needs_future: whether
    `BlockView.next_use` is asked for, which only the replay of a trace knows.
    """

    needs_future = False

    def order(self, block: BlockView) -> Key:
        """The sort key of a free block: a number or a tuple of numbers, the lowest is given up first.

        Asked when the block becomes free, or the last one that follows it is given up. While it is free,
        nothing changes that its view shows. Equal keys go by the time when they became free.
        """
        return block.last_used

    def queue_of(self, block: BlockView) -> Hashable:
        """The queue that a free block stands in. Most policies have one; see `queue_order`."""
        return None

    def queue_order(self, queue: Hashable) -> Key:
        """The sort key of a queue, asked whenever a block is needed; the lowest gives its first one up."""
        return 0

    def on_known(self, block: BlockView) -> None:
        """A block has become known to the prefix cache."""

    def on_hit(self, block: BlockView) -> None:
        """A request begins with a block."""

    def on_evict(self, block: BlockView) -> None:
        """A block was given up."""


EVICTION_POLICIES: dict[str, type[EvictionPolicy]] = {"lru": EvictionPolicy}
