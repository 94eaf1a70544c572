"""Who is let in at all: a request is accepted, held back for now, or shed."""

from enum import StrEnum

from pagellm.engine.scheduling.policies.policy import Policy
from pagellm.engine.scheduling.policies.views import SchedulerStats, SequenceView


class Admission(StrEnum):
    """What becomes of a request that has come."""

    ACCEPT = "accept"  # it waits in the scheduling policy's order
    QUEUE = "queue"  # it is held back, and asked about again when the next step begins
    SHED = "shed"  # it ends at once, without a token


class AdmissionPolicy(Policy):
    """Everybody is accepted."""

    def admit(self, sequence: SequenceView, stats: SchedulerStats) -> str:
        """Whether a request is accepted, held back or shed: "accept", "queue" or "shed".

        Asked when the step after its arrival begins, in the order of arrival, and again at every step for
        which it is held back. Where nothing else waits or runs, the first that is held back is accepted.
        """
        return Admission.ACCEPT


ADMISSION_POLICIES: dict[str, type[AdmissionPolicy]] = {"accept": AdmissionPolicy}
