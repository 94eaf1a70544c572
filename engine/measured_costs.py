"""What preemption costs on this machine, learnt from the steps that are taken."""

from dataclasses import replace

from pagellm.engine.scheduling.batch import PreemptionCosts

# How much of what was measured before a step is kept after it.
_REMEMBERED = 0.75


class MeasuredCosts:
    """`costs`: as measured last. Both are averages in which the latest count most."""

    def __init__(self, costs: PreemptionCosts) -> None:
        self.costs = costs
        self._prefill_s = self._prefill_tokens = 0.0  # of the latest steps

    def note_step(self, num_tokens: int, num_sequences: int, seconds: float) -> None:
        """Learns from steps of prompts what computing a token again would cost; large steps count most."""
        if num_tokens >= 2 * num_sequences:
            self._prefill_s = _REMEMBERED * self._prefill_s + seconds
            self._prefill_tokens = _REMEMBERED * self._prefill_tokens + num_tokens
            self.costs = replace(self.costs, recompute_token_s=self._prefill_s / self._prefill_tokens)

    def note_swaps(self, num_blocks: int, seconds: float) -> None:
        """Learns what moving a block to the second tier, or back, takes."""
        per_block = _REMEMBERED * self.costs.swap_block_s + (1 - _REMEMBERED) * seconds / num_blocks
        self.costs = replace(self.costs, swap_block_s=per_block)
