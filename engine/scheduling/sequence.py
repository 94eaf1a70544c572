"""One sequence: the tokens of a prompt and of one completion of it, and its block table.

Only the scheduler and the block manager change a sequence. It knows no text, no clock and no arrays.
"""

from array import array
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.requests.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagellm.engine.scheduling.policies.views import SequenceView

# Stands in a block table for a block behind all windows, which was given back. Nothing reads such an entry.
GIVEN_BACK = -1


class SequenceError(Exception):
    """Something that was done for one sequence alone failed, with the exception that this one comes from."""

    def __init__(self, sequence: "Sequence") -> None:
        super().__init__(f"sequence {sequence.seq_id}")
        self.sequence = sequence


class SequenceStatus(Enum):
    """Where a sequence is: a new one and one that was preempted to be computed again both wait."""

    WAITING = "waiting"
    RUNNING = "running"  # has blocks
    SWAPPED = "swapped"  # waits, with its keys and values in the second tier of blocks
    FINISHED = "finished"


class Sequence:
    """A prompt and what has been generated after it.

    stop_token_ids: tokens that end it, the model's end-of-text tokens included unless they are ignored.
    reads_cache: whether it may take KV from the prefix cache; not where its prompt's logits are wanted.
    request_id: whose completion it is, for those who observe.
    group: the completions of one prompt, as long as more than one of them has no token yet. All of them hold
    the same list. Its first member is computed; the others take their first tokens from the last row of that
    one, and its blocks.
    """

    __slots__ = (
        "arrival_index",
        "arrival_time",
        "block_hashes",
        "block_table",
        "cached_hint",
        "finish_reason",
        "group",
        "max_len",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_host_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_slots",
        "reads_cache",
        "request_id",
        "sampling_params",
        "seq_id",
        "stop_token_ids",
        "swap_table",
        "token_ids",
        "view",
        "was_admitted",
    )

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: Iterable[int],
        sampling_params: SamplingParams,
        eos_token_ids: frozenset[int] = frozenset(),
        reads_cache: bool = True,
        request_id: str = "",
    ) -> None:
        self.seq_id = seq_id
        self.request_id = request_id
        self.token_ids = array("i", prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.sampling_params = sampling_params
        self.stop_token_ids = frozenset(sampling_params.stop_token_ids)
        if not sampling_params.ignore_eos:
            self.stop_token_ids |= eos_token_ids
        self.reads_cache = reads_cache
        self.group: list[Sequence] | None = None
        self.finish_reason: FinishReason | None = None
        # Set by the scheduler that takes it in: its place in the order of arrival, when that was on the
        # scheduler's clock, and tokens of prompt and output at most.
        self.arrival_index = 0
        self.arrival_time = 0.0
        self.max_len = 0
        self.block_table: list[int] = []
        self.swap_table: list[int] = []  # while swapped: the second tier's blocks
        self.block_hashes: list[int] = []  # of the full blocks so far, each chained to the one before
        self.num_slots = 0  # tokens for which it has slots of its own
        self.num_computed_tokens = 0  # tokens whose KV is in the blocks of either tier
        self.num_registered_blocks = 0  # full blocks that the prefix cache has been offered
        self.was_admitted = False
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache when it was first admitted
        self.num_host_tokens = 0  # of these, found in the second tier
        self.num_preemptions = 0
        # Of the block manager: blocks found in the cache when it was asked last, the last of them, and since
        # when the cache knew that.
        self.cached_hint = 0, 0, 0
        self.view: SequenceView | None = None  # what policies see of it, once one has been asked

    @property
    def status(self) -> SequenceStatus:
        """Where it is, as its blocks and its end say."""
        if self.finish_reason is not None:
            return SequenceStatus.FINISHED
        if self.block_table:
            return SequenceStatus.RUNNING
        return SequenceStatus.SWAPPED if self.swap_table else SequenceStatus.WAITING

    @property
    def forks(self) -> list["Sequence"]:
        """The other completions that take their first tokens from its last row."""
        if self.group is None or self.group[0] is not self:
            return []
        return self.group[1:]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def leave(self) -> None:
        """Forgets what its block manager knew of it; what it has computed goes with it, to another one."""
        self.block_table = []
        self.num_slots = self.num_registered_blocks = 0
        self.cached_hint = 0, 0, 0
        self.view = None

    def restart(self, num_tokens: int) -> None:
        """Leaves it its first `num_tokens` tokens, waiting without blocks: nothing of it is computed."""
        self.token_ids = self.token_ids[:num_tokens]
        self.group = None
        self.finish_reason = None
        self.block_table = []
        self.swap_table = []
        self.block_hashes = []
        self.num_slots = self.num_computed_tokens = self.num_registered_blocks = 0
        self.cached_hint = 0, 0, 0

    def __repr__(self) -> str:
        return f"Sequence({self.seq_id}, {self.status.value}, {self.num_computed_tokens}/{self.num_tokens})"
