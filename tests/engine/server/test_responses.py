"""`/v1/responses` by OpenAI's client: whole, as a stream, and carried on by the client itself."""

import time
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams
from tests.engine.server.test_clients import HELLO, ask, refusal, request
from tests.engine.server.test_lifetime import value_of

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
openai = pytest.importorskip("openai", reason="the server's tests need the client openai")

THINKS: dict[str, Any] = {"thinking_token_budget": 6}


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.2, "seed": 3}])
def test_a_response_is_what_chat_gives(llm: LLM, client: Any, settings: Any) -> None:
    [expected] = llm.chat(HELLO, SamplingParams(max_tokens=30, thinking_token_budget=6, **settings))
    more = {"seed": settings["seed"]} if "seed" in settings else {}
    response = client.responses.create(
        model="tiny", input="hello there", max_output_tokens=30, temperature=settings["temperature"],
        extra_body=THINKS | more,
    )  # fmt: skip
    thought, message = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", expected.reasoning)
    assert (message.type, message.role) == ("message", "assistant")
    assert response.output_text == expected.text
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.object, response.error, response.model) == ("response", None, "tiny")
    assert response.id.startswith("resp_")
    assert message.id.startswith("msg_")
    assert response.temperature == settings["temperature"]
    assert response.to_dict()["store"] is False
    usage = response.usage
    assert usage.input_tokens == len(expected.prompt_token_ids)
    assert (usage.output_tokens, usage.total_tokens) == (30, 30 + usage.input_tokens)
    assert usage.output_tokens_details.reasoning_tokens == expected.num_reasoning_tokens
    assert usage.input_tokens_details.cached_tokens <= usage.input_tokens


def test_a_stream_is_its_events_in_order(client: Any) -> None:
    asked = {"model": "tiny", "input": "hello there", "max_output_tokens": 30, "temperature": 0}
    asked |= {"extra_body": THINKS, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for at, kind in enumerate(kinds) if kind != kinds[at - 1]] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert events[0].response.status == events[1].response.status == "in_progress"
    assert events[0].response.output == []

    def without_ids(items: Any) -> Any:
        return [item.to_dict() | {"id": None} for item in items]

    last = events[-1].response
    assert last.id == events[0].response.id
    assert without_ids(last.output) == without_ids(whole.output)
    assert last.usage.output_tokens == whole.usage.output_tokens
    for index, kind in enumerate(("reasoning_text", "output_text")):
        deltas = [event for event in events if event.type == f"response.{kind}.delta"]
        [done] = [event for event in events if event.type == f"response.{kind}.done"]
        assert "".join(event.delta for event in deltas) == done.text == last.output[index].content[0].text
        assert {(event.item_id, event.output_index) for event in deltas} == {(last.output[index].id, index)}
        if kind == "output_text":
            logprobs = [one.to_dict() for event in deltas for one in event.logprobs]
            in_whole = [one.to_dict() for one in last.output[1].content[0].logprobs]
            assert logprobs == in_whole[: len(logprobs)]
            assert len(in_whole) == 30 - last.usage.output_tokens_details.reasoning_tokens
            assert len(logprobs[0]["top_logprobs"]) == 2


def test_the_clients_own_stream_accumulates_it(llm: LLM, client: Any) -> None:
    [said] = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=6), thinking=False)
    asked = {"model": "tiny", "input": "hello there", "temperature": 0}
    body = {"thinking": False, "stop_token_ids": said.token_ids[-1:]}
    with client.responses.stream(**asked, extra_body=body) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert (final.status, final.incomplete_details) == ("completed", None)
    assert "".join(texts) == final.output_text


