"""Belady's MIN: the block whose next use is furthest in the future goes first. It knows the trace.

Belady, "A Study of Replacement Algorithms for a Virtual-Storage Computer", IBM Systems Journal 5(2), 1966.
A bound for policies that do not know it: what is held, when, and by whom is the scheduler's, and requests
that were preempted are not foreseen.
"""

from pagellm import EvictionPolicy


class Belady(EvictionPolicy):
    needs_future = True

    def order(self, block):
        return -block.next_use, -block.depth
