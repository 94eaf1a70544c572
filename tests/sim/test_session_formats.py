"""The formats of other tools: told from the content, exact times, who waits for whom, and what is shared."""

import json
from pathlib import Path
from typing import Any

import pytest

from pagellm.__main__ import main
from pagellm.engine import TraceError
from pagellm.sim import PromptTokens, Trace, TraceRequest
from pagellm.sim.traces.describe import describe
from tests.sim.test_simulator import CONFIG, Run


def load(tmp_path: Path, *lines: Any, **options: Any) -> Trace:
    path = tmp_path / "trace"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return Trace.load(path, **options)


def waits(requests: Trace) -> list[tuple[str, float, float | None]]:
    return [(r.id, r.arrival_time, r.delay_s) for r in requests]


def shape(requests: Trace) -> list[tuple[float, int | None, int]]:
    return [(r.arrival_time, r.prompt_len, r.output_len) for r in requests]


def test_vidur(tmp_path: Path) -> None:
    trace = load(
        tmp_path, "arrived_at,num_prefill_tokens,num_decode_tokens\n", "0.5,100,20.0\n", "1.25,7,3\n"
    )
    assert trace.format == "vidur"
    assert shape(trace) == [(0.5, 100, 20), (1.25, 7, 3)]
    lengths = load(tmp_path, "num_prefill_tokens,num_decode_tokens,pd_ratio\n", "100,20,5\n", "7,3,2.3\n")
    assert shape(lengths) == [(0, 100, 20), (1, 7, 3)]


SESSION = {
    "session_id": "s",
    "arrival_time_ns": 4_000_000,
    "sub_requests": [
        {"input_toks": 3, "output_toks": 2, "tool_duration_ns": 500_000_000, "input_tok_ids": [1, 2, 3]},
        {"input_toks": 7, "output_toks": 1, "tool_duration_ns": 0, "input_tok_ids": [1, 2, 3, 9, 9, 4, 5]},
    ],
}


def test_llmservingsim(tmp_path: Path) -> None:
    """In any order, flat and agentic requests in one file, in nanoseconds."""
    flat = {"input_toks": 10, "output_toks": 4, "arrival_time_ns": 1_000_000}
    trace = load(tmp_path, SESSION, flat)
    assert trace.format == "llmservingsim"
    assert waits(trace) == [("0", 0.001, None), ("s.0", 0.004, None), ("s.1", 0.004, 0.5)]
    run = Run(trace, tmp_path)
    sent = {r["id"]: (r["arrival_s"], r["last_token_s"]) for r in run.results}
    assert sent["s.1"][0] == sent["s.0"][1] + 0.5
    assert [r["prompt_tokens"] for r in run.results if r["id"] == "s.1"] == [7]
    with pytest.raises(TraceError, match="input_tok_ids"):
        load(tmp_path, flat | {"input_tok_ids": [1]})


def test_aiperf_rows_of_sessions(tmp_path: Path) -> None:
    """Milliseconds, whether or not they are whole; a later row says what is new."""
    trace = load(
        tmp_path,
        {"session_id": "a", "timestamp": 1000.5, "input_length": 8, "output_length": 4},
        {"session_id": "b", "timestamp": 1500, "input_length": 6, "output_length": 2},
        {"session_id": "a", "delay": 250, "input_length": 3, "output_length": 2},
    )
    assert trace.format == "aiperf"
    requests = list(trace)
    assert waits(trace) == [("a.0", 0, None), ("b.0", 0.4995, None), ("a.1", 0.4995, 0.25)]
    assert [r.continues for r in requests] == [None, None, "a.0"]
    run = Run(trace, tmp_path)
    by_id = {r["id"]: r for r in run.results}
    assert by_id["a.1"]["prompt_tokens"] == 8 + 4 + 3
    assert by_id["a.1"]["cached_tokens"] == 8
    assert by_id["a.1"]["arrival_s"] == by_id["a.0"]["last_token_s"] + 0.25


