"""What is still to come of a trace that is replayed, for policies that say that they need to know it."""

import math
from collections.abc import Iterable, Sequence


class Future:
    """Which blocks the requests to come begin with, by the blocks' hashes, in the order of the trace.

    requests: the hashes of the full blocks of each prompt. A request is no longer to come once it has been
    admitted, or has ended before that. Where requests with equal blocks are admitted in another order than
    the trace's, the first of them counts as admitted first.
    """

    def __init__(self, requests: Iterable[Sequence[int]]) -> None:
        self._uses: dict[int, list[int]] = {}  # the places in the trace of each block, the last one first
        for place, hashes in enumerate(requests):
            for block_hash in hashes:
                self._uses.setdefault(block_hash, []).append(place)
        for places in self._uses.values():
            places.reverse()

    def next_use(self, block_hash: int) -> float:
        """The place of the next request that begins with a block; infinite if there is none."""
        places = self._uses.get(block_hash)
        return places[-1] if places else math.inf

    def began(self, hashes: Sequence[int]) -> None:
        """Takes note that one with these blocks is no longer to come."""
        for block_hash in hashes:
            places = self._uses.get(block_hash)
            if places:
                places.pop()
                if not places:
                    del self._uses[block_hash]
