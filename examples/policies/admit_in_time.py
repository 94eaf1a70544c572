"""Early rejection: who could not be served in time is told at once, and who might be waits at the door.

Qin et al., "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving", arXiv:2407.00079, on
overload-oriented scheduling.
"""

from pagellm import AdmissionPolicy


class AdmitInTime(AdmissionPolicy):
    TOO_MANY, MOST_S = 64, 30.0  # running requests that are enough; seconds that one may wait at the door

    def admit(self, sequence, stats):
        if stats.now - sequence.arrival_time > self.MOST_S:
            return "shed"
        return "accept" if stats.num_running < self.TOO_MANY else "queue"
