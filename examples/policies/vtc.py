"""Virtual token counter: the tenant that has been served least goes first, and idleness earns no credit.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2.
"""

from collections import Counter

from pagellm import SchedulingPolicy


class VTC(SchedulingPolicy):
    PROMPT, OUTPUT = 1, 2  # what a token of each costs

    def __init__(self):
        self.served, self.active = Counter(), Counter()

    def queue_of(self, sequence):
        return sequence.sampling_params.tenant

    def queue_order(self, queue, stats):
        return self.served[queue]

    def on_add(self, sequence, stats):
        tenant = sequence.sampling_params.tenant
        if not self.active[tenant]:
            least = min((self.served[other] for other in self.active if self.active[other]), default=0)
            self.served[tenant] = max(self.served[tenant], least)
        self.active[tenant] += 1

    def on_commit(self, batch, stats):
        for sequence, count, samples in zip(
            batch.sequences, batch.num_new_tokens, batch.samples, strict=True
        ):
            self.served[sequence.sampling_params.tenant] += self.PROMPT * count + self.OUTPUT * samples

    def on_finish(self, sequence, stats):
        self.active[sequence.sampling_params.tenant] -= 1
