"""Structured output and tools over HTTP, asked for by OpenAI's client and in vLLM's own fields."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams
from pagellm.engine.requests.structured import StructuredOutputs
from pagellm.engine.requests.tool_calls import GPT_OSS, HERMES, LLAMA3_JSON, MISTRAL
from pagellm.engine.server.tools import parser_of_template, plan_tools, tell_tools
from pagellm.engine.tokenizer.chat_template import ChatTemplate
from tests.conftest import real_weights
from tests.engine.server.conftest import serving, settings, wait_until_ready
from tests.engine.server.test_clients import ask, refusal

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
pytest.importorskip("llguidance", reason="forms need the extra structured")
openai = pytest.importorskip("openai", reason="the server's tests need the client openai")

PUBLISHED = Path(__file__).parents[2] / "fixtures" / "chat" / "published"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "hello there"}]


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
# Knows of tools, and says little of them: the small model's context is short.
KNOWS_TOOLS = '{% if tools %}<tool_call>{"name"}{% endif %}'


@pytest.fixture(scope="module")
def caller(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a chat template that knows of tools."""
    directory = tmp_path_factory.mktemp("caller") / "model"
    shutil.copytree(thinker, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = KNOWS_TOOLS + config["chat_template"]
    path.write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def llm(caller: Path) -> Iterator[LLM]:
    """The model without a server, to compare with."""
    with LLM(caller, show_progress=False, **settings()) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(caller: Path) -> Iterator[Any]:
    """A server that is ready."""
    with serving(lambda: LLM(caller, show_progress=False, **settings()), "tiny") as service:
        wait_until_ready(service)
        yield service


BRIEF: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 150, "seed": 1}
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}


def chat(client: Any, **settings: Any) -> Any:
    return client.chat.completions.create(**{**BRIEF, "extra_body": QUIET, **settings})


def test_a_response_format_is_the_form_of_the_answer(client: Any, llm: LLM) -> None:
    schema = {"name": "person", "strict": True, "schema": PERSON}
    answer = chat(client, response_format={"type": "json_schema", "json_schema": schema})
    [choice] = answer.choices
    person = json.loads(choice.message.content)
    assert (list(person), choice.finish_reason, choice.message.refusal) == (["name", "age"], "stop", None)
    own = SamplingParams(max_tokens=150, seed=1, structured={"json": PERSON})
    [expected] = llm.chat(HELLO, own, chat_template_kwargs=QUIET["chat_template_kwargs"])
    assert choice.message.content == expected.text, "and it is what LLM.chat gives"
    streamed = chat(client, response_format={"type": "json_schema", "json_schema": schema}, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected.text


def test_the_clients_own_parser_gets_what_it_asks_for(client: Any) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Answer(pydantic.BaseModel):
        yes: bool
        how_many: int = pydantic.Field(ge=0, le=9)

    parsed = client.chat.completions.parse(**BRIEF, response_format=Answer, extra_body=QUIET)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_json_object_is_an_object(client: Any) -> None:
    answer = chat(client, response_format={"type": "json_object"}, n=8)
    ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert all(isinstance(json.loads(choice.message.content), dict) for choice in ended)
    assert all(choice.message.content.lstrip().startswith("{") for choice in answer.choices)
    assert chat(client, response_format={"type": "text"}, max_tokens=3).choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"structured_outputs": {"choice": ["red", "blue"]}}, {"red", "blue"}),
        ({"structured_outputs": {"regex": "(red|blue)"}}, {"red", "blue"}),
        ({"structured_outputs": {"grammar": 'root ::= "red" | "blue"'}}, {"red", "blue"}),
        ({"structured_outputs": {"grammar": 'start: "red" | "blue"'}}, {"red", "blue"}),
        ({"structured_outputs": {"json": {"enum": ["red", "blue"]}}}, {'"red"', '"blue"'}),
        ({"guided_choice": ["red", "blue"]}, {"red", "blue"}),
        ({"guided_regex": "red|blue"}, {"red", "blue"}),
    ],
)
def test_vllms_fields_are_obeyed_at_both_endpoints(server: Any, fields: Any, allowed: set[str]) -> None:
    said = ask(server, "/v1/chat/completions", {**BRIEF, **QUIET, **fields})["choices"][0]
    assert (said["message"]["content"] in allowed, said["finish_reason"]) == (True, "stop")
    [said] = ask(server, "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 50, **fields})[
        "choices"
    ]
    assert (said["text"] in allowed, said["finish_reason"]) == (True, "stop")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "found 'xml', expected text, json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema: found None"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            "response_format.json: .*not",
        ),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "structured_outputs.regex: "),
        ({"structured_outputs": {}}, "structured_outputs", "found no form"),
        ({"structured_outputs": {"yaml": "a"}}, "structured_outputs", "found the field 'yaml'"),
        (
            {"structured_outputs": {"regex": "a"}, "guided_regex": "a"},
            "guided_regex",
            "expected none beside structured_outputs",
        ),
        ({"structured_outputs": {"regex": "[a-z]?" * 40_000}}, "structured_outputs", "takes more than"),
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
def test_what_cannot_be_had_is_refused_by_the_name_of_its_field(
    server: Any, fields: Any, param: str, message: str
) -> None:
    error = refusal(server, "/v1/chat/completions", {**BRIEF, **QUIET, **fields})
    assert error["param"] == param
    assert re.search(message, error["message"])


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


def test_auto_lets_the_model_speak_or_call(client: Any, llm: LLM) -> None:
    """Made to say a call by its prompt's own continuation: the text is forced by a form that has one in it."""  # noqa: E501
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


