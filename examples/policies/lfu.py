"""Least frequently used: the block that the fewest requests began with goes first; of equals the LRU.

Aho, Denning and Ullman, "Principles of Optimal Page Replacement", Journal of the ACM 18(1), 1971.
"""

from pagellm import EvictionPolicy


class LFU(EvictionPolicy):
    def order(self, block):
        return block.hits, block.last_used
