"""Least recently used, by the interface: the built-in eviction, which takes the same decisions.

Belady, "A Study of Replacement Algorithms for a Virtual-Storage Computer", IBM Systems Journal 5(2), 1966.
"""

from pagellm import EvictionPolicy


class LRU(EvictionPolicy):
    def order(self, block):
        return block.last_used
