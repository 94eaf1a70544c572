"""One request of a trace: its fields, checked on construction.

It knows what was asked and when; not how a file wrote it down, nor which tokens stand for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pagellm.engine.errors import TraceError

# A length is what an array of 32-bit items can be indexed by; a hash id is any 64-bit hash.
MAX_LEN = 2**31 - 1
MAX_HASH_ID = 2**64 - 1
DEFAULT_HASH_BLOCK_SIZE = 512
# What a token stands for where no tokenizer counts: English in a large vocabulary.
BYTES_PER_TOKEN = 4
_SHOWN = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """A request as a trace has it; a bad value is a `TraceError` that names the field.

    arrival_time: seconds from the trace's start.
    prompt, prompt_token_ids, prompt_len: text, ids, or only a length; exactly one is given. With ids,
    prompt_len is their number; with a text it stays None, because only a tokenizer knows it.
    hash_ids: with prompt_len, one for each hash_block_size tokens of the prompt, the last for what is left
    over. Equal ids stand for equal contents, in this and in every other request.
    output_len: tokens to generate.
    id: a name, by default the request's position. Names need not be unique.
    priority: as the scheduling policy reads it. session, tenant: whose conversation, whose request.
    deadline_s: seconds from arrival within which the answer is wanted.
    index: position in the trace, from 0, set by the trace; it tells prompts apart that are only a length.
    """

    arrival_time: float
    output_len: int
    prompt: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    prompt_len: int | None = None
    hash_ids: Sequence[int] | None = None
    hash_block_size: int | None = None
    id: str = ""
    priority: int = 0
    session: str | None = None
    tenant: str | None = None
    deadline_s: float | None = None
    index: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrival_time", check_seconds("arrival_time", self.arrival_time))
        check_integer("output_len", self.output_len, 1)
        check_integer("priority", self.priority, -MAX_LEN)
        check_text("id", self.id, empty=True)
        for name in ("session", "tenant"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        if self.deadline_s is not None:
            object.__setattr__(self, "deadline_s", check_seconds("deadline_s", self.deadline_s))
        self._check_prompt()
        if self.hash_ids is not None:
            self._check_hash_ids()
        elif self.hash_block_size is not None:
            raise found("hash_ids", None, "the ids of the pieces that hash_block_size speaks of")

    def _check_prompt(self) -> None:
        given = [name for name in ("prompt", "prompt_token_ids") if getattr(self, name) is not None]
        if len(given) == 2 or (self.prompt is not None and self.prompt_len is not None):
            others = "prompt_token_ids and prompt_len"
            raise found("prompt", self.prompt, f"none beside {others}, or it alone")
        if self.prompt is not None:
            check_text("prompt", self.prompt)
        elif self.prompt_token_ids is not None:
            ids = _integers("prompt_token_ids", self.prompt_token_ids, MAX_LEN)
            object.__setattr__(self, "prompt_token_ids", ids)
            if self.prompt_len is not None and self.prompt_len != len(ids):
                raise found("prompt_len", self.prompt_len, f"{len(ids)}, as many as prompt_token_ids")
            if not ids:
                raise found("prompt_token_ids", [], "at least one id")
            object.__setattr__(self, "prompt_len", len(ids))
        elif self.prompt_len is None:
            raise found("prompt_len", None, "one of prompt, prompt_token_ids, prompt_len")
        else:
            check_integer("prompt_len", self.prompt_len, 1)

    def _check_hash_ids(self) -> None:
        if self.prompt_len is None or self.prompt_token_ids is not None:
            raise TraceError("hash_ids: found them beside a known prompt, expected them with prompt_len only")
        if self.hash_block_size is None:
            object.__setattr__(self, "hash_block_size", DEFAULT_HASH_BLOCK_SIZE)
        size = check_integer("hash_block_size", self.hash_block_size, 1)
        ids = _integers("hash_ids", self.hash_ids, MAX_HASH_ID)
        object.__setattr__(self, "hash_ids", ids)
        expected = -(-self.prompt_len // size)
        if len(ids) != expected:
            pieces = f"one for each {size} of {self.prompt_len} tokens"
            raise TraceError(f"hash_ids: found {len(ids)}, expected {expected}, {pieces}")

    @property
    def expected_prompt_len(self) -> int:
        """prompt_len; of a text about as many tokens as its bytes suggest."""
        return self.prompt_len or estimated_tokens(self.prompt or "")

    def to_dict(self) -> dict[str, Any]:
        """The request as a trace file writes it: only what differs from the defaults, times in seconds."""
        fields = {name: getattr(self, name) for name in ("id", "arrival_time", "prompt", "prompt_token_ids")}
        if self.prompt_token_ids is None:
            fields["prompt_len"] = self.prompt_len
        fields |= {name: getattr(self, name) for name in ("hash_ids", "hash_block_size", "output_len")}
        fields["priority"] = self.priority or None
        fields |= {name: getattr(self, name) for name in ("session", "tenant", "deadline_s")}
        return {name: value for name, value in fields.items() if value is not None}


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def found(name: str, value: object, expected: str) -> TraceError:
    """The error for a field; a value of None is one that is not there."""
    shown = (
        "nothing" if value is None else repr(value) if not isinstance(value, int) else _integer_text(value)
    )
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    return TraceError(f"{name}: found {shown}, expected {expected}")


def check_integer(name: str, value: Any, low: int, high: int = MAX_LEN) -> int:
    """The value, if it is an integer from low to high; a bool is none."""
    if type(value) is not int or not low <= value <= high:
        raise found(name, value, f"an integer from {low} to {high}")
    return value


def check_seconds(name: str, value: Any) -> float:
    """The value as a float, if it is a finite number from 0."""
    return float(check_number(name, value, "a finite number of seconds from 0"))


def check_number(name: str, value: Any, expected: str = "a finite number from 0") -> float:
    """The value, an integer or a float, if it is finite and not negative; a bool is no number."""
    if type(value) not in (int, float) or not 0 <= value < math.inf or value > 1e300:
        raise found(name, value, expected)
    number: float = value
    return number


def check_text(name: str, value: Any, empty: bool = False) -> str:
    """The value, if it is text that UTF-8 can write down."""
    if not isinstance(value, str) or not (value or empty):
        raise found(name, value, "text" if empty else "text that is not empty")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        raise found(name, value, "text without lone surrogates") from None
    return value


def _integers(name: str, values: Any, high: int) -> tuple[int, ...]:
    """The values as a tuple, if all are integers from 0 to high."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise found(name, values, "a list of integers")
    integers = tuple(values)
    if integers and (set(map(type, integers)) != {int} or min(integers) < 0 or max(integers) > high):
        place = next(i for i, v in enumerate(integers) if type(v) is not int or not 0 <= v <= high)
        raise found(f"{name}[{place}]", integers[place], f"an integer from 0 to {high}")
    return integers


def _integer_text(value: int) -> str:
    """An integer's digits; of a very long one only how many bits it has, since Python refuses to print it."""
    return repr(value) if value.bit_length() < 1000 else f"an integer of {value.bit_length()} bits"
