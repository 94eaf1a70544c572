"""What one step computes: its sequences, what is moved for them, who came and who made way.

Records that a scheduler fills and whoever computes, costs or logs a step reads.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import compress

from pagellm.engine.scheduling.block_manager import Transfer
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus


class Preemption(StrEnum):
    """How a sequence makes way."""

    RECOMPUTE = "recompute"  # its blocks are given back, its tokens are computed again
    SWAP = "swap"  # its content moves to the second tier of blocks and back
    AUTO = "auto"  # whichever the costs say is cheaper


@dataclass(frozen=True)
class PreemptionCosts:
    """What the driver has measured, in seconds."""

    recompute_token_s: float = 0.0  # to compute a token of a prompt
    swap_block_s: float = 0.0  # to move a block to the second tier or back


@dataclass(frozen=True)
class Preempted:
    """One that made way in this step."""

    sequence: Sequence
    by: Preemption  # recompute or swap
    needed_by: Sequence | None  # the one that needed a block; it may be the same. None: a policy wants it
    num_computed_tokens: int  # what it had
    recompute_s: float  # what either way was expected to cost
    swap_s: float


@dataclass(slots=True)  # not frozen: see `StepEnd`
class Admitted:
    """One that began, or went on, in this step."""

    sequence: Sequence
    was: SequenceStatus  # waiting or swapped
    num_cached_tokens: int  # what the prefix cache had of it
    num_host_tokens: int = 0  # of these, what lay in the second tier


@dataclass(frozen=True)
class StepLimits:
    """How far one step may go, in tokens."""

    max_num_batched_tokens: int
    max_prefill_chunk: int


@dataclass(slots=True)
class ScheduledBatch:
    """The work of one step: of each sequence the next so many tokens after its computed ones.

    Before anything is computed, `transfers` must be done in order, and the block manager told of each.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)  # whether that is up to the last token
    # Sequences that take their first token from the last row of the one that they begin like.
    forks: dict[Sequence, list[Sequence]] = field(default_factory=dict)
    transfers: list[Transfer] = field(default_factory=list)
    admitted: list[Admitted] = field(default_factory=list)
    preempted: list[Preempted] = field(default_factory=list)
    shed: list[Sequence] = field(default_factory=list)  # those that the admission policy has just ended
    # Block tables that are not what they were in the batch before, and the first index that changed.
    changed_tables: dict[Sequence, int] = field(default_factory=dict)
    token_ids: Items[Items[int]] = ()  # for each of `sampled`, once it is committed
    num_dropped_tokens: int = 0  # of these, because they came behind an end

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(self.num_new_tokens)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that its sequences got, once it is committed."""
        return sum(map(len, self.token_ids)) - self.num_dropped_tokens

    @property
    def num_sampled(self) -> int:
        """How many get a token."""
        num_sampled = sum(self.samples)
        return num_sampled + sum(map(len, self.forks.values())) if self.forks else num_sampled

    @property
    def sampled(self) -> list[Sequence]:
        """Those that get a token, in the order in which `commit` wants the tokens: each before its forks."""
        if not self.forks:
            return list(compress(self.sequences, self.samples))
        return [
            sequence
            for parent in compress(self.sequences, self.samples)
            for sequence in (parent, *self.forks.get(parent, ()))
        ]

    def add_decodes(self, sequences: list[Sequence]) -> None:
        """Enters the last token of each of several sequences."""
        self.sequences += sequences
        self.num_new_tokens += [1] * len(sequences)
        self.samples += [True] * len(sequences)
        for sequence in sequences:
            if sequence.group:
                self.forks[sequence] = sequence.forks

    def add(self, sequence: Sequence, num_new_tokens: int) -> None:
        """Enters the next tokens of a sequence."""
        self.sequences.append(sequence)
        self.num_new_tokens.append(num_new_tokens)
        samples = num_new_tokens == sequence.num_tokens - sequence.num_computed_tokens
        self.samples.append(samples)
        if samples and sequence.group:
            self.forks[sequence] = sequence.forks

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence out, if it is in."""
        if sequence in self.sequences:
            index = self.sequences.index(sequence)
            del self.sequences[index], self.num_new_tokens[index], self.samples[index]
            self.forks.pop(sequence, None)

    def by_sequence(
        self, token_ids: Items[Items[int]]
    ) -> tuple[Items[Items[int]], dict[Sequence, list[tuple[Sequence, Items[int]]]]]:
        """The tokens of each of its sequences, and of their forks, from those of each of `sampled`."""
        if not self.forks and len(token_ids) == len(self.sequences):
            return token_ids, {}
        tokens = iter(token_ids)
        given: list[Items[int]] = []
        to_forks: dict[Sequence, list[tuple[Sequence, Items[int]]]] = {}
        for sequence, samples in zip(self.sequences, self.samples, strict=True):
            given.append(next(tokens) if samples else ())
            if sequence in self.forks:
                to_forks[sequence] = [(child, next(tokens)) for child in self.forks[sequence]]
        return given, to_forks
