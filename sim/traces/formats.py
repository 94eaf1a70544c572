"""The formats of traces: how each one's records become requests, and how a file's content tells its format.

Sources: Mooncake (https://github.com/kvcache-ai/Mooncake), Qwen-Bailian
(https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon), Azure LLM inference
(https://github.com/Azure/AzurePublicDataset), BurstGPT (https://github.com/HPMLL/BurstGPT), ShareGPT. Other
fields than those that are named here are ignored.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pagellm.engine.errors import TraceError
from pagellm.sim.traces.files import (
    Record,
    csv_rows,
    decode_line,
    json_items,
    json_lines,
    parse_json,
    parse_row,
    read_lines,
)
from pagellm.sim.traces.prompt_tokens import Encoder
from pagellm.sim.traces.request import (
    TraceRequest,
    bad_value,
    check_integer,
    check_number,
    check_seconds,
    check_text,
    estimated_tokens,
)

Fields = dict[str, Any]
# The requests of a record as fields of TraceRequest, arrival_time in ticks of the format's clock.
Parse = Callable[[Any], Iterator[Fields]]

MOONCAKE_BLOCK_SIZE = 512
BAILIAN_BLOCK_SIZE = 16
AZURE_TICKS = 10**7
_AZURE_TIME = re.compile(r"([0-9-]{10}[ T][0-9:]{8})(?:\.([0-9]{1,7}))?(Z|[+-][0-9]{2}:[0-9]{2})?")
_AZURE_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
# Chats that a later turn can be told to belong to; the oldest are forgotten, so that memory does not grow.
_MAX_CHATS = 2**20
_WAITING = (b'"session"', b'"after"', b'"continues"')
_HUMANS = ("human", "user")
_MODELS = ("gpt", "chatgpt", "assistant", "bing", "bard")
_OTHERS = ("system", "tool")
# What is said of a clock that was told from the content.
CLOCKS = {"mooncake": "times in milliseconds", "mooncake-s": "times in seconds, as they have fractions"}
# The first lines, in which a format must show itself.
_DETECTION_LINES = 100


@dataclass(frozen=True)
class Format:
    """How a format is read.

    parser: makes a function from a record's value to fields; it may remember what it saw.
    time_field: what the format calls the time. ticks_per_s: of its clock.
    is_shifted: whether the first request's time becomes 0.
    is_document: whether the file is one document, whose requests may stand in any order.
    session_names: some of these are in any file in which a request waits for another; none: there is none.
    """

    name: str
    records: Callable[[Path], Iterator[Record]]
    parser: Callable[[Encoder | None], Parse]
    time_field: str = "timestamp"
    ticks_per_s: int = 1
    is_shifted: bool = True
    is_document: bool = False
    session_names: tuple[bytes, ...] = ()


def _native(_: Encoder | None) -> Parse:
    names = [name for name in TraceRequest.__dataclass_fields__ if name not in ("index", "class_")]

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        check_seconds("arrival_time", record.get("arrival_time"))
        check_integer("output_len", record.get("output_len"), 0)
        fields = {name: record[name] for name in names if record.get(name) is not None}
        if record.get("class") is not None:
            fields["class_"] = record["class"]
        for name in ("id", "session", "tenant", "class_", "continues"):
            if type(fields.get(name)) is int:
                fields[name] = str(fields[name])
        if "after" in fields:
            after = fields["after"] if isinstance(fields["after"], list) else [fields["after"]]
            fields["after"] = [str(name) if type(name) is int else name for name in after]
        yield fields

    return parse


def _mooncake(_: Encoder | None) -> Parse:
    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        fields = _with_hash_ids(record, MOONCAKE_BLOCK_SIZE)
        if fields["arrival_time"] != int(fields["arrival_time"]):
            expected = "whole milliseconds, as in the lines before; the format mooncake-s is of seconds"
            raise bad_value("timestamp", fields["arrival_time"], expected)
        yield fields

    return parse


def _mooncake_seconds(_: Encoder | None) -> Parse:
    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        yield _with_hash_ids(record, MOONCAKE_BLOCK_SIZE)

    return parse


def _bailian(_: Encoder | None) -> Parse:
    sessions: OrderedDict[int, int] = OrderedDict()

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        chat, parent = _integer(record, "chat_id", 0), _integer(record, "parent_chat_id", -1)
        fields = _with_hash_ids(record, BAILIAN_BLOCK_SIZE)
        session = chat if parent == -1 else sessions.get(parent, parent)
        sessions[chat] = session
        if len(sessions) > _MAX_CHATS:
            sessions.popitem(last=False)
        yield fields | {"id": str(chat), "session": str(session)}

    return parse


def _azure(_: Encoder | None) -> Parse:
    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        yield {
            "arrival_time": _azure_ticks(record.get("TIMESTAMP")),
            **_lengths(record, "ContextTokens", "GeneratedTokens"),
        }

    return parse


def _burstgpt(_: Encoder | None) -> Parse:
    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        fields: Fields = {
            "arrival_time": check_number("Timestamp", record.get("Timestamp")),
            **_lengths(record, "Request tokens", "Response tokens"),
        }
        if record.get("Session ID") is not None:
            fields["session"] = str(record["Session ID"])
        yield fields

    return parse


def _sharegpt(tokenizer: Encoder | None) -> Parse:
    """Each answer to a human is a request; its prompt is the conversation before it, joined by newlines.

    The datasets have answers without a text, and questions: they are no requests, but what comes after them
    is. Turns stand under "conversations", or under "items" as ShareGPT itself wrote them.

    The datasets have no arrival times: requests arrive in the file's order, one a second from 0, so that
    `Trace.scaled(rate)` or `Trace.retimed` gives any load.
    """
    num_requests = 0

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        nonlocal num_requests
        key = "items" if "conversations" not in record and "items" in record else "conversations"
        turns = record.get(key)
        if not isinstance(turns, list):
            raise bad_value(key, turns, "a list of turns")
        name = record.get("id")
        if name is not None:
            name = check_text("id", str(name) if type(name) is int else name)
        texts: list[str] = []
        before = None
        requests: list[Fields] = []
        num_answered = 0  # characters up to the end of the last answer that is a request
        for place, turn in enumerate(turns):
            speaker, text = _turn(f"{key}[{place}]", turn)
            if speaker in _MODELS and before in _HUMANS:
                output_len = estimated_tokens(text) if tokenizer is None else len(tokenizer.encode(text))
                if output_len > 0 and any(texts):
                    prompt = "\n".join(texts)
                    requests.append({"prompt": prompt, "output_len": output_len, "session": name})
                    if num_answered:
                        requests[-1]["num_context_chars"] = num_answered
                    num_answered = len(prompt) + 1 + len(text)
            texts.append(text)
            before = speaker
        if name is None and len(requests) > 1:
            name = f"conversation {num_requests}"
            requests = [fields | {"session": name} for fields in requests]
        for fields in requests:
            yield fields | {"arrival_time": num_requests}
            num_requests += 1

    return parse


def _items_or_lines(path: Path) -> Iterator[Record]:
    """One JSON array, or JSON Lines."""
    first = next((line for _, line in read_lines(path) if line.strip()), b"")
    return json_items(path, None) if first.lstrip().startswith(b"[") else json_lines(path)


FORMATS = {
    form.name: form
    for form in (
        Format(
            "json",
            partial(json_items, key="requests"),
            _native,
            "arrival_time",
            is_shifted=False,
            is_document=True,
        ),
        Format("jsonl", json_lines, _native, "arrival_time", is_shifted=False, session_names=_WAITING),
        Format("mooncake", json_lines, _mooncake, ticks_per_s=1000),
        Format("mooncake-s", json_lines, _mooncake_seconds),
        Format("bailian", json_lines, _bailian, session_names=(b"chat_id",)),
        Format("azure", csv_rows, _azure, "TIMESTAMP", ticks_per_s=AZURE_TICKS),
        Format("burstgpt", csv_rows, _burstgpt, "Timestamp", session_names=(b"Session ID",)),
        Format("sharegpt", _items_or_lines, _sharegpt, is_shifted=False, session_names=(b"",)),
    )
}


def detect(path: Path, name: str | None = None) -> Format:
    """The format of a file, from its first lines, or of a name.

    Mooncake's timestamps are whole milliseconds. Where one of the first lines has a fraction, they are
    seconds, and the format is mooncake-s.

    Raises `TraceError` for a file that cannot be read and for an unknown name; without a name for a file that
    is empty or in none of the formats, too.
    """
    if name is not None and name not in FORMATS:
        raise bad_value("format", name, f"one of {', '.join(FORMATS)}")
    next(read_lines(path), None)
    form = FORMATS[name] if name else _detect(path)
    if form.name == "mooncake" and _has_fractions(path):
        return FORMATS["mooncake-s"]
    return form


def format_text(name: str) -> str:
    """A format for people: its name, and what its clock counts where that was told from the content."""
    return f"{name}, {CLOCKS[name]}" if name in CLOCKS else name


def _has_fractions(path: Path) -> bool:
    """Whether a timestamp of the first lines is no whole number."""
    for record in islice(json_lines(path), _DETECTION_LINES):
        timestamp = record.value.get("timestamp") if isinstance(record.value, dict) else None
        if isinstance(timestamp, float) and not timestamp.is_integer():
            return True
    return False


def _detect(path: Path) -> Format:
    first: tuple[int, str] | None = None
    error: TraceError | None = None
    for number, line in islice(read_lines(path), _DETECTION_LINES):
        if not line.strip():
            continue
        try:
            text = decode_line(line).strip()
            name = _format_of_first_line(text) if first is None else None
            first = first or (number, text)
            name = name or _format_of_fields(parse_json(text))
        except TraceError as bad:
            error = error or TraceError(f"{path}:{number}: {bad}")
            continue
        if name:
            return FORMATS[name]
    if first is None:
        raise error or TraceError(f"{path}: found an empty file, expected at least one request")
    if error and first[1].startswith("{"):
        return FORMATS["json"]  # a document over many lines, or damaged, and then it says where
    raise bad_value(f"{path}:{first[0]}: format", first[1], f"one of {', '.join(FORMATS)}")


def _format_of_first_line(text: str) -> str | None:
    """The format, if the file's first line is no single record."""
    if text.startswith("["):
        return "sharegpt"
    if re.match(r'\{\s*("requests"|$)', text):
        return "json"
    if text.startswith("{"):
        return None
    columns = set(parse_row(text))
    if columns & {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}:
        return "azure"
    if columns & {"Timestamp", "Request tokens", "Response tokens"}:
        return "burstgpt"
    return None


