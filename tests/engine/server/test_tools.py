"""Tools over HTTP: what is called by chats and by responses, whole and streamed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM
from tests.conftest import real_weights
from tests.engine.server.conftest import serving, settings, wait_until_ready
from tests.engine.server.test_clients import HELLO, refusal
from tests.engine.server.test_forms import BRIEF, QUIET, chat

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
pytest.importorskip("llguidance", reason="forms need the extra structured")
openai = pytest.importorskip("openai", reason="the server's tests need the client openai")


def function(name: str, strict: bool | None = None, **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    described: dict[str, Any] = {"name": name, "description": f"Does {name}.", "parameters": schema}
    return {"type": "function", "function": described | ({} if strict is None else {"strict": strict})}


LIGHT = function("switch_light", room={"enum": ["hall", "bath"]}, on={"type": "boolean"})
ADD = function("add", a={"type": "integer", "minimum": 0, "maximum": 9})
TOOLS = [LIGHT, ADD]


@pytest.fixture(scope="module")
def server(caller: Path) -> Iterator[Any]:
    """A server that is ready."""
    with serving(lambda: LLM(caller, show_progress=False, **settings()), "tiny") as service:
        wait_until_ready(service)
        yield service


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": "all"}, "tools", "found 'all', expected a list"),
        ({"tools": [{"type": "web"}]}, "tools", r"tools\[0\]: found"),
        ({"tools": [function("a b")]}, "tools", r"tools\[0\].function.name: found 'a b'"),
        ({"tools": [ADD, ADD]}, "tools", r"tools\[1\].function.name: found add for the second time"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice", "found 'perhaps'"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "tool_choice",
            "among the tools",
        ),
        ({"tool_choice": "required"}, "tool_choice", "found 'required' without tools"),
        (
            {"tools": [function("f", True, a={"not": {"type": "string"}})]},
            "tools",
            r"tools\[0\].function.parameters: .*not",
        ),
    ],
)
def test_a_tool_that_cannot_be_had_is_refused_by_the_name_of_its_field(
    server: Any, fields: Any, param: str, message: str
) -> None:
    error = refusal(server, "/v1/chat/completions", {**BRIEF, **QUIET, **fields})
    assert error["param"] == param
    assert re.search(message, error["message"])


def test_tools_that_would_take_long_to_compile_are_refused_at_once(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagellm.engine.grammar.trial._TRIAL_S", 0.0)
    tools = [function(name, a={"type": "string"}) for name in ("f", "g")]
    body = {**BRIEF, **QUIET, "tools": tools, "tool_choice": "required"}
    error = refusal(server, "/v1/chat/completions", body)
    assert error["param"] == "tools"
    assert error["message"] == "tools: found one that takes more than 0.0 s to compile"
    bad = function("h", a={"not": {}})
    monkeypatch.undo()
    compile_form, seen = server.llm.engine.compile_form, []

    def compile_slower(form: Any) -> None:
        monkeypatch.setattr("pagellm.engine.grammar.trial._TRIAL_S", 0.0 if seen else 60.0)
        seen.append(form)
        compile_form(form)

    monkeypatch.setattr(server.llm.engine, "compile_form", compile_slower)
    error = refusal(server, "/v1/chat/completions", {**body, "tools": [*tools, bad]})
    assert error["message"].startswith("tools[0].function.parameters: found one that takes more than 0.0 s")
    assert len(seen) == 2


@pytest.mark.parametrize("tools", ["all", 1, [{"type": "web"}], [ADD, ADD]])
def test_who_counts_the_tokens_of_a_chat_is_told_the_same_of_its_tools(server: Any, tools: Any) -> None:
    told = [
        refusal(server, path, {"messages": HELLO, "tools": tools})
        for path in ("/tokenize", "/v1/chat/completions")
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize("others", [{}, {"parallel_tool_calls": False}, {"n": 5}])
def test_a_call_that_is_required_comes_and_its_arguments_obey_the_schema(client: Any, others: Any) -> None:
    answer = chat(client, tools=TOOLS, tool_choice="required", **others)
    ids = []
    for choice in answer.choices:
        if choice.finish_reason != "length":  # it may go on calling
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert len(choice.message.tool_calls) == 1 or others != {"parallel_tool_calls": False}
        for call in choice.message.tool_calls:
            check_call(call.function.name, call.function.arguments)
            assert (call.type, call.id[:5]) == ("function", "call_")
            ids.append(call.id)
    assert ids
    assert len(set(ids)) == len(ids)


def check_call(name: str, text: str) -> None:
    arguments = json.loads(text)
    if name == "add":
        assert list(arguments) == ["a"]
        assert arguments["a"] in range(10)
    else:
        assert name == "switch_light"
        assert arguments["room"] in ("hall", "bath")
        assert isinstance(arguments["on"], bool)


def test_a_function_that_is_named_is_called(client: Any) -> None:
    for choice in (
        {"type": "function", "function": {"name": "add"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "add"}}],
            },
        },
    ):
        answer = chat(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        [call] = answer.choices[0].message.tool_calls
        check_call(call.function.name, call.function.arguments)
        assert call.function.name == "add"


def assembled(stream: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """What a stream's chunks come to."""
    content, calls, reason = "", dict[int, list[str]](), None
    for chunk in stream:
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            if call.index not in calls:
                assert call.id.startswith("call_")
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments
    return content, [(name, arguments) for _, (name, arguments) in sorted(calls.items())], reason


