"""What a policy sees: facts of requests, steps and blocks as they are now, to be read and not changed."""

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from pagellm.engine.scheduling.batch import ScheduledBatch
    from pagellm.engine.scheduling.block_manager import BlockManager


class SchedulerStats(NamedTuple):
    """How things stand; the scheduler makes a new one when a step begins or somebody comes."""

    now: float = 0.0  # seconds, on the clock of SequenceView.arrival_time
    num_waiting: int = 0
    num_running: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    block_size: int = 0  # tokens of a block

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"sets {name!r}, and a policy cannot change how things stand")


class View:
    """Refuses by name what cannot be seen, and whatever would change something."""

    __slots__ = ()
    _what = "something"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"asks for {name!r}, which a policy cannot see; of {self._what} it sees {', '.join(_facts(self))}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"sets {name!r}, and a policy cannot change {self._what}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"deletes {name!r}, and a policy cannot change {self._what}")


def _facts(view: View) -> list[str]:
    return sorted(name for name in dir(type(view)) if not name.startswith("_"))


class SequenceView(View):
    """A request, or one completion of several; always the same object for the same one."""

    __slots__ = ("_manager", "_sequence")
    _what = "a request"
    _manager: "BlockManager"
    _sequence: Sequence

    def __init__(self, sequence: Sequence, manager: "BlockManager") -> None:
        object.__setattr__(self, "_sequence", sequence)
        object.__setattr__(self, "_manager", manager)

    @property
    def seq_id(self) -> int:
        """A number of its own."""
        return self._sequence.seq_id

    @property
    def request_id(self) -> str:
        """The request's name; several completions share it."""
        return self._sequence.request_id

    @property
    def arrival_index(self) -> int:
        """Its place in the order of arrival."""
        return self._sequence.arrival_index

    @property
    def arrival_time(self) -> float:
        """When it came, in seconds on the clock of `SchedulerStats.now`."""
        return self._sequence.arrival_time

    @property
    def sampling_params(self) -> SamplingParams:
        """What was asked for, with priority, tenant and deadline_s; a copy is not needed, they are frozen."""
        return self._sequence.sampling_params

    @property
    def status(self) -> SequenceStatus:
        """Whether it waits, runs, is swapped out or has finished."""
        return self._sequence.status

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._sequence.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return self._sequence.num_output_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        return self._sequence.num_tokens

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose keys and values are in blocks."""
        return self._sequence.num_computed_tokens

    @property
    def max_len(self) -> int:
        """Tokens of prompt and output at most; how many there will be, nobody knows."""
        return self._sequence.max_len

    @property
    def num_preemptions(self) -> int:
        """How often it has made way."""
        return self._sequence.num_preemptions

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that the prefix cache has of it now, while it has no blocks; else those that it had."""
        sequence = self._sequence
        if sequence.block_table or sequence.finish_reason is not None:
            return sequence.num_cached_tokens
        return self._manager.num_cached_tokens(sequence)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens so far: a copy."""
        return tuple(self._sequence.token_ids)

    def __repr__(self) -> str:
        return repr(self._sequence)


class StepView(View):
    """A step that was computed: its requests and, in the same order, what was done for each."""

    __slots__ = ("_batch", "_manager")
    _what = "a step"
    _batch: "ScheduledBatch"
    _manager: "BlockManager"

    def __init__(self, batch: "ScheduledBatch", manager: "BlockManager") -> None:
        object.__setattr__(self, "_batch", batch)
        object.__setattr__(self, "_manager", manager)

    @property
    def sequences(self) -> list[SequenceView]:
        """Those that were computed."""
        return [view_of(sequence, self._manager) for sequence in self._batch.sequences]

    @property
    def num_new_tokens(self) -> list[int]:
        """How many tokens of each."""
        return list(self._batch.num_new_tokens)

    @property
    def samples(self) -> list[bool]:
        """Whether each got new tokens."""
        return list(self._batch.samples)

    @property
    def token_ids(self) -> list[Items[int]]:
        """The new tokens: of each that samples, followed by those of its forks."""
        return list(self._batch.token_ids)

    @property
    def forks(self) -> dict[SequenceView, list[SequenceView]]:
        """The other completions that took their first tokens with one."""
        return {
            view_of(parent, self._manager): [view_of(child, self._manager) for child in forks]
            for parent, forks in self._batch.forks.items()
        }


class BlockView(View):
    """A block that the prefix cache knows."""

    __slots__ = ("_depth", "_hash", "_hits", "_known_since", "_last_used", "_next_use")
    _what = "a block"
    _depth: int
    _hash: int
    _hits: int
    _known_since: int
    _last_used: int
    _next_use: float | None

    def __init__(
        self, block_hash: int, depth: int, hits: int, known_since: int, last_used: int, next_use: float | None
    ) -> None:
        put = object.__setattr__
        put(self, "_hash", block_hash)
        put(self, "_depth", depth)
        put(self, "_hits", hits)
        put(self, "_known_since", known_since)
        put(self, "_last_used", last_used)
        put(self, "_next_use", next_use)

    @property
    def hash(self) -> int:
        """Stands for the block's tokens and all that come before them."""
        return self._hash

    @property
    def depth(self) -> int:
        """Blocks before it in its prefix."""
        return self._depth

    @property
    def hits(self) -> int:
        """How many requests have taken it from the cache since it is known."""
        return self._hits

    @property
    def known_since(self) -> int:
        """When it became known: a number that grows with every event of a block."""
        return self._known_since

    @property
    def last_used(self) -> int:
        """When it was held last: a number that grows with every event of a block."""
        return self._last_used

    @property
    def next_use(self) -> float:
        """The place in the trace of the next request that begins with it; infinite if none does.

        Only a policy with `needs_future` sees it, and only where a trace is replayed.
        """
        if self._next_use is None:
            raise ValueError("asks for 'next_use' of a block, expected needs_future = True in its class")
        return self._next_use


def view_of(sequence: Sequence, manager: "BlockManager") -> SequenceView:
    """What policies see of a sequence; made when one is asked for the first time."""
    view = sequence.view
    if view is None:
        view = sequence.view = SequenceView(sequence, manager)
    return view


def sequence_of(view: SequenceView) -> Sequence:
    """The sequence that a view is of."""
    return view._sequence
