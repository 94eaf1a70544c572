"""Who makes way: when memory runs out, and before that where a policy wants it."""

from collections.abc import Iterable

from pagellm.engine.scheduling.policies.policy import Policy
from pagellm.engine.scheduling.policies.views import SchedulerStats, SequenceView


class VictimPolicy(Policy):
    """The last to arrive makes way, and nobody does while there is memory."""

    def victim(self, candidates: list[SequenceView], stats: SchedulerStats) -> SequenceView:
        """Which of the running sequences gives up its blocks when memory runs out."""
        return max(candidates, key=lambda sequence: sequence.arrival_index)

    def make_way(
        self, candidates: list[SequenceView], first: SequenceView, stats: SchedulerStats
    ) -> Iterable[SequenceView]:
        """Which of the running sequences give up their places now, though memory is not out.

        Asked at the beginning of a step while somebody waits; `first` would be the next to be admitted. Those
        that make way wait in the policy's order, and are not admitted again in the same step unless nothing
        else can be computed.
        """
        return ()


VICTIM_POLICIES: dict[str, type[VictimPolicy]] = {"youngest": VictimPolicy}