def test_calls_and_their_results_go_back_to_a_model_that_knows_of_none(thinker: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "3"}]},
    ]
    with LLM(thinker, num_blocks=20, show_progress=False) as llm:
        written, tools = tell_tools(llm, messages, TOOLS)
        system, _, called, result = written
    assert tools is None
    assert '"name": "switch_light"' in system["content"]
    assert called["content"] == '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>'
    assert result == {"role": "user", "content": "<tool_response>\n3\n</tool_response>"}


def test_structured_neighbours_and_aborts_do_not_change_an_answer(server: Any, client: Any, llm: LLM) -> None:
    from concurrent.futures import ThreadPoolExecutor

    own = SamplingParams(max_tokens=60, seed=1, structured={"json": PERSON})
    [expected] = llm.generate("hello", own)
    body = {"prompt": "hello", "max_tokens": 60, "seed": 1, "structured_outputs": {"json": PERSON}}

    def abandon(number: int) -> None:
        stream = client.completions.create(model="tiny", prompt=f"go {number}", max_tokens=80, stream=True)
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(16) as pool:
        abandoned = pool.map(abandon, range(12))
        answers = list(pool.map(lambda _: ask(server, "/v1/completions", body), range(24)))
        list(abandoned)
    assert {answer["choices"][0]["text"] for answer in answers} == {expected.text}


# Which parser a model has, and what it may write.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", HERMES),
        ("Qwen-Qwen3-0.6B", HERMES),
        ("ibm-granite-granite-4.0", HERMES),
        ("mistralai-Ministral-3-14B-Reasoning-2512", MISTRAL),
        ("openai-gpt-oss-120b", GPT_OSS),
        ("Qwen3.5-4B", None),
        ("GLM-4.6", None),
        ("MiniMax-M2", None),
        ("deepseek-ai-DeepSeek-V3.1", None),
    ],
)
def test_a_template_says_how_its_model_writes_calls(name: str, kind: str | None) -> None:
    source = (PUBLISHED / f"{name}.jinja").read_text(encoding="utf-8")
    assert parser_of_template(ChatTemplate(source, {})) == kind


def test_llama_3s_template_is_recognised() -> None:
    """In the words of its instructions, and of the calls that it writes."""
    source = (
        '{%- if tools is not none %}{{- \'Respond in the format {"name": function name, "parameters": dictionary '  # noqa: E501
        "of argument name and its value}.' }}{%- endif %}{{- '{\"name\": \"' + tool_call.name + '\", ' }}"
        "{{- '\"parameters\": ' }}{{- tool_call.arguments | tojson }}"
    )
    assert parser_of_template(ChatTemplate(source, {})) == LLAMA3_JSON


@pytest.fixture(scope="module", params=[HERMES, LLAMA3_JSON, MISTRAL, GPT_OSS])
def told(request: pytest.FixtureRequest, thinker: Path) -> Iterator[LLM]:
    """The small model, as one that writes calls in each way."""
    with LLM(thinker, num_blocks=100, tool_call_parser=request.param, show_progress=False) as llm:
        yield llm


def generated(llm: LLM, n: int = 6, **settings: Any) -> list[tuple[str, list[Any], str]]:
    """Text and parts of some answers that tools are for, and why they ended."""
    plan = plan_tools(llm, **settings)
    assert plan.parser is not None
    params = SamplingParams(
        max_tokens=200, seed=2, n=n, structured=plan.form, skip_special_tokens=False, logit_bias={27: 2.0}
    )
    results = []
    for output in llm.generate("ab", params)[0].outputs:
        parser = plan.parser()
        parts: list[Any] = [*parser.append(output.text), *parser.finish()]
        results.append((output.text, parts, str(output.finish_reason)))
    return results


def test_a_required_call_is_written_as_the_model_writes_calls(told: LLM) -> None:
    ended = 0
    for text, parts, reason in generated(told, tools=TOOLS, tool_choice="required"):
        if reason == "stop":
            ended += 1
            calls = [part for part in parts if isinstance(part, tuple) and len(part) == 2]
            assert calls, text
            for name, arguments in calls:
                check_call(name, arguments)
            if told.engine.config.tool_call_parser != GPT_OSS:
                assert len(calls) == len(parts), "and nothing else is said"
    assert ended


def test_a_strict_tool_is_obeyed_where_the_model_may_choose(told: LLM) -> None:
    strict = [function("add", True, a={"type": "integer", "minimum": 0, "maximum": 9})]
    for _, parts, _ in generated(told, tools=strict, tool_choice="auto", parallel_tool_calls=False):
        calls = [part for part in parts if isinstance(part, tuple) and len(part) == 2]
        assert len(calls) <= 1
        for name, arguments in calls:
            check_call(name, arguments)


def test_a_tool_that_is_not_strict_may_have_a_schema_that_cannot_be_had(told: LLM) -> None:
    loose = [function("odd", None, a={"not": {"type": "string"}}), ADD]
    assert plan_tools(told, loose, "required").form is not None


def test_the_form_of_an_answer_keeps_its_options_beside_tools(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = StructuredOutputs(json=schema, disable_additional_properties=True, disable_any_whitespace=True)
    texts = {text for text, *_ in generated(llm, n=40, tools=TOOLS, answer_form=form)}
    assert {text for text in texts if text.startswith("{")} == {'{"a":true}', '{"a":false}'}


def test_mistrals_templates_get_the_ids_that_they_insist_on(thinker: Path) -> None:
    with LLM(thinker, num_blocks=20, tool_call_parser=MISTRAL, show_progress=False) as llm:
        call = {"id": "call_0123456789abcdef", "function": {"name": "f", "arguments": {}}}
        messages = [{"role": "tool", "tool_call_id": call["id"], "content": "1"}]
        written, _ = tell_tools(llm, [{"role": "user", "content": "x"}, *messages], None)
        assert len(written) == 2


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
