"""The formats of conversations and agents, in which requests wait for the ends of others.

Sources: LLMServingSim (docs/docs/workloads/jsonl-format.md), AIPerf (its loaders' schemas: mooncake_trace,
single_turn, multi_turn), agentic Mooncake and Dynamo's request traces (docs/agents/agent-tracing.md), Weka's
KV-cache-tester (as AIPerf's loader documents it).
"""

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from pagellm.engine.errors import TraceError
from pagellm.sim.traces.files import Record, json_lines
from pagellm.sim.traces.parsing import Fields, Parse, integer, model_of, pieces, section, text_of
from pagellm.sim.traces.prompt_tokens import Encoder
from pagellm.sim.traces.request import MAX_HASH_ID, bad_value, check_integer, check_number, check_text

NS = 10**9
MS = 1000
_AIPERF_BLOCK_SIZE = 512
_BLOCK_SIZES = tuple(2**power for power in range(4, 13))
# From here on, contents of which a trace does not say what they are, none of them equal to another; hash ids
# of 64 bits are not expected so high.
_UNKNOWN = MAX_HASH_ID - 2**40


def llmservingsim(_: Encoder | None) -> Parse:
    """A request, or a session whose calls wait for each other; a tool runs after each.

    Each prompt is whole. Without the ids of its tokens nothing of it is known to be shared.
    """
    num_sessions = 0

    def call(record: Mapping[str, Any], name: str) -> Fields:
        fields: Fields = {"output_len": integer(record, "output_toks", 0), **model_of(record)}
        ids = record.get("input_tok_ids")
        length = integer(record, "input_toks", 1)
        if ids is None:
            return fields | {"prompt_len": length}
        if not isinstance(ids, list) or len(ids) != length:
            raise bad_value(f"{name}input_tok_ids", ids, f"a list of {length} ids, as input_toks says")
        return fields | {"prompt_token_ids": ids}

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        nonlocal num_sessions
        time_ns = check_number("arrival_time_ns", record.get("arrival_time_ns"))
        if "sub_requests" not in record:
            yield {"arrival_time": time_ns, **call(record, "")}
            return
        calls = record["sub_requests"]
        if not isinstance(calls, list) or not calls:
            raise bad_value("sub_requests", calls, "a list of at least one call")
        session = record.get("session_id")
        session = f"session {num_sessions}" if session is None else str(session)
        num_sessions += 1
        tool_s: float | None = None
        for place, inner in enumerate(calls):
            if not isinstance(inner, Mapping):
                raise bad_value(f"sub_requests[{place}]", inner, "an object")
            fields = call(inner, f"sub_requests[{place}].")
            yield fields | {
                "arrival_time": time_ns,
                "id": f"{session}.{place}",
                "session": session,
                "delay_s": tool_s,
            }
            tool_s = check_number("tool_duration_ns", inner.get("tool_duration_ns", 0)) / NS

    return parse


