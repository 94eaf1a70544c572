"""Multi-level feedback queue with skip-join: long prompts begin at a lower level, long answers sink.

Wu et al., "Fast Distributed Inference Serving for Large Language Models" (FastServe), arXiv:2305.05920.
"""

from pagellm import SchedulingPolicy


class MLFQ(SchedulingPolicy):
    LEVELS = (512, 2048, 8192)  # tokens computed, from which on a request is one level lower
    STARVED_S = 30.0  # who has waited for so long is at the highest level again

    def level(self, sequence, stats):
        tokens = sequence.num_prompt_tokens + sequence.num_output_tokens
        starved = sequence.num_computed_tokens == 0 and stats.now - sequence.arrival_time > self.STARVED_S
        return 0 if starved else sum(tokens >= limit for limit in self.LEVELS)

    def order(self, sequence, stats):
        return self.level(sequence, stats), sequence.arrival_index

    def make_way(self, candidates, first, stats):
        """One of the lowest level makes way for one of a higher level that finds no room."""
        lowest = max(candidates, key=lambda sequence: self.order(sequence, stats))
        is_full = stats.num_free_blocks * stats.block_size < first.num_tokens
        return [lowest] if is_full and self.level(first, stats) < self.level(lowest, stats) else []
