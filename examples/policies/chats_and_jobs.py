"""A scheduling policy of one's own: short prompts and long ones take turns by the tokens that they cost.

Run it where this file is: pagellm generate --policy chats_and_jobs:ChatsAndJobs "Hello" "A long text ..."
"""

from collections import Counter

from pagellm.engine import SchedulingPolicy


class ChatsAndJobs(SchedulingPolicy):
    """Chats get three tokens for each token of a job, and jobs make way for chats when memory runs out."""

    LONGEST_CHAT_TOKENS = 256

    def __init__(self):
        self.shares = {"chat": 3, "job": 1}
        self.served = Counter()

    def queue_of(self, sequence):
        return "chat" if sequence.num_prompt_tokens <= self.LONGEST_CHAT_TOKENS else "job"

    def queue_order(self, queue, stats):
        return self.served[queue] / self.shares[queue]

    def victim(self, candidates, stats):
        return max(candidates, key=lambda s: (self.queue_of(s) == "job", s.arrival_index))

    def on_commit(self, batch, stats):
        for sequence, num_tokens in zip(batch.sequences, batch.num_new_tokens, strict=True):
            self.served[self.queue_of(sequence)] += num_tokens