def _format_of_fields(record: Any) -> str | None:
    """The format whose names a JSON line uses."""
    names = record.keys() if isinstance(record, dict) else set()
    if "requests" in names:
        return "json"
    if names & {"arrival_time", "prompt", "prompt_token_ids", "prompt_len", "output_len"}:
        return "jsonl"
    if names & {"conversations", "items"}:
        return "sharegpt"
    if names & {"chat_id", "parent_chat_id"}:
        return "bailian"
    if names & {"timestamp", "input_length", "output_length"}:
        return "mooncake"
    return None


def _with_hash_ids(record: Mapping[str, Any], block_size: int) -> Fields:
    if record.get("hash_ids") is None:
        raise bad_value("hash_ids", None, f"one id for each {block_size} tokens")
    return {
        "arrival_time": check_number("timestamp", record.get("timestamp")),
        **_lengths(record, "input_length", "output_length"),
        "hash_ids": record["hash_ids"],
        "hash_block_size": block_size,
    }


def _lengths(record: Mapping[str, Any], prompt: str, output: str) -> Fields:
    """The two lengths, by their names in the format.

    A request that failed has no output; it may have been refused before its prompt was counted.
    """
    output_len = _integer(record, output, 0)
    return {"prompt_len": _integer(record, prompt, min(output_len, 1)), "output_len": output_len}


def _integer(record: Mapping[str, Any], name: str, low: int) -> int:
    return check_integer(name, record.get(name), low)


def _azure_ticks(value: Any) -> int:
    """Ticks of 100 ns since an epoch, exact; without an offset the time is UTC."""
    match = _AZURE_TIME.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        moment, fraction, offset = match.groups()
        try:
            since = datetime.fromisoformat(moment + (offset or "Z")) - _AZURE_EPOCH
        except ValueError:  # a thirteenth month
            pass
        else:
            return since // timedelta(seconds=1) * AZURE_TICKS + int((fraction or "").ljust(7, "0"))
    raise bad_value("TIMESTAMP", value, "a time such as 2023-11-16 18:15:46.6805900")


def _turn(place: str, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise bad_value(place, turn, 'an object with "from" and "value"')
    speaker = turn.get("from")
    if speaker not in _HUMANS + _MODELS + _OTHERS:
        raise bad_value(f"{place}.from", speaker, f"one of {', '.join(_HUMANS + _MODELS + _OTHERS)}")
    return speaker, check_text(f"{place}.value", turn.get("value"), empty=True)