def test_aiperf_mooncake_without_hashes(tmp_path: Path) -> None:
    trace = load(tmp_path, *({"timestamp": t, "input_length": 5, "output_length": 2} for t in (100, 350.5)))
    assert (trace.format, shape(trace)) == ("aiperf", [(0, 5, 2), (0.2505, 5, 2)])
    without = load(tmp_path, *({"input_length": 5, "output_length": 2} for _ in range(3)))
    assert shape(without) == [(0, 5, 2), (1, 5, 2), (2, 5, 2)]


def test_aiperf_turns(tmp_path: Path) -> None:
    turns = [{"text": "Hello there", "output_length": 3}, {"text": "And then?", "delay": 1500}]
    trace = load(tmp_path, {"session_id": "x", "turns": turns}, output_len=9)
    assert waits(trace) == [("x.0", 0, None), ("x.1", 0, 1.5)]
    assert [(r.prompt, r.output_len, r.continues) for r in trace] == [
        ("Hello there", 3, None),
        ("And then?", 9, "x.0"),
    ]
    with pytest.raises(TraceError, match=r"output length: found nothing, expected .*--output-len"):
        list(load(tmp_path, {"session_id": "x", "turns": turns}))


AGENTIC = [
    {"request_id": "p", "session_id": "main", "timestamp": 5000, "input_length": 64, "output_length": 32,
     "hash_ids": [1], "wait_for": [], "branches": ["l", "r"]},
    {"request_id": "l", "session_id": "left", "input_length": 128, "output_length": 8, "hash_ids": [1, 2],
     "wait_for": ["p"], "delay": 100, "tool_wait_ms": 400},
    {"request_id": "r", "session_id": "right", "input_length": 100, "output_length": 8, "hash_ids": [3, 4],
     "wait_for": ["p"], "prefix_reset": True},
    {"request_id": "j", "session_id": "main", "input_length": 190, "output_length": 4, "hash_ids": [1, 5, 6],
     "wait_for": ["l", "r", "p"], "tool_wait_ms": 50.5},
]  # fmt: skip


