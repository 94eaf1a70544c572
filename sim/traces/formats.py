"""The formats of traces: how each one's records become requests, and how a file's content tells its format.

Sources: Mooncake (https://github.com/kvcache-ai/Mooncake), Qwen-Bailian
(https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon), Azure LLM inference
(https://github.com/Azure/AzurePublicDataset), BurstGPT (https://github.com/HPMLL/BurstGPT), ShareGPT. Other
fields than those that are named here are ignored.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pagellm.engine.errors import TraceError
from pagellm.sim.traces import agents, datasets
from pagellm.sim.traces.files import (
    Record,
    csv_rows,
    decode_line,
    json_items,
    json_lines,
    json_values,
    parse_json,
    parse_row,
    read_lines,
)
from pagellm.sim.traces.parsing import Fields, Format, Parse, integer, lengths, with_hash_ids
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

MOONCAKE_BLOCK_SIZE = 512
BAILIAN_BLOCK_SIZE = 16
AZURE_TICKS = 10**7
_AZURE_TIME = re.compile(r"([0-9-]{10}[ T][0-9:]{8})(?:\.([0-9]{1,7}))?(Z|[+-][0-9]{2}:[0-9]{2})?")
_AZURE_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
# Chats that a later turn can be told to belong to; the oldest are forgotten, so that memory does not grow.
_MAX_CHATS = 2**20
_WAITING = (b'"session"', b'"after"', b'"continues"')
_NATIVE_NAMES = {"arrival_time", "prompt_token_ids", "prompt_len", "output_len"}
_AGENTIC_NAMES = {"wait_for", "tool_wait_ms", "prefix_reset", "branches", "session_id"}
_HUMANS = ("human", "user")
_MODELS = ("gpt", "chatgpt", "assistant", "bing", "bard")
_OTHERS = ("system", "tool", "developer")
# The first lines, in which a format must show itself.
_DETECTION_LINES = 100


def _native(_: Encoder | None) -> Parse:
    names = [name for name in TraceRequest.__dataclass_fields__ if name not in ("index", "class_")]

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        check_seconds("arrival_time", record.get("arrival_time"))
        check_integer("output_len", record.get("output_len"), 0)
        fields = {name: record[name] for name in names if record.get(name) is not None}
        if record.get("class") is not None:
            fields["class_"] = record["class"]
        for name in ("id", "session", "tenant", "class_", "model", "continues"):
            if type(fields.get(name)) is int:
                fields[name] = str(fields[name])
        if "after" in fields:
            after = fields["after"] if isinstance(fields["after"], list) else [fields["after"]]
            fields["after"] = [str(name) if type(name) is int else name for name in after]
        yield fields

    return parse


def _mooncake(_: Encoder | None) -> Parse:
    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        fields = with_hash_ids(record, MOONCAKE_BLOCK_SIZE)
        if fields["arrival_time"] != int(fields["arrival_time"]):
            expected = "whole milliseconds, as in the lines before; the format mooncake-s is of seconds"
            raise bad_value("timestamp", fields["arrival_time"], expected)
        yield fields

    return parse


def _mooncake_seconds(_: Encoder | None) -> Parse:
    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        yield with_hash_ids(record, MOONCAKE_BLOCK_SIZE)

    return parse


def _bailian(_: Encoder | None) -> Parse:
    sessions: OrderedDict[int, int] = OrderedDict()

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        chat, parent = integer(record, "chat_id", 0), integer(record, "parent_chat_id", -1)
        fields = with_hash_ids(record, BAILIAN_BLOCK_SIZE)
        session = chat if parent == -1 else sessions.get(parent, parent)
        sessions[chat] = session
        if len(sessions) > _MAX_CHATS:
            sessions.popitem(last=False)
        if record.get("type") is not None:
            fields["class_"] = str(record["type"])
        yield fields | {"id": str(chat), "session": str(session)}

    return parse


def _azure(_: Encoder | None) -> Parse:
    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        yield {
            "arrival_time": _azure_ticks(record.get("TIMESTAMP")),
            **lengths(record, "ContextTokens", "GeneratedTokens"),
        }

    return parse


def _burstgpt(_: Encoder | None) -> Parse:
    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        fields: Fields = {
            "arrival_time": check_number("Timestamp", record.get("Timestamp")),
            **lengths(record, "Request tokens", "Response tokens"),
        }
        if record.get("Model"):
            fields["model"] = str(record["Model"])
        if record.get("Log Type") is not None:
            fields["class_"] = str(record["Log Type"])
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
        keys = ("conversations", "items", "messages")
        key = next((key for key in keys if key in record), "conversations")
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


_AT_ONCE = "no times: all requests are there at once"
_VIDUR_CLOCK = "times in seconds; without arrived_at, one request a second"
_NO_TIMES = "no times: one request a second, in the file's order"
_MILLISECONDS = "times in milliseconds"
_NATIVE = partial(Format, parser=_native, time_field="arrival_time", is_shifted=False, session_names=_WAITING)
FORMATS = {
    form.name: form
    for form in (
        _NATIVE("json", partial(json_items, key="requests"), is_document=True),
        _NATIVE("jsonl", json_lines),
        Format("mooncake", json_lines, _mooncake, ticks_per_s=1000, clock=_MILLISECONDS),
        Format("mooncake-s", json_lines, _mooncake_seconds, clock="times in seconds, as they have fractions"),
        Format(
            "agentic-mooncake",
            agents.agentic_mooncake_records,
            agents.agentic_mooncake,
            ticks_per_s=agents.MS,
            session_names=(b'"wait_for"',),
            clock="times, delays and waits for tools in milliseconds",
        ),
        Format("bailian", json_lines, _bailian, session_names=(b"chat_id",)),
        Format("azure", csv_rows, _azure, "TIMESTAMP", ticks_per_s=AZURE_TICKS, clock="dates and times"),
        Format("burstgpt", csv_rows, _burstgpt, "Timestamp", session_names=(b"Session ID",)),
        Format(
            "sharegpt", _items_or_lines, _sharegpt, is_shifted=False, session_names=(b"",), clock=_NO_TIMES
        ),
        Format(
            "aiperf",
            json_lines,
            agents.aiperf,
            ticks_per_s=agents.MS,
            session_names=(b'"session_id"', b'"turns"'),
            clock="times and delays in milliseconds; without any, one request a second",
        ),
        Format(
            "llmservingsim",
            json_lines,
            agents.llmservingsim,
            "arrival_time_ns",
            ticks_per_s=agents.NS,
            is_shifted=False,
            is_document=True,
            clock="times and tools in nanoseconds",
        ),
        Format(
            "dynamo",
            agents.dynamo_records,
            agents.dynamo,
            "arrival_time",
            ticks_per_s=agents.MS,
            session_names=(b'"agent_context"',),
            clock="times in milliseconds; where no arrival was recorded, the end is taken for it",
        ),
        Format(
            "weka",
            json_values,
            agents.weka,
            "t",
            is_shifted=False,
            is_document=True,
            clock="times in seconds; every conversation begins at 0",
        ),
        Format("vidur", csv_rows, datasets.vidur, "arrived_at", is_shifted=False, clock=_VIDUR_CLOCK),
        Format("servegen", csv_rows, datasets.servegen, is_shifted=False),
        Format("servegen-jsonl", json_lines, datasets.servegen, is_shifted=False),
        Format("servegen-batch", json_lines, datasets.servegen, is_shifted=False, clock=_AT_ONCE),
        Format("openai-batch", json_lines, datasets.openai_batch, is_shifted=False, clock=_AT_ONCE),
        Format(
            "inference-perf",
            partial(json_items, key=None),
            datasets.inference_perf,
            "start_time",
            is_document=True,
        ),
        Format("vllm-custom", json_lines, datasets.vllm_custom, is_shifted=False, clock=_NO_TIMES),
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
    """A format for people: its name, and what its clock counts."""
    return f"{name}, {FORMATS[name].clock}"


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
        if name == "array":
            return FORMATS[_format_of_array(path)]
        if name == "json" and _is_weka(path):
            return FORMATS["weka"]
        if name:
            return FORMATS[name]
    if first is None:
        raise error or TraceError(f"{path}: found an empty file, expected at least one request")
    if error and first[1].startswith("{"):
        return FORMATS[
            "weka" if _is_weka(path) else "json"
        ]  # a document over many lines, or damaged, and then it says where
    raise bad_value(f"{path}:{first[0]}: format", first[1], f"one of {', '.join(FORMATS)}")


def _is_weka(path: Path) -> bool:
    """Whether a document with requests is one of Weka's."""
    return any(b'"hash_id_scope"' in line for _, line in islice(read_lines(path), _DETECTION_LINES))


