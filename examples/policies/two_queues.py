"""2Q: blocks that were seen once wait in a short queue; only those that come back after it are kept by LRU.

Johnson and Shasha, "2Q: A Low Overhead High Performance Buffer Management Replacement Algorithm", VLDB 1994.
"""

from collections import OrderedDict

from pagellm import EvictionPolicy


class TwoQueues(EvictionPolicy):
    SHARE, GHOSTS = 0.25, 10_000  # of the known blocks that may be new; hashes that are remembered

    def __init__(self):
        self.new, self.old, self.ghosts = set(), set(), OrderedDict()

    def on_known(self, block):
        (self.old if block.hash in self.ghosts else self.new).add(block.hash)

    def on_evict(self, block):
        if block.hash in self.new:
            self.ghosts[block.hash] = None
            if len(self.ghosts) > self.GHOSTS:
                self.ghosts.popitem(last=False)
        self.new.discard(block.hash)
        self.old.discard(block.hash)

    def queue_of(self, block):
        return "new" if block.hash in self.new else "old"

    def queue_order(self, queue):
        too_many = len(self.new) > self.SHARE * (len(self.new) + len(self.old))
        return 0 if (queue == "new") == too_many else 1

    def order(self, block):
        return block.known_since if block.hash in self.new else block.last_used
