"""Who makes way: the one with the least to compute again, of those that were preempted least.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023,
section 4.5, weighs recomputation against swapping; this makes the recomputation small.
"""

from pagellm import VictimPolicy


class LeastLost(VictimPolicy):
    def victim(self, candidates, stats):
        return min(candidates, key=lambda s: (s.num_preemptions, s.num_computed_tokens, -s.arrival_index))
