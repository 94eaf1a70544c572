"""Virtual token counter: the tenant that has been served least goes first, and idleness earns no credit.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, with the weights of its artifact. Here
a prompt is paid for as it is computed, in the paper when it is admitted.
"""

from collections import Counter

from pagellm import SchedulingPolicy


class VTC(SchedulingPolicy):
    INPUT, OUTPUT = 1, 2  # what a token of a prompt and of an answer costs

    def __init__(self):
        self.served, self.waiting, self.last_left = Counter(), {}, None

    def queue_of(self, sequence):
        return sequence.sampling_params.tenant

    def queue_order(self, queue, stats):
        return self.served[queue]

    def on_add(self, sequence, stats):
        tenant, waiting = self.queue_of(sequence), set(self.waiting.values())
        if tenant not in waiting:  # it begins where the least served one that waits is, or the last was
            least = min(self.served[other] for other in waiting or {self.last_left})
            self.served[tenant] = max(self.served[tenant], least)
        self.waiting[sequence] = tenant

    def on_commit(self, batch, stats):
        given = zip(batch.sequences, batch.num_new_tokens, batch.samples, strict=True)
        for sequence, count, samples in given:
            self.on_finish(sequence, stats)  # it waits no more
            of_prompt = min(count, max(0, sequence.num_prompt_tokens - sequence.num_computed_tokens))
            self.served[self.queue_of(sequence)] += self.INPUT * of_prompt + self.OUTPUT * samples

    def on_finish(self, sequence, stats):
        self.last_left = self.waiting.pop(sequence, self.last_left)