@pytest.mark.parametrize("choice", ["required", "auto"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_stream_of_calls_is_the_whole_answer(client: Any, choice: str, seed: int) -> None:
    tools = [
        function(tool["function"]["name"], True, **tool["function"]["parameters"]["properties"])
        for tool in TOOLS
    ]
    settings = {"tools": tools, "tool_choice": choice, "logit_bias": {"27": 3}}
    body = {**BRIEF, "seed": seed, "max_tokens": 120}
    whole = client.chat.completions.create(**body, **settings, extra_body=QUIET).choices[0]
    stream = client.chat.completions.create(**body, **settings, extra_body=QUIET, stream=True)
    content, calls, reason = assembled(stream)
    assert content == (whole.message.content or "")
    assert calls == [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or []]
    assert reason == whole.finish_reason


def test_auto_lets_the_model_speak_or_call(client: Any) -> None:
    """A form makes it write a call where there are no tools, and where none is to be called."""
    written = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>'
    forced = {"structured_outputs": {"choice": [written]}}
    plain = client.chat.completions.create(**BRIEF, extra_body=QUIET | forced).choices[0]
    assert (plain.message.content, plain.finish_reason, plain.message.tool_calls) == (written, "stop", None)
    spoken = client.chat.completions.create(
        **BRIEF, tools=TOOLS, tool_choice="none", extra_body=QUIET | forced
    ).choices[0]
    assert (spoken.message.content, spoken.finish_reason) == (written, "stop"), "none never parses"
    called = client.chat.completions.create(
        **{**BRIEF, "tools": TOOLS, "extra_body": QUIET | {"structured_outputs": {"choice": ["said"]}}}
    ).choices[0]
    assert called.message.content == "said" or called.message.tool_calls
    free = client.chat.completions.create(
        **{**BRIEF, "max_tokens": 5}, tools=TOOLS, extra_body=QUIET
    ).choices[0]
    assert free.message.content
    assert free.finish_reason == "length"


def test_a_thought_comes_before_a_call(client: Any) -> None:
    answer = client.chat.completions.create(
        **BRIEF,
        tools=[ADD],
        tool_choice="required",
        parallel_tool_calls=False,
        extra_body={"thinking_token_budget": 6},
    ).choices[0]
    [call, *_] = answer.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    assert answer.message.reasoning_content
    assert answer.message.content is None


def test_responses_have_the_same_calls_as_a_chat(client: Any) -> None:
    chatted = chat(client, tools=[ADD], tool_choice="required", parallel_tool_calls=False)
    [expected] = chatted.choices[0].message.tool_calls
    flat = {"type": "function", **ADD["function"], "strict": None}
    body: dict[str, Any] = {
        "model": "tiny", "input": "hello there", "max_output_tokens": 150, "tools": [flat],
        "tool_choice": "required", "parallel_tool_calls": False, "extra_body": {**QUIET, "seed": 1},
    }  # fmt: skip
    [call] = [item for item in client.responses.create(**body).output if item.type == "function_call"]
    assert (call.name, call.arguments) == ("add", expected.function.arguments)
    pieces = [
        event.delta
        for event in client.responses.create(**body, stream=True)
        if event.type == "response.function_call_arguments.delta"
    ]
    assert "".join(pieces) == call.arguments


def test_a_call_is_an_item_of_a_response_whole_and_streamed(client: Any) -> None:
    parameters = {
        "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
        "additionalProperties": False,
    }  # fmt: skip
    tool = {"type": "function", "name": "flip", "parameters": parameters, "strict": True}
    asked = {"model": "tiny", "input": "flip it", "temperature": 0, "max_output_tokens": 150}
    asked |= {"tools": [tool], "tool_choice": "required", "extra_body": QUIET}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    calls = [item for item in whole.output if item.type == "function_call"]
    assert calls
    assert all(call.name == "flip" and set(json.loads(call.arguments)) == {"a"} for call in calls[:1])
    last = events[-1].response
    streamed = [item for item in last.output if item.type == "function_call"]
    assert [(one.name, one.arguments) for one in streamed] == [(one.name, one.arguments) for one in calls]
    for call in streamed:
        mine = [event for event in events if getattr(event, "item_id", None) == call.id]
        deltas = [event.delta for event in mine if event.type == "response.function_call_arguments.delta"]
        [done] = [event for event in mine if event.type == "response.function_call_arguments.done"]
        assert "".join(deltas) == done.arguments == call.arguments


@pytest.fixture(scope="module")
def real() -> Iterator[Any]:
    """A server of the default model."""
    with serving(lambda: real_weights("smollm2-135m-instruct", max_model_len=2048), "smollm") as service:
        wait_until_ready(service)
        yield service


@pytest.mark.weights
def test_a_real_model_calls_a_tool_with_the_clients_own_helpers(real: Any) -> None:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0) as client:
        weather = function("get_weather", True, city={"type": "string", "maxLength": 30})
        body: dict[str, Any] = {
            "model": "smollm",
            "temperature": 0,
            "max_tokens": 60,
            "tools": [weather],
            "tool_choice": "required",
            "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
            "parallel_tool_calls": False,
        }
        answer = client.chat.completions.create(**body)
        [call] = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        content, calls, reason = assembled(client.chat.completions.create(**body, stream=True))
        assert (content, calls, reason) == ("", [("get_weather", call.function.arguments)], "tool_calls")
        again = [
            *body["messages"],
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 24 degrees."},
        ]
        last = client.chat.completions.create(**{**body, "messages": again, "tool_choice": "none"})
        assert last.choices[0].message.content
