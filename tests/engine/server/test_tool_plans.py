"""What becomes of a request's tools: which parser a model has, what it may write, what it is told."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams
from pagellm.engine.errors import RequestError
from pagellm.engine.requests.structured import StructuredOutputs
from pagellm.engine.requests.tool_calls import GPT_OSS, HERMES, LLAMA3_JSON, MISTRAL
from pagellm.engine.server.tools import parser_of_template, plan_tools, tell_tools
from pagellm.engine.tokenizer.chat_template import ChatTemplate
from tests.engine.server.test_clients import HELLO
from tests.engine.server.test_tools import ADD, TOOLS, check_call, function

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
pytest.importorskip("llguidance", reason="forms need the extra structured")

PUBLISHED = Path(__file__).parents[2] / "fixtures" / "chat" / "published"


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


def test_nothing_that_is_said_beside_a_call_is_lost_to_a_model_that_knows_of_none(thinker: Path) -> None:
    def part(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text}

    call = {"function": {"name": "add", "arguments": "{}"}}
    written_call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    with LLM(thinker, num_blocks=20, show_progress=False) as llm:

        def told(*messages: dict[str, Any]) -> list[dict[str, Any]]:
            return tell_tools(llm, messages, TOOLS)[0]

        system, called = told(
            {"role": "system", "content": [part("be"), part("brief")]},
            {"role": "assistant", "content": [part("so"), part("then")], "tool_calls": [call]},
        )
        assert system["content"].startswith("be\nbrief\n\n")
        assert called["content"] == f"so\nthen\n{written_call}"
        [_, uncalled] = told({"role": "assistant", "content": "so", "tool_calls": []})
        assert uncalled["content"] == "so"
        for message in (
            {"role": "assistant", "content": [image], "tool_calls": [call]},
            {"role": "tool", "content": [part("3"), image]},
            {"role": "tool", "content": None},
        ):
            with pytest.raises(RequestError, match=r"messages\[1\].content"):
                llm.chat_prompt(told(message))
        with pytest.raises(RequestError, match="messages: found the tool call"):
            told({"role": "assistant", "tool_calls": [{"function": "add"}]})


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


def test_mistrals_templates_get_the_ids_that_they_insist_on(caller: Path) -> None:
    calls = [{"id": name, "function": {"name": "f", "arguments": {}}} for name in ("call_0123", "Abcdef789")]
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_0123", "content": "1"},
    ]
    with LLM(caller, num_blocks=20, tool_call_parser=MISTRAL, show_progress=False) as llm:
        written, _ = tell_tools(llm, messages, TOOLS)
    first, second = (call["id"] for call in written[1]["tool_calls"])
    assert re.fullmatch("[A-Za-z0-9]{9}", first)
    assert (second, written[2]["tool_call_id"]) == ("Abcdef789", first)