def aiperf(tokenizer: Encoder | None) -> Parse:
    """Rows or conversations; times and delays are milliseconds.

    A later row of a session without hash ids, and a later turn, say what is new behind the prompts and
    answers before. Those with hash ids, and rows of single turns, are whole. Without any time rows come one a
    second.
    """
    turns: dict[str, int] = {}
    rests = count(_UNKNOWN)
    last = 0.0
    num_openers = 0
    has_times = False

    def placed(row: Mapping[str, Any], fields: Fields, session: str | None, accumulates: bool) -> Fields:
        nonlocal last, num_openers, has_times
        time, delay = row.get("timestamp"), row.get("delay")
        if time is not None:
            has_times = True
            last = check_number("timestamp", time)
        number = 0 if session is None else turns.get(session, 0)
        if number == 0:
            if time is None and not has_times:
                last = 1.0 * MS * num_openers
            num_openers += 1
        fields |= {"arrival_time": last}
        if session is not None:
            turns[session] = number + 1
            fields |= {"id": f"{session}.{number}", "session": session}
            if number:
                if accumulates:
                    fields["continues"] = f"{session}.{number - 1}"
                if time is None or delay is not None:
                    fields["delay_s"] = check_number("delay", delay or 0) / MS
        return fields

    def content(row: Mapping[str, Any]) -> tuple[Fields, bool]:
        """What a row asks, and whether it is new behind what was said before."""
        output = row.get("output_length")
        output_len = None if output is None else check_integer("output_length", output, 0)
        fields: Fields = {"output_len": output_len, **model_of(row)}
        if row.get("input_length") is not None:
            length = integer(row, "input_length", 1)
            if row.get("hash_ids") is None:
                return fields | {"prompt_len": length}, True
            return fields | pieces(row["hash_ids"], length, _AIPERF_BLOCK_SIZE, next(rests)), False
        if row.get("text_input") is not None:
            return fields | {"prompt": check_text("text_input", row["text_input"])}, True
        if row.get("messages") is not None:
            return fields | {"prompt": text_of(row["messages"])}, False
        texts = row.get("texts")
        texts = [row.get("text")] if texts is None else texts
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return fields | {"prompt": check_text("text", "\n".join(texts))}, False
        raise bad_value("input_length", None, "one of input_length, text_input, messages, text, texts")

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        session = record.get("session_id")
        session = None if session is None else str(session)
        if "turns" not in record:
            fields, is_new = content(record)
            yield placed(record, fields, session, is_new)
            return
        rows = record["turns"]
        if not isinstance(rows, list) or not rows:
            raise bad_value("turns", rows, "a list of at least one turn")
        session = session or f"conversation {num_openers}"
        for place, row in enumerate(rows):
            row = {"text": row} if isinstance(row, str) else row
            if not isinstance(row, Mapping):
                raise bad_value(f"turns[{place}]", row, "an object")
            fields, _ = content(row)
            yield placed(row, fields, session, True)

    return parse


