"""What all policies have in common, whatever they decide."""

from pagellm.engine.scheduling.policies.views import SchedulerStats, SequenceView, StepView

Key = float | tuple[float, ...]


class Policy:
    """Hears of what happens to requests, so that it can keep a state of its own; made without arguments.

    An instance belongs to one scheduler. Its answers are to be a function of what it was told, so that a
    replay can be repeated.
    """

    def on_add(self, sequence: SequenceView, stats: SchedulerStats) -> None:
        """A new sequence was taken in."""

    def on_commit(self, batch: StepView, stats: SchedulerStats) -> None:
        """A batch was computed, which has given its `token_ids`. Called before its sequences move on."""

    def on_finish(self, sequence: SequenceView, stats: SchedulerStats) -> None:
        """A sequence ended, for whatever reason."""
