"""Structured output over HTTP, asked for by OpenAI's client and in vLLM's own fields."""

import json
import re
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams
from pagellm.engine.grammar.forms import closed_where_unsaid
from tests.engine.server.test_clients import HELLO, ask, refusal

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
pytest.importorskip("llguidance", reason="forms need the extra structured")
pytest.importorskip("openai", reason="the server's tests need the client openai")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
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
        ({"grammar": 'root ::= "red" | "blue"'}, {"red", "blue"}),
        ({"json_schema": {"enum": ["red", "blue"]}}, {'"red"', '"blue"'}),
        ({"response_format": {"type": "json_object", "schema": {"const": "red"}}}, {'"red"'}),
        ({"response_format": {"type": "json_schema", "schema": {"const": "red"}}}, {'"red"'}),
    ],
)
def test_vllms_and_llama_cpps_fields_are_obeyed_at_both_endpoints(
    server: Any, fields: Any, allowed: set[str]
) -> None:
    said = ask(server, "/v1/chat/completions", {**BRIEF, **QUIET, **fields})["choices"][0]
    assert (said["message"]["content"] in allowed, said["finish_reason"]) == (True, "stop")
    [said] = ask(server, "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 50, **fields})[
        "choices"
    ]
    assert (said["text"] in allowed, said["finish_reason"]) == (True, "stop")


OPEN = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
CLOSED = OPEN | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (OPEN, CLOSED),
        ({"type": "array", "items": OPEN}, {"type": "array", "items": CLOSED}),
        ({"$ref": "#/$defs/x", "$defs": {"x": OPEN}}, {"$ref": "#/$defs/x", "$defs": {"x": CLOSED}}),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        *(
            (as_it_is, as_it_is)
            for as_it_is in (
                OPEN | {"additionalProperties": True},
                OPEN | {"additionalProperties": {"type": "string"}},
                OPEN | {"patternProperties": {"^x": {}}},
                OPEN | {"required": ["a", "b"]},
                OPEN | {"anyOf": [{"required": ["b"]}]},
                {"allOf": [OPEN, {"properties": {"b": {}}}]},
                {"enum": [OPEN]},
                {"type": "object"},
                True,
                [3],
            )
        ),
    ],
)
def test_an_object_has_what_its_schema_names_unless_it_says_more(schema: Any, closed: Any) -> None:
    assert closed_where_unsaid(schema) == closed


def test_an_answer_ends_where_its_schema_does(server: Any) -> None:
    """As OpenAI's strict mode has it."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": OPEN}}
    body = {"prompt": "a", "max_tokens": 90, "n": 12, "seed": 1, "response_format": form}
    choices = ask(server, "/v1/completions", body)["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert all(json.loads(choice["text"]).keys() == {"a"} for choice in choices)


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
        (
            {"response_format": {"type": "text"}, "guided_regex": "(a"},
            "guided_regex",
            "^guided_regex.regex: ",
        ),
        ({"response_format": {"type": "json_object", "schema": 3}}, "response_format", "json: found 3"),
        ({"json_schema": {"not": {}}}, "json_schema", "^json_schema.json: "),
        ({"grammar": "root ::= this is (not"}, "grammar", "^grammar.grammar: "),
        ({"structured_outputs": {}}, "structured_outputs", "found no form"),
        ({"structured_outputs": {"yaml": "a"}}, "structured_outputs", "found the field 'yaml'"),
        (
            {"structured_outputs": {"regex": "a"}, "guided_regex": "a"},
            "guided_regex",
            "expected none beside structured_outputs",
        ),
        ({"structured_outputs": {"regex": "[a-z]?" * 40_000}}, "structured_outputs", "takes more than"),
    ],
)
def test_a_form_that_cannot_be_had_is_refused_by_the_name_of_its_field(
    server: Any, fields: Any, param: str, message: str
) -> None:
    error = refusal(server, "/v1/chat/completions", {**BRIEF, **QUIET, **fields})
    assert error["param"] == param
    assert re.search(message, error["message"])


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