def agentic_mooncake_records(path: Path) -> Iterator[Record]:
    """The rows, each with its block size: the one that all of them agree with, if they name none."""
    sizes = set(_BLOCK_SIZES)
    for record in json_lines(path):
        row = record.value
        if isinstance(row, Mapping) and isinstance(row.get("hash_ids"), list):
            length, count = row.get("input_length"), len(row["hash_ids"])
            if type(length) is int and "hash_block_size" not in row:
                sizes = {size for size in sizes if -(-length // size) == count}
    for record in json_lines(path):
        if isinstance(record.value, dict) and len(sizes) == 1:
            record = record._replace(value={"hash_block_size": min(sizes)} | record.value)
        yield record


def agentic_mooncake(_: Encoder | None) -> Parse:
    """Rows that wait for others, then for a delay and for tools, in milliseconds. Prompts are whole."""
    rests = count(_UNKNOWN)
    last = 0.0

    def parse(row: Mapping[str, Any]) -> Iterator[Fields]:
        nonlocal last
        if row.get("timestamp") is not None:
            last = check_number("timestamp", row["timestamp"])
        after = row.get("wait_for") or []
        if not isinstance(after, list):
            raise bad_value("wait_for", after, "a list of ids")
        fields: Fields = {
            "arrival_time": last,
            "output_len": integer(row, "output_length", 0),
            "id": check_text("request_id", row.get("request_id")),
            "after": after,
        }
        if after:
            parts = [check_number(name, row.get(name) or 0) for name in ("delay", "tool_wait_ms")]
            fields["delay_s"] = sum(parts) / MS
        if row.get("session_id") is not None:
            fields["session"] = str(row["session_id"])
        length = integer(row, "input_length", 1)
        if row.get("hash_ids") is None:
            yield fields | {"prompt_len": length}
            return
        size = row.get("hash_block_size")
        if size is None:
            expected = "the tokens of a piece, as the lengths of the rows leave several open, or none"
            raise bad_value("hash_block_size", None, expected)
        size = check_integer("hash_block_size", size, 1)
        yield fields | pieces(row["hash_ids"], length, size, next(rests))

    return parse


def weka(_: Encoder | None) -> Parse:
    """A conversation, its calls in order; subagents run side by side, and the call after them joins them.

    Times are seconds from the conversation's start, and all conversations begin at 0. A call is sent its
    think_time after what it waits for; else so long as it was sent after that in the recording, where the
    recording says how long that took. A subagent's own times count from its start, or from the conversation's
    where none of them is before its own marker.
    """
    places: dict[tuple[str, int], int] = {}
    rests = count(_UNKNOWN)

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        name = check_text("id", str(record.get("id") or ""))
        size = integer(record, "block_size", 1)
        calls = record.get("requests")
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise bad_value("requests", calls, "a list of calls and subagents")
        markers = [call for call in calls if call.get("type") == "subagent"]
        is_absolute = all(
            check_number("t", inner.get("t")) >= check_number("t", marker.get("t"))
            for marker in markers
            for inner in _calls_of(marker)
        )
        requests: list[Fields] = []

        def request(
            call: Mapping[str, Any], after: list[Fields], end_s: float | None, session: str
        ) -> Fields:
            kind = call.get("type")
            if kind not in ("n", "s"):
                raise bad_value("type", kind, "n, s or subagent")
            ids = call.get("hash_ids") or []
            if not isinstance(ids, list):
                raise bad_value("hash_ids", ids, "a list of ids")
            local = [places.setdefault((name, check_integer("hash_ids", i, 0)), len(places)) for i in ids]
            time = check_number("t", call.get("t"))
            length = integer(call, "in", 1)
            fields: Fields = {
                "arrival_time": time,
                "output_len": integer(call, "out", 0),
                "id": f"{name}.{len(requests)}",
                "session": session,
                "after": [other["id"] for other in after],
                **model_of(call),
            }
            think = call.get("think_time")
            if after and think is not None:
                fields["delay_s"] = check_number("think_time", think)
            elif after and end_s is not None:
                fields["delay_s"] = max(0.0, time - end_s)
            if local:
                fields |= pieces(local, length, size, next(rests))
            else:
                fields["prompt_len"] = length
            requests.append(fields)
            return fields

        def chain(
            chained: list[Mapping[str, Any]], after: list[Fields], end_s: float | None, session: str
        ) -> list[Fields]:
            """The calls of one agent, of which end_s is the recorded end of what the first waits for.

            Returns what its parent is to wait for.
            """
            joined: list[tuple[list[Fields], float]] = []  # subagents, and when they ended
            for call in chained:
                if call.get("type") == "subagent":
                    at = check_number("t", call.get("t"))
                    begin = end_s if is_absolute or end_s is None else end_s - at
                    ends = chain(_calls_of(call), after, begin, f"{name}:{call.get('agent_id', len(joined))}")
                    if call.get("status") != "async_launched" and ends is not after:
                        took_s = check_number("duration_ms", call.get("duration_ms") or 0) / MS
                        joined.append((ends, at + took_s))
                    continue
                waited = [*after, *(other for ends, _ in joined for other in ends)]
                known = [time for time in (end_s, *(time for _, time in joined)) if time is not None]
                fields = request(call, waited, max(known, default=None), session)
                if fields["output_len"] == 0:
                    continue  # it is left out, and nobody waits for it
                api = call.get("api_time")
                end_s = None if api is None else fields["arrival_time"] + check_number("api_time", api)
                after, joined = [fields], []
            return after

        chain(calls, [], 0.0, name)
        base = min((fields["arrival_time"] for fields in requests), default=0.0)
        for fields in requests:
            yield fields | {"arrival_time": fields["arrival_time"] - base}

    return parse


def _calls_of(marker: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = marker.get("requests")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise bad_value("requests", calls, "a list of a subagent's calls")
    return calls


def dynamo_records(path: Path) -> Iterator[Record]:
    """The ends of requests, by when these came, each with the ids of those that it waited for."""
    found: list[tuple[float, float, Record, Fields]] = []
    for record in json_lines(path):
        try:
            event = _event(record)
            if event.get("event_type") != "request_end":
                continue  # what a tool does shows in when the next request comes
            fields, end_ms = _request_end(event)
            found.append((fields["arrival_time"], end_ms, record, fields))
        except TraceError as error:
            yield record._replace(value=error)
    found.sort(key=lambda item: item[0])
    done: dict[str, list[tuple[float, str]]] = {}  # by agent: ends and ids that nobody has waited for yet
    last: dict[str, tuple[float, str]] = {}
    begun: dict[str, list[str]] = {}  # by agent, its subagents
    for time_ms, end_ms, record, fields in found:
        agent, parent = fields.pop("agent"), fields.pop("parent")
        waited = [last[agent]] if agent in last and last[agent][0] <= time_ms else []
        if agent not in last and parent is not None:
            waited = [last[parent]] if parent in last and last[parent][0] <= time_ms else []
            begun.setdefault(parent, []).append(agent)
        for child in begun.get(agent, ()):
            ready = [item for item in done.get(child, ()) if item[0] <= time_ms]
            if ready and ready[-1] == last[child]:
                waited.append(ready[-1])
                done[child] = []
        if agent is not None:
            last[agent] = (end_ms, fields["id"])
            done.setdefault(agent, []).append(last[agent])
            fields["session"] = agent
        fields["after"] = [name for _, name in waited]
        if waited:
            fields["delay_s"] = (time_ms - max(time for time, _ in waited)) / MS
        yield record._replace(value=fields)


def dynamo(_: Encoder | None) -> Parse:
    """What `dynamo_records` found: it is a request's fields already."""

    def parse(record: Mapping[str, Any]) -> Iterator[Fields]:
        yield dict(record)

    return parse


def _event(record: Record) -> Mapping[str, Any]:
    if isinstance(record.value, TraceError):
        raise record.value
    value = record.value
    event = value.get("event", value) if isinstance(value, Mapping) else value
    if not isinstance(event, Mapping):
        raise bad_value("event", event, "an object")
    return event


def _request_end(event: Mapping[str, Any]) -> tuple[Fields, float]:
    """A request's fields, with its agent and the agent's parent, and when it ended."""
    request = event.get("request")
    if not isinstance(request, Mapping):
        raise bad_value("request", request, "an object")
    end_ms = check_number("event_time_unix_ms", event.get("event_time_unix_ms"))
    time_ms = end_ms
    if request.get("request_received_ms") is not None:
        time_ms = check_number("request.request_received_ms", request["request_received_ms"])
    elif request.get("total_time_ms") is not None:
        time_ms = end_ms - check_number("request.total_time_ms", request["total_time_ms"])
    context = section(event, "agent_context")
    fields: Fields = {
        "arrival_time": time_ms,
        "output_len": integer(request, "output_tokens", 0),
        "id": check_text("request.request_id", request.get("request_id")),
        "agent": _agent(context, "trajectory_id", "session_id"),
        "parent": _agent(context, "parent_trajectory_id", "parent_session_id"),
        **model_of(request),
    }
    if context.get("session_type_id") is not None:
        fields["class_"] = str(context["session_type_id"])
    if request.get("replay") is None:
        return fields | {"prompt_len": integer(request, "input_tokens", 1)}, end_ms
    replay = section(request, "replay")
    size = integer(replay, "trace_block_size", 1)
    rest = _UNKNOWN + xxh3_64_intdigest(fields["id"].encode()) % 2**39
    ids = replay.get("input_sequence_hashes")
    return fields | pieces(ids, integer(replay, "input_length", 1), size, rest), end_ms


def _agent(context: Mapping[str, Any], *names: str) -> str | None:
    """Whose request it is, by the first of some names that there is."""
    name = next((name for name in names if context.get(name)), None)
    return None if name is None else check_text(f"agent_context.{name}", context[name])
