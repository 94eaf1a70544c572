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


BUDGET_POLICIES: dict[str, type[BudgetPolicy]] = {"full": BudgetPolicy}
