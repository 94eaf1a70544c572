"""KV-aware routing with load: the replica on which a request has the least work before it.

Srivatsa et al., "Preble: Efficient Distributed Prompt Scheduling for LLM Serving", ICLR 2025: what is to be
computed of the prompt there, and what those that are there before it have still to come.
"""

from pagellm.sim import Router


class KvRouter(Router):
    TOKENS_A_REQUEST = 512  # of prompt, which a request that is there before it costs as much as

    def choose(self, sequence, replicas):
        def work(number):
            replica = replicas[number]
            to_compute = sequence.num_prompt_tokens - replica.cached_tokens(sequence)
            return to_compute + self.TOKENS_A_REQUEST * replica.num_unfinished, replica.num_unfinished

        return min(range(len(replicas)), key=work)
