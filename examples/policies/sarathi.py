"""Stall-free batching: decodes first, and prompts in chunks that keep a step's time within bounds.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024.
"""

from pagellm import BudgetPolicy


class Sarathi(BudgetPolicy):
    TOKENS = 512  # of a step: the largest with which a step keeps the wanted time between tokens
    TILE = 64  # chunks are whole tiles of the matrix products

    def budget(self, most, decodes, prefills, stats):
        left = max(self.TILE, self.TOKENS - len(decodes)) // self.TILE * self.TILE
        return len(decodes) + left, left
