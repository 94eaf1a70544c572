"""How many tokens a step computes, and how they are shared out: its budget and the size of chunks."""

from pagellm.engine.scheduling.policies.policy import Policy
from pagellm.engine.scheduling.policies.views import SchedulerStats, SequenceView


class BudgetPolicy(Policy):
    """As many tokens in every step as the settings allow."""

    def budget(
        self,
        most: tuple[int, int],
        decodes: list[SequenceView],
        prefills: list[SequenceView],
        stats: SchedulerStats,
    ) -> tuple[int, int]:
        """Tokens of the step that begins, and of one chunk of a prompt in it; asked at every step.

        most: the settings' max_num_batched_tokens and max_prefill_chunk, beyond which nothing goes. decodes:
        running sequences of which one token is to be computed; each of them is, whatever the budget.
        prefills: running sequences that still have a part of their prompts before them. Those that wait begin
        with what these leave. A budget that leaves no token to anybody counts as one token.
        """
        return most


class StallFree(BudgetPolicy):
    """A quarter of the step's tokens for prompts beside decodes, so that no next token is long in coming.

    A step takes about as long as its tokens take one by one, so that small chunks cost next to nothing.
    Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024.
    """

    _FEWEST = 64  # with fewer, reading the weights would count

    def budget(
        self,
        most: tuple[int, int],
        decodes: list[SequenceView],
        prefills: list[SequenceView],
        stats: SchedulerStats,
    ) -> tuple[int, int]:
        """All of them where nobody decodes."""
        num_tokens, chunk = most
        if decodes:
            num_tokens = len(decodes) + max(num_tokens // 4, self._FEWEST)
        return num_tokens, chunk


BUDGET_POLICIES: dict[str, type[BudgetPolicy]] = {"full": BudgetPolicy, "stall_free": StallFree}
