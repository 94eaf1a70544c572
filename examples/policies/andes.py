"""Quality of experience: whoever reads ahead of its answer goes first, whoever has a store of it makes way.

Liu et al., "Andes: Defining and Enhancing Quality-of-Experience in LLM-Based Text Streaming Services",
arXiv:2404.16283. Here a request's slack stands for the gain in QoE that the paper's knapsack weighs.
"""

from pagellm import SchedulingPolicy


class Andes(SchedulingPolicy):
    order_changes = "always"  # because time passes
    TTFT_S, TOKENS_PER_S = 1.0, 4.8  # what a reader expects
    STORE_S = 10.0  # so far ahead of its reader a request can pause

    def slack(self, sequence, stats):
        """Seconds until the reader has read all that there is."""
        read_until = sequence.arrival_time + self.TTFT_S + sequence.num_output_tokens / self.TOKENS_PER_S
        return read_until - stats.now

    def order(self, sequence, stats):
        return self.slack(sequence, stats)

    def make_way(self, candidates, first, stats):
        if self.slack(first, stats) > 0:
            return []
        ahead = max(candidates, key=lambda sequence: self.slack(sequence, stats))
        return [ahead] if self.slack(ahead, stats) > self.STORE_S else []
