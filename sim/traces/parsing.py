"""What formats have in common: what a format is, and how a record's lengths and pieces are read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagellm.sim.traces.files import Record
from pagellm.sim.traces.prompt_tokens import Encoder
from pagellm.sim.traces.request import bad_value, check_integer, check_number, check_text

Fields = dict[str, Any]
# The requests of a record as fields of TraceRequest, arrival_time in ticks of the format's clock.
Parse = Callable[[Any], Iterator[Fields]]


@dataclass(frozen=True)
class Format:
    """How a format is read.

    parser: makes a function from a record's value to fields; it may remember what it saw.
    time_field: what the format calls the time. ticks_per_s: of its clock.
    is_shifted: whether the first request's time becomes 0.
    is_document: whether the file is one document, whose requests may stand in any order.
    session_names: some of these are in any file in which a request waits for another; none: there is none.
    clock: what its times are, for people.
    """

    name: str
    records: Callable[[Path], Iterator[Record]]
    parser: Callable[[Encoder | None], Parse]
    time_field: str = "timestamp"
    ticks_per_s: int = 1
    is_shifted: bool = True
    is_document: bool = False
    session_names: tuple[bytes, ...] = ()
    clock: str = "times in seconds"


def with_hash_ids(record: Mapping[str, Any], block_size: int) -> Fields:
    if record.get("hash_ids") is None:
        raise bad_value("hash_ids", None, f"one id for each {block_size} tokens")
    return {
        "arrival_time": check_number("timestamp", record.get("timestamp")),
        **lengths(record, "input_length", "output_length"),
        "hash_ids": record["hash_ids"],
        "hash_block_size": block_size,
    }


def lengths(record: Mapping[str, Any], prompt: str, output: str) -> Fields:
    """The two lengths, by their names in the format.

    A request that failed has no output; it may have been refused before its prompt was counted.
    """
    output_len = integer(record, output, 0)
    return {"prompt_len": integer(record, prompt, min(output_len, 1)), "output_len": output_len}


def integer(record: Mapping[str, Any], name: str, low: int) -> int:
    return check_integer(name, record.get(name), low)


def section(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object inside; an empty one where it is absent."""
    values = record.get(name)
    if values is not None and not isinstance(values, Mapping):
        raise bad_value(name, values, "an object")
    return values or {}


def text_of(messages: Any, name: str = "messages") -> str:
    """The text of chat messages, joined by newlines; parts that are no text are refused."""
    if not isinstance(messages, list) or not messages:
        raise bad_value(name, messages, "a list of messages")
    texts = []
    for place, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            texts_of = [part for part in parts if isinstance(part, str)]
            content = "\n".join(texts_of) if len(texts_of) == len(parts) else parts
        if content is not None and not isinstance(content, str):
            raise bad_value(f"{name}[{place}].content", content, "a text, or parts that are texts")
        texts.append(content or "")
    return "\n".join(texts)


def model_of(record: Mapping[str, Any]) -> Fields:
    """The model that is asked for, where an object inside of a record names one."""
    return {"model": check_text("model", record["model"])} if record.get("model") else {}


def pieces(ids: Any, prompt_len: int, size: int, rest: int) -> Fields:
    """A prompt of pieces, of which the last may have no id as it is no whole one: `rest` is for it then."""
    if not isinstance(ids, list):
        raise bad_value("hash_ids", ids, "a list of ids")
    whole, is_partial = divmod(prompt_len, size)
    if is_partial and len(ids) == whole:
        ids = [*ids, rest]
    return {"prompt_len": prompt_len, "hash_ids": ids, "hash_block_size": size}
