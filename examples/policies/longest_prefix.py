"""Longest prefix match: whoever has most of its prompt in the prefix cache goes first.

Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, section 3.
"""

from pagellm import SchedulingPolicy


class LongestPrefix(SchedulingPolicy):
    order_changes = "cache"  # asked again before a step if the cache knows other blocks than before

    def order(self, sequence, stats):
        return -sequence.num_cached_tokens
