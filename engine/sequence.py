"""One sequence: the tokens of a prompt and of one completion of it, its block table and its state.

Only the scheduler and the block manager change a sequence. Text, clocks and arrays are none of its business.
"""

from enum import Enum

from engine.outputs import FinishReason
from engine.sampling_params import SamplingParams


class SequenceStatus(Enum):
    """Where a sequence is: a new and a preempted one both wait."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A prompt and what has been generated after it.

    stop_token_ids: tokens that end it, the model's end-of-text tokens included unless they are ignored.
    reads_cache: whether it may take KV from the prefix cache; not where its prompt's logits are wanted.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "finish_reason",
        "max_len",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "reads_cache",
        "sampling_params",
        "seq_id",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        eos_token_ids: frozenset[int] = frozenset(),
        reads_cache: bool = True,
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling_params = sampling_params
        self.stop_token_ids = frozenset(sampling_params.stop_token_ids)
        if not sampling_params.ignore_eos:
            self.stop_token_ids |= eos_token_ids
        self.reads_cache = reads_cache
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.max_len = 0  # set by the scheduler that takes it in
        self.block_table: list[int] = []
        self.block_hashes: list[int] = []  # of the full blocks so far, each chained to the one before
        self.num_computed_tokens = 0  # tokens whose KV is in the blocks
        self.num_registered_blocks = 0  # full blocks that the prefix cache has been offered
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache when it was first admitted
        self.num_preemptions = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    def __repr__(self) -> str:
        return f"Sequence({self.seq_id}, {self.status.value}, {self.num_computed_tokens}/{self.num_tokens})"
