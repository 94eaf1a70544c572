"""One request of a trace: its fields, checked on construction.

It knows what was asked and when; not how a file wrote it down, nor which tokens stand for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pagellm.engine import checks
from pagellm.engine.errors import TraceError
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.sim.fields import NOTHING, bad

# A length is what an array of 32-bit items can be indexed by; a hash id is any 64-bit hash.
MAX_LEN = 2**31 - 1
MAX_HASH_ID = 2**64 - 1
DEFAULT_HASH_BLOCK_SIZE = 512
# What a token stands for where no tokenizer counts: English in a large vocabulary.
BYTES_PER_TOKEN = 4


@dataclass(slots=True, kw_only=True, unsafe_hash=True)
class TraceRequest:
    """A request as a trace has it; a bad value is a `TraceError` that names the field. Nobody changes one.

    It is not a frozen class, because such a one takes thrice as long to make.

    arrival_time: seconds from the trace's start.
    prompt, prompt_token_ids, prompt_len: text, ids, or only a length; exactly one is given. With ids,
    prompt_len is their number; with a text it stays None, because only a tokenizer knows it.
    hash_ids: with prompt_len, one for each hash_block_size tokens of the prompt, the last for what is left
    over. Equal ids stand for equal contents, in this and in every other request.
    output_len: tokens to generate.
    id: a name, by default the request's position. Names need not be unique.
    priority: as the scheduling policy reads it. session, tenant: whose conversation, whose request.
    deadline_s: seconds from arrival within which the answer is wanted. class_: a name for its kind, for
    figures by class; "class" in files. model: the name of the model that is asked for.

    A request of a session waits for the one before it there to end; after: for those with these ids instead,
    none of them if it is empty. delay_s: from the end of the last of them to its being sent, whatever
    arrival_time says; without it, it is sent at arrival_time, or at that end if that is later. continues: the
    id of a request that it waits for, too, and whose prompt and answer its prompt begins with: its own fields
    say only what comes behind these. num_context_chars: with a text that begins with the prompt and answer of
    the request before it in the session, so many characters are these.
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
    class_: str | None = None
    model: str | None = None
    after: Sequence[str] | None = None
    delay_s: float | None = None
    continues: str | None = None
    num_context_chars: int | None = None
    index: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if type(self.arrival_time) is not float or not 0 <= self.arrival_time <= checks.LARGEST:
            self.arrival_time = check_seconds("arrival_time", self.arrival_time)
        if type(self.output_len) is not int or not 1 <= self.output_len <= MAX_LEN:
            self.output_len = check_integer("output_len", self.output_len, 1)
        if self.priority != 0 or type(self.priority) is not int:
            self.priority = check_integer("priority", self.priority, -MAX_LEN)
        check_text("id", self.id, empty=True)
        if self.session is not None:
            check_text("session", self.session)
        if self.tenant is not None:
            check_text("tenant", self.tenant)
        if self.class_ is not None:
            check_text("class", self.class_)
        if self.model is not None:
            check_text("model", self.model)
        if self.continues is not None:
            check_text("continues", self.continues)
        if self.deadline_s is not None:
            self.deadline_s = check_seconds("deadline_s", self.deadline_s)
        if self.delay_s is not None:
            self.delay_s = check_seconds("delay_s", self.delay_s)
        if self.after is not None:
            self.after = _texts("after", self.after)
        if self.num_context_chars is not None:
            num_chars = len(self.prompt or "")
            check_integer("num_context_chars", self.num_context_chars, 1, max(1, num_chars - 1))
            if self.prompt is None:
                raise bad_value(
                    "num_context_chars", self.num_context_chars, "a prompt that is a text with it"
                )
        self._check_prompt()
        if self.hash_ids is not None:
            self._check_hash_ids()
        elif self.hash_block_size is not None:
            raise bad_value("hash_ids", None, "the ids of the pieces that hash_block_size speaks of")

    def _check_prompt(self) -> None:
        if self.prompt is not None:
            if self.prompt_token_ids is not None or self.prompt_len is not None:
                others = "prompt_token_ids and prompt_len"
                raise bad_value("prompt", self.prompt, f"none beside {others}, or it alone")
            check_text("prompt", self.prompt)
        elif self.prompt_token_ids is not None:
            ids = _integers("prompt_token_ids", self.prompt_token_ids, MAX_LEN)
            self.prompt_token_ids = ids
            if self.prompt_len is not None and self.prompt_len != len(ids):
                raise bad_value("prompt_len", self.prompt_len, f"{len(ids)}, as many as prompt_token_ids")
            if not ids:
                raise bad_value("prompt_token_ids", [], "at least one id")
            self.prompt_len = len(ids)
        elif self.prompt_len is None:
            raise bad_value("prompt_len", None, "one of prompt, prompt_token_ids, prompt_len")
        elif type(self.prompt_len) is not int or not 1 <= self.prompt_len <= MAX_LEN:
            self.prompt_len = check_integer("prompt_len", self.prompt_len, 1)

    def _check_hash_ids(self) -> None:
        if self.prompt_len is None or self.prompt_token_ids is not None:
            raise TraceError("hash_ids: found them beside a known prompt, expected them with prompt_len only")
        if self.hash_block_size is None:
            self.hash_block_size = DEFAULT_HASH_BLOCK_SIZE
        size = check_integer("hash_block_size", self.hash_block_size, 1)
        self.hash_block_size = size
        ids = _integers("hash_ids", self.hash_ids, MAX_HASH_ID)
        self.hash_ids = ids
        expected = -(-self.prompt_len // size)
        if len(ids) != expected:
            pieces = f"one for each {size} of {self.prompt_len} tokens"
            raise TraceError(f"hash_ids: found {len(ids)}, expected {expected}, {pieces}")

    @property
    def expected_prompt_len(self) -> int:
        """prompt_len; of a text about as many tokens as its bytes suggest."""
        return self.prompt_len or estimated_tokens(self.prompt or "")

    def sampling_params(self) -> SamplingParams:
        """How an engine serves it: as many tokens as the trace says, whatever they are."""
        return SamplingParams(
            temperature=0,
            max_tokens=self.output_len,
            ignore_eos=True,
            priority=self.priority,
            tenant=self.tenant or "",
            deadline_s=self.deadline_s,
        )

    def to_dict(self) -> dict[str, Any]:
        """The request as a trace file writes it: only what differs from the defaults, times in seconds."""
        fields = {name: getattr(self, name) for name in ("id", "arrival_time", "prompt", "prompt_token_ids")}
        if self.prompt_token_ids is None:
            fields["prompt_len"] = self.prompt_len
        fields |= {name: getattr(self, name) for name in ("hash_ids", "hash_block_size", "output_len")}
        fields["priority"] = self.priority or None
        fields |= {name: getattr(self, name) for name in ("session", "tenant", "deadline_s")}
        fields |= {"class": self.class_, "model": self.model}
        fields |= {
            name: getattr(self, name) for name in ("after", "delay_s", "continues", "num_context_chars")
        }
        return {name: value for name, value in fields.items() if value is not None}


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def bad_value(name: str, value: object, expected: str) -> TraceError:
    """The error for a field; a value of None is one that is not there."""
    error = bad(TraceError, name, value, expected)
    assert isinstance(error, TraceError)
    return error


# The checks are asked for every field of every request, so each looks for what is mostly there first.


def check_integer(name: str, value: Any, low: int, high: int = MAX_LEN) -> int:
    """The value, if it is an integer from low to high."""
    if type(value) is int and low <= value <= high:
        return value
    return checks.integer(name, NOTHING if value is None else value, low, high, TraceError)


def check_seconds(name: str, value: Any) -> float:
    """The value as a float, if it is a finite number from 0."""
    return float(check_number(name, value, "a finite number of seconds from 0"))


def check_number(name: str, value: Any, expected: str | None = None) -> float:
    """The value, if it is a finite number from 0; an integer stays one."""
    if type(value) in (int, float) and 0 <= value <= checks.LARGEST:
        number: float = value
        return number
    return checks.number(name, NOTHING if value is None else value, 0, None, TraceError, expected)


def check_text(name: str, value: Any, empty: bool = False) -> str:
    """The value, if it is text that UTF-8 can write down."""
    if isinstance(value, str) and value.isascii() and (value or empty):
        return value
    if value == "" and not empty:
        raise bad_value(name, value, "text that is not empty")
    return checks.text(name, NOTHING if value is None else value, TraceError)


def _texts(name: str, values: Any) -> tuple[str, ...]:
    """The values as a tuple, if all are texts; a single text is one value."""
    if isinstance(values, str):
        values = (values,)
    if not isinstance(values, Sequence):
        raise bad_value(name, values, "a list of ids")
    return tuple(check_text(f"{name}[{place}]", value) for place, value in enumerate(values))


def _integers(name: str, values: Any, high: int) -> tuple[int, ...]:
    """The values as a tuple, if all are integers from 0 to high."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise bad_value(name, values, "a list of integers")
    integers = tuple(values)
    if integers and (set(map(type, integers)) != {int} or min(integers) < 0 or max(integers) > high):
        place = next(i for i, v in enumerate(integers) if type(v) is not int or not 0 <= v <= high)
        raise bad_value(f"{name}[{place}]", integers[place], f"an integer from 0 to {high}")
    return integers
