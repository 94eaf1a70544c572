"""Batches for tests of what they cost, made without a scheduler."""

from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.sequence import Sequence


def batch_of(*rows: tuple[int, int]) -> ScheduledBatch:
    """A batch of (tokens, tokens before them) for each sequence; each gets to its last token."""
    batch = ScheduledBatch()
    for number, (count, before) in enumerate(rows):
        sequence = Sequence(number, [1] * (count + before), SamplingParams())
        sequence.num_computed_tokens = before
        batch.add(sequence, count)
    return batch