def _format_of_array(path: Path) -> str:
    """The format whose names the first item of a JSON array uses."""
    item = next(json_items(path, None), None)
    names = item.value.keys() if item is not None and isinstance(item.value, dict) else set()
    return "inference-perf" if names & {"start_time", "info"} else "sharegpt"


def _format_of_first_line(text: str) -> str | None:
    """The format, if the file's first line is no single record."""
    if text.startswith("["):
        return "array"
    if re.match(r'\{\s*("requests"|$)', text):
        return "json"
    if text.startswith("{"):
        return None
    columns = set(parse_row(text))
    if columns & {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}:
        return "azure"
    if columns & {"Timestamp", "Request tokens", "Response tokens"}:
        return "burstgpt"
    if columns & {"num_prefill_tokens", "num_decode_tokens", "arrived_at"}:
        return "vidur"
    if {"timestamp", "output_tokens"} <= columns:
        return "servegen"
    return None


def _format_of_fields(record: Any) -> str | None:
    """The format whose names a JSON line uses."""
    names = record.keys() if isinstance(record, dict) else set()
    if "requests" in names:
        return "weka" if names & {"block_size", "hash_id_scope"} else "json"
    if names & {"event", "event_type"}:
        return "dynamo"
    if names & {"input_toks", "sub_requests", "arrival_time_ns"}:
        return "llmservingsim"
    if "custom_id" in names:
        return "openai-batch"
    if "prompt" in names and not names & _NATIVE_NAMES:
        return "vllm-custom"
    if names & (_NATIVE_NAMES | {"prompt"}):
        return "jsonl"
    if names & {"conversations", "items"}:
        return "sharegpt"
    if names & {"chat_id", "parent_chat_id"}:
        return "bailian"
    if "request_id" in names and names & _AGENTIC_NAMES:
        return "agentic-mooncake"
    if {"timestamp", "data"} <= names:
        return "servegen-jsonl"
    if {"request_id", "type", "input_length"} <= names:
        return "servegen-batch"
    if names & {"turns", "text", "texts", "text_input", "delay"}:
        return "aiperf"
    if "messages" in names:
        return "aiperf" if names & {"output_length", "timestamp", "session_id"} else "sharegpt"
    if "input_length" in names and ("hash_ids" not in names or "timestamp" not in names):
        return "aiperf"
    if names & {"timestamp", "input_length", "output_length"}:
        return "mooncake"
    return None


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
    """Who said what: "from" and "value", or "role" and "content" as OpenAI writes it."""
    if not isinstance(turn, dict):
        raise bad_value(place, turn, 'an object with "from" and "value"')
    who, what = ("role", "content") if "role" in turn and "from" not in turn else ("from", "value")
    speaker = turn.get(who)
    if speaker not in _HUMANS + _MODELS + _OTHERS:
        raise bad_value(f"{place}.{who}", speaker, f"one of {', '.join(_HUMANS + _MODELS + _OTHERS)}")
    return speaker, check_text(f"{place}.{what}", turn.get(what), empty=True)