def test_agentic_mooncake(tmp_path: Path) -> None:
    """Branches wait for their root, a join for all, in milliseconds; pieces have the only fitting size."""
    trace = load(tmp_path, *AGENTIC)
    assert trace.format == "agentic-mooncake"
    assert waits(trace) == [("p", 0, None), ("l", 0, 0.5), ("r", 0, 0), ("j", 0, 0.0505)]
    assert {r.hash_block_size for r in trace} == {64}
    run = Run(trace, tmp_path, CONFIG)
    by_id = {r["id"]: r for r in run.results}
    assert by_id["l"]["arrival_s"] == by_id["p"]["last_token_s"] + 0.5
    ends = [by_id[name]["last_token_s"] for name in "lrp"]
    assert by_id["j"]["arrival_s"] == max(ends) + 0.0505
    assert by_id["j"]["cached_tokens"] == 64 + 32  # p and its answer, whose last token l has computed
    assert by_id["r"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    "fields", [{"session_id": "a"}, {"text": "b"}, {"wait_for": [], "hash_block_size": 512}]
)
def test_ends_of_prompts_that_have_no_id_are_not_taken_for_equal(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    rows = [
        {"request_id": str(time), "timestamp": time, "input_length": 700, "output_length": 1, "hash_ids": [1]}
        for time in range(3)
    ]
    form = "agentic-mooncake" if "wait_for" in fields else "aiperf"
    trace = load(tmp_path, *(row | fields for row in rows), format=form)
    assert describe(trace).shared_prefix_share == 2 * 512 / (3 * 700)


def test_agentic_mooncake_of_no_known_size_is_refused(tmp_path: Path) -> None:
    rows = [{"request_id": "p", "timestamp": 0, "input_length": 5, "output_length": 3, "hash_ids": [1],
             "wait_for": []}]  # fmt: skip
    with pytest.raises(TraceError, match="hash_block_size: found nothing"):
        list(load(tmp_path, *rows))
    [request] = load(tmp_path, rows[0] | {"hash_block_size": 32})
    assert request.hash_block_size == 32


def call(t: float, size: int = 128, **fields: Any) -> dict[str, Any]:
    ids = list(range(size // 64))
    return {"t": t, "type": "n", "model": "m", "in": size, "out": 4, "hash_ids": ids} | fields


WEKA: dict[str, Any] = {
    "id": "trace", "models": ["m"], "block_size": 64, "hash_id_scope": "local",
    "requests": [
        call(10, api_time=2.0),
        {"t": 13, "type": "subagent", "agent_id": "a", "subagent_type": "Explore", "status": "completed",
         "duration_ms": 5000, "models": ["m"], "requests": [call(0.5, api_time=1.0), call(2.5, type="s")]},
        {"t": 13, "type": "subagent", "agent_id": "b", "subagent_type": "Explore", "status": "completed",
         "duration_ms": 9000, "models": ["m"], "requests": [call(1.0)]},
        call(24, size=200, hash_ids=[0, 1, 2]),
        call(30, think_time=1.25),
    ],
}  # fmt: skip


def test_weka(tmp_path: Path) -> None:
    """Two subagents side by side and the call that joins them; in one document over many lines as well."""
    for trace in (load(tmp_path, WEKA), load(tmp_path, json.dumps(WEKA, indent=1))):
        assert trace.format == "weka"
        found = {r.id: (r.arrival_time, tuple(r.after or ()), r.delay_s) for r in trace}
        assert found == {
            "trace.0": (9.5, (), None),
            "trace.1": (0.0, ("trace.0",), 1.5),  # the marker is 1 s after the answer, and then half a second
            "trace.2": (2.0, ("trace.1",), 1.0),
            "trace.3": (0.5, ("trace.0",), 2.0),
            "trace.4": (23.5, ("trace.0", "trace.2", "trace.3"), 2.0),  # the later one ended at 13 + 9
            "trace.5": (29.5, ("trace.4",), 1.25),
        }
    assert [len(r.hash_ids or ()) for r in trace if r.id == "trace.4"] == [
        4
    ]  # 200 tokens, three whole pieces


def test_weka_hash_ids_are_of_one_conversation(tmp_path: Path) -> None:
    first, second = load(tmp_path, *({**WEKA, "id": name, "requests": [call(0)]} for name in "ab"))
    assert first.hash_ids is not None
    assert second.hash_ids is not None
    assert not set(first.hash_ids) & set(second.hash_ids)


def end(name: str, received: int, ended: int, agent: str, parent: str | None = None) -> dict[str, Any]:
    context = {"session_type_id": "research", "session_id": "run", "trajectory_id": agent}
    if parent:
        context["parent_trajectory_id"] = parent
    return {
        "schema": "dynamo.agent.trace.v1", "event_type": "request_end", "event_time_unix_ms": ended,
        "agent_context": context,
        "request": {"request_id": name, "output_tokens": 4, "request_received_ms": received,
                    "replay": {"trace_block_size": 64, "input_length": 128,
                               "input_sequence_hashes": [2**63 + 1, 7]}},
    }  # fmt: skip


def test_dynamo(tmp_path: Path) -> None:
    """Records stand in the order of their ends; a tool's time is the gap before the next request."""
    tool = {"schema": "dynamo.agent.trace.v1", "event_type": "tool_end", "event_time_unix_ms": 5}
    trace = load(
        tmp_path,
        end("p0", 1000, 2000, "planner"),
        tool,
        end("r0", 2100, 2600, "researcher", "planner"),
        {"timestamp": 3, "event": end("r1", 2850, 3000, "researcher", "planner")},
        end("p1", 3500, 4000, "planner"),
    )
    assert trace.format == "dynamo"
    assert [(r.id, r.arrival_time, tuple(r.after or ()), r.delay_s) for r in trace] == [
        ("p0", 0.0, (), None),
        ("r0", 1.1, ("p0",), 0.1),
        ("r1", 1.85, ("r0",), 0.25),
        ("p1", 2.5, ("p0", "r1"), 0.5),
    ]
    assert {(r.session, r.class_) for r in trace} == {("planner", "research"), ("researcher", "research")}


MODEL = {"model": "m"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
MOONCAKE = {"timestamp": 5, "input_length": 9, "output_length": 2, "hash_ids": [1]}
ASKED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
LENGTHS = {"input_length": 9, "output_length": 2}
TOKENS = {"input_toks": 3, "output_toks": 2}
TURN = {"text": "a", "output_length": 2}
NATIVE = {"arrival_time": 0, "prompt_len": 3, "output_len": 2}


@pytest.mark.parametrize(
    ("form", "lines"),
    [
        ("jsonl", [NATIVE | MODEL]),
        ("json", [{"requests": [NATIVE | MODEL]}]),
        ("mooncake", [MOONCAKE | MODEL]),
        ("aiperf", [LENGTHS | MODEL]),
        ("aiperf", [{"turns": [TURN, TURN], **MODEL}]),
        ("aiperf", [{"turns": [TURN | MODEL], "model": "other"}]),
        ("agentic-mooncake", [LENGTHS | {"request_id": "a", "wait_for": [], **MODEL}]),
        ("weka", [WEKA]),
        ("llmservingsim", [{"arrival_time_ns": 0, **TOKENS, **MODEL}]),
        ("llmservingsim", [{"arrival_time_ns": 0, "sub_requests": [TOKENS | MODEL]}]),
        ("vllm-custom", [{"prompt": "Hi", "output_tokens": 3} | MODEL]),
        ("openai-batch", [{"custom_id": "a", "body": CHAT | MODEL}]),
        ("sharegpt", [{"items": ASKED, **MODEL}]),
        ("burstgpt", ["Timestamp,Model,Request tokens,Response tokens\n", "5,m,9,2\n"]),
        ("vidur", ["arrived_at,num_prefill_tokens,num_decode_tokens,model\n", "0,9,2,m\n"]),
    ],
)  # fmt: skip
def test_the_model_that_a_request_asks_for_is_kept(form: str, lines: list[Any], tmp_path: Path) -> None:
    trace = load(tmp_path, *lines)
    assert trace.format == form
    assert {request.model for request in trace} == {"m"}
    trace.save(tmp_path / "converted.jsonl")
    assert {request.model for request in Trace.load(tmp_path / "converted.jsonl")} == {"m"}


def test_a_dynamo_request_names_its_model(tmp_path: Path) -> None:
    row = end("p0", 1000, 2000, "planner")
    row["request"]["model"] = "m"
    assert [request.model for request in load(tmp_path, row)] == ["m"]


def test_servegen(tmp_path: Path) -> None:
    trace = load(tmp_path, "request_id,timestamp,input_tokens,output_tokens\n", "0,0.25,9,4\n", "1,2.5,5,3\n")
    assert (trace.format, shape(trace)) == ("servegen", [(0.25, 9, 4), (2.5, 5, 3)])
    batch = [{"request_id": n, "type": "text", "input_length": 20, "hash_ids": [n, 5]} for n in range(2)]
    offline = load(tmp_path, *batch, output_len=7)
    assert (offline.format, shape(offline)) == ("servegen-batch", [(0, 20, 7), (0, 20, 7)])
    assert {r.hash_block_size for r in offline} == {16}


def test_openai_batch(tmp_path: Path) -> None:
    chat = {"model": "m", "messages": [{"role": "system", "content": "Be terse."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 5}  # fmt: skip
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": [4, 5]}},
    ]
    trace = load(tmp_path, *lines, output_len=3)
    assert trace.format == "openai-batch"
    assert [(r.id, r.arrival_time, r.prompt, r.prompt_token_ids, r.output_len) for r in trace] == [
        ("a", 0, "Be terse.\nHi", None, 5),
        ("b", 0, None, (4, 5), 3),
    ]


def test_inference_perf(tmp_path: Path) -> None:
    def entry(start: float, **fields: Any) -> dict[str, Any]:
        info = {"request_metrics": {"text": {"input_tokens": 9}}, "response_metrics": {"output_tokens": 4}}
        return {"start_time": start, "end_time": start + 1, "info": info, "error": None} | fields

    trace = load(tmp_path, json.dumps([entry(12.5), entry(11.0), entry(13.0, error={"error_type": "x"})]))
    assert (trace.format, shape(trace)) == ("inference-perf", [(0, 9, 4), (1.5, 9, 4)])
    assert trace.num_dropped == 1


def test_vllm_data_sets(tmp_path: Path) -> None:
    trace = load(tmp_path, {"prompt": "Hello"}, {"prompt": "Bye", "output_tokens": 3}, output_len=5)
    assert trace.format == "vllm-custom"
    assert [(r.arrival_time, r.prompt, r.output_len) for r in trace] == [(0, "Hello", 5), (1, "Bye", 3)]
    said = [("user", "Hi"), ("assistant", "Hello there!"), ("user", "Bye"), ("assistant", "So long.")]
    talk = {"id": "c", "messages": [{"role": role, "content": content} for role, content in said]}
    for lines in ((json.dumps([talk]),), (talk,)):  # the multi-turn benchmark's array, and JSON Lines
        chats = load(tmp_path, *lines)
        assert chats.format == "sharegpt"
        assert [(r.prompt, r.session) for r in chats] == [("Hi", "c"), ("Hi\nHello there!\nBye", "c")]


def test_sharegpt_turns_go_on_with_what_was_said(tmp_path: Path) -> None:
    class Bytes:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    turns = [("human", "Hi"), ("gpt", "Hello there!"), ("human", "Bye"), ("gpt", "So long.")]
    record = {"id": "c", "conversations": [{"from": who, "value": what} for who, what in turns]}
    run = Run(load(tmp_path, record), tmp_path, prompt_tokens=PromptTokens(300, Bytes()))
    # "Hi", an answer of 3 tokens, as many as are estimated, and "\nBye".
    assert [(r["prompt_tokens"], r["output_tokens"]) for r in run.results] == [(2, 3), (2 + 3 + 4, 2)]
    assert run.results[1]["arrival_s"] == run.results[0]["last_token_s"]


@pytest.mark.parametrize(
    "lines",
    [
        ["arrived_at,num_prefill_tokens,num_decode_tokens\n", "0.5,100,20\n"],
        [SESSION],
        [{"timestamp": 0, "input_length": 5, "output_length": 2}],
        AGENTIC,
        [WEKA],
        [end("p0", 1000, 2000, "planner")],
        ["request_id,timestamp,input_tokens,output_tokens\n", "0,0.25,9,4\n"],
    ],
)
def test_describe_says_what_the_times_are(
    lines: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(tmp_path, *lines)
    assert main(["trace", "describe", str(tmp_path / "trace")]) == 0
    shown = capsys.readouterr().out
    assert "seconds" in next(line for line in shown.splitlines() if line.startswith("format"))


@pytest.mark.parametrize("text", ["a line of a poem\nand one more\n", '{"foo": 1}\n', "a,b\n1,2\n"])
def test_what_is_in_no_format_is_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"format: found .*expected one of json, .*weka, .*vidur"):
        load(tmp_path, text)


CALL = {"t": 0.0, "type": "n", "in": 128, "out": 4}
REPORTED = {"start_time": 1.0, "info": {"input_tokens": 9, "output_tokens": 4}}


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("weka", {"id": "a", "block_size": 64, "requests": [CALL | {"hash_ids": 1}]}, "hash_ids: found 1, e"),
        ("dynamo", end("p", 1, 2, "a") | {"agent_context": 1}, "agent_context: found 1, expected an object"),
        ("dynamo", end("p", 1, 2, "a") | {"agent_context": {"trajectory_id": [1]}},
         r"agent_context.trajectory_id: found \[1\], expected a string"),
        ("dynamo", end("p", 1, 2, "a") | {"agent_context": {"parent_session_id": [1]}},
         r"agent_context.parent_session_id: found \[1\], expected a string"),
        ("dynamo", end("p", 1, 2, "a") | {"request": {"request_id": "p", "output_tokens": 1, "replay": 0}},
         "replay: found 0, expected an object"),
        ("inference-perf", [REPORTED | {"info": {"response_metrics": 4}}], "response_metrics: found 4, exp"),
        ("inference-perf", [REPORTED | {"info": {"request_metrics": {"text": "a"}}}], "text: found 'a', exp"),
    ],
)  # fmt: skip
def test_what_is_no_object_or_list_is_refused_by_name(
    form: str, record: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=message):
        list(load(tmp_path, record, format=form))


def test_waiting_requests_survive_conversion(tmp_path: Path) -> None:
    trace = load(tmp_path, *AGENTIC)
    trace.save(tmp_path / "own.jsonl")
    again = Trace.load(tmp_path / "own.jsonl")
    assert again.format == "jsonl"
    assert list(again) == list(trace)
    assert all(isinstance(request, TraceRequest) for request in again)