def test_the_input_may_be_a_conversation_which_the_client_carries_on(llm: LLM, client: Any) -> None:
    def text_of(value: Any, **more: Any) -> str:
        asked = {"model": "tiny", "max_output_tokens": 8, "temperature": 0, "extra_body": {"thinking": False}}
        return str(client.responses.create(**asked, input=value, **more).output_text)

    def expected(*messages: Any) -> str:
        params = SamplingParams(temperature=0, max_tokens=8)
        return llm.chat(list(messages), params, thinking=False)[0].text

    system = {"role": "system", "content": "be brief"}
    assert text_of("hello there", instructions="be brief") == expected(system, *HELLO)
    parts = [{"type": "input_text", "text": "hello"}, {"type": "input_text", "text": "there"}]
    user = {"role": "user", "content": "hello\nthere"}
    assert text_of([{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]) == (
        expected(system, user)
    )
    first = client.responses.create(
        model="tiny", input="hello there", max_output_tokens=9, temperature=0, extra_body={"thinking": False}
    )
    again = {"role": "user", "content": "again"}
    carried_on = [*HELLO, *[item.to_dict() for item in first.output], again]
    said = {"role": "assistant", "content": first.output_text}
    assert text_of(carried_on) == expected(*HELLO, said, again)


def test_items_that_belong_together_are_one_turn() -> None:
    from pagellm.engine.server.response_input import messages_of_input

    call = {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "1", "output": "5"}
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    calls = [
        {"id": name, "type": "function", "function": {"name": "add", "arguments": "{}"}} for name in "12"
    ]
    user = {"role": "user", "content": "add"}
    assert messages_of_input([user, thought, call, call | {"call_id": "2"}, result]) == [
        user,
        {"role": "assistant", "reasoning": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "name": "add", "content": "5"},
    ]
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "5"}]}
    assert messages_of_input([thought, said, said]) == [
        {"role": "assistant", "reasoning": "hm", "content": "5"},
        {"role": "assistant", "content": "5"},
    ]


def test_what_would_have_to_be_kept_or_is_not_there_is_refused_by_its_name(server: Any) -> None:
    for field, value in [
        ("store", True), ("background", True), ("previous_response_id", "resp_1"), ("conversation", "c"),
        ("prompt", {"id": "p"}), ("truncation", "auto"), ("n", 2), ("max_tokens", 5), ("echo", True),
        ("include", ["file_search_call.results"]), ("tools", [{"type": "web_search"}]), ("top_logprobs", 2),
        ("reasoning", {"summary": "detailed"}), ("text", {"verbosity": "low"}), ("max_tool_calls", 1),
        ("input", []), ("input", 5), ("input", [{"type": "item_reference", "id": "x"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image"}]}]), ("input", [{"role": "x"}]),
        ("input", [{"type": "function_call", "call_id": "1"}]), ("temperature", -1),
        ("response_format", {"type": "json_object"}), ("tools", 1),
        ("input", [{"type": "function_call_output", "call_id": {}, "output": "5"}]),
    ]:  # fmt: skip
        error = refusal(server, "/v1/responses", {"input": "x"} | {field: value})
        assert field in error["message"], (field, value, error)
        assert error["param"] == field, (field, value, error)
    for kept in ({"store": False}, {"background": False}, {"truncation": "disabled"}, {"store": None}):
        body = {"input": "x", "max_output_tokens": 1, "include": ["reasoning.encrypted_content"]}
        assert ask(server, "/responses", body | kept)["status"] == "incomplete"


def test_what_means_nothing_within_a_field_is_counted(server: Any) -> None:
    before = value_of(server, "pagellm:unknown_request_fields_total")
    body = {
        "input": "hi",
        "max_output_tokens": 1,
        "reasoning": {"depth": 3},
        "text": {"colour": "red"},
        "x": 1,
    }
    ask(server, "/v1/responses", body)
    assert value_of(server, "pagellm:unknown_request_fields_total") == before + 3


def test_what_a_client_sent_comes_back_also_where_its_integers_are_long(server: Any) -> None:
    body = {"input": "x", "max_output_tokens": 1, "metadata": {"a": [10**30, -(2**64)]}}
    assert ask(server, "/v1/responses", body)["metadata"] == body["metadata"]
    _, _, events = request(server, "/v1/responses", body | {"stream": True})
    assert events.count(str(10**30)) == 3  # of what begins, of what goes on, and of its end


def test_a_stream_that_cannot_go_on_says_so(server: Any, client: Any, monkeypatch: Any) -> None:
    engine, step = server.llm.engine, server.llm.engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.02) or step())
    stream = client.responses.create(model="tiny", input="hello", max_output_tokens=100, stream=True)
    next(iter(stream))
    server.thread.abort(list(server.thread._live))
    *_, last = list(stream)
    assert (last.type, last.response.error.code) == ("response.failed", "server_error")
