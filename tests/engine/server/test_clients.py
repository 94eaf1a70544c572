"""OpenAI's client against a live server: what it gets is what the engine gives, bit for bit."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
openai = pytest.importorskip("openai", reason="the server's tests need the client openai")

HELLO = [{"role": "user", "content": "hello there"}]
PROMPTS = ["hello world", "the quick brown fox", "a", "hello world and all who live in it " * 3]


def request(server: Any, path: str, body: Any = None, method: str | None = None, **headers: str) -> Any:
    """Status, headers and text of an answer."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(f"{server.url}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def ask(server: Any, path: str, body: Any, **headers: str) -> Any:
    """The JSON that a path answers a body with."""
    status, _, text = request(server, path, body, **headers)
    assert status == 200, text
    return json.loads(text)


def refusal(server: Any, path: str, body: Any, status: int = 400) -> Any:
    """What a path refuses a body with."""
    found, _, text = request(server, path, body)
    assert found == status, text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.3, "seed": 7, "top_p": 0.9}])
def test_a_completion_is_what_generate_gives(llm: LLM, client: Any, prompt: str, settings: Any) -> None:
    [expected] = llm.generate(prompt, SamplingParams(max_tokens=12, **settings))
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=12, extra_body={"return_token_ids": True}, **settings
    )
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.token_ids == expected.token_ids
    assert choice.prompt_token_ids == expected.prompt_token_ids
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


def test_a_stream_is_the_whole_answer_in_pieces(client: Any) -> None:
    settings = {"model": "tiny", "prompt": PROMPTS[:2], "n": 2, "seed": 3, "max_tokens": 20, "logprobs": 2}
    whole = client.completions.create(**settings)
    stream = client.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 80
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None and chunk.id == last.id for chunk in chunks)
    for choice in whole.choices:
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            values = [value for piece in pieces for value in getattr(piece.logprobs, name)]
            assert values == getattr(choice.logprobs, name)
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]


def test_continuous_usage_counts_up(client: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        model="tiny", prompt="hello", max_tokens=6, stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_prompts_may_be_texts_token_ids_and_lists_of_both(llm: LLM, server: Any) -> None:
    ids = llm.tokenizer.encode("hello")
    for prompt, expected in [
        ("hello", ["hello"]),
        (ids, [ids]),
        (["hello", "a"], ["hello", "a"]),
        ([ids, [5, 6]], [ids, [5, 6]]),
        (["a", ids], ["a", ids]),
    ]:
        body = {"prompt": prompt, "max_tokens": 5, "temperature": 0}
        texts = [choice["text"] for choice in ask(server, "/v1/completions", body)["choices"]]
        outputs = llm.generate(expected, SamplingParams(temperature=0, max_tokens=5))
        assert texts == [output.text for output in outputs]
    for prompt in (None, [], [[]], 5, [1.5], [None], {"prompt": "x"}, [["a"]], [10**6]):
        assert refusal(server, "/v1/completions", {"prompt": prompt})["param"] == "prompt"


def test_scoring_by_echo_has_the_same_floats_in_both_places(llm: LLM, server: Any) -> None:
    ids = llm.tokenizer.encode("the quick brown fox")
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    [choice] = ask(server, "/completions", body)["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None
    [expected] = llm.generate([ids], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    assert expected.prompt_logprobs is not None
    values, tops = logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1]
    for found, top, wanted in zip(values, tops, expected.prompt_logprobs[1:], strict=True):
        assert wanted is not None
        assert found == wanted.logprob
        assert found in top.values()
        assert max(top.values()) == wanted.top[0][1]
    assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())
    nothing = ask(server, "/v1/completions", body | {"max_tokens": 0})
    assert nothing["choices"][0]["text"] == "the quick brown fox"
    assert nothing["choices"][0]["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
    assert nothing["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_are_by_token_id(llm: LLM, server: Any) -> None:
    body = {"prompt": "hello", "prompt_logprobs": 2, "max_tokens": 1, "temperature": 0}
    [choice] = ask(server, "/v1/completions", body)["choices"]
    [expected] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))
    assert expected.prompt_logprobs is not None
    assert choice["prompt_logprobs"][0] is None
    for found, wanted in zip(choice["prompt_logprobs"][1:], expected.prompt_logprobs[1:], strict=True):
        assert wanted is not None
        assert found[str(wanted.token_id)]["logprob"] == wanted.logprob
        for rank, (token_id, logprob) in enumerate(wanted.top, 1):
            assert (found[str(token_id)]["rank"], found[str(token_id)]["logprob"]) == (rank, logprob)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 11}])
def test_a_chat_is_what_chat_gives_its_thought_apart(llm: LLM, client: Any, settings: Any) -> None:
    params = SamplingParams(max_tokens=30, thinking_token_budget=6, **settings)
    [expected] = llm.chat(HELLO, params)
    assert expected.reasoning
    asked = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 30, **settings}
    asked["extra_body"] = {"thinking_token_budget": 6}
    answer = client.chat.completions.create(**asked)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text)
    assert message.reasoning == message.reasoning_content == expected.reasoning
    assert answer.usage.completion_tokens_details.reasoning_tokens == expected.num_reasoning_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected.text
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == expected.reasoning
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason


def test_thinking_may_be_turned_off_and_thoughts_left_out(llm: LLM, server: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 8, "temperature": 0}
    [expected] = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=8), thinking=False)
    for how in (
        {"thinking": False},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        message = ask(server, "/v1/chat/completions", body | how)["choices"][0]["message"]
        assert message["content"] == expected.text
        assert "reasoning" not in message
    answer = ask(server, "/v1/chat/completions", body | {"include_reasoning": False})
    assert "reasoning" not in answer["choices"][0]["message"]


def test_chat_logprobs_have_bytes_and_the_likeliest(llm: LLM, client: Any) -> None:
    [expected] = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=4, logprobs=3))
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    assert expected.outputs[0].logprobs is not None
    for found, wanted in zip(answer.choices[0].logprobs.content, expected.outputs[0].logprobs, strict=True):
        assert found.logprob == wanted.logprob
        assert bytes(found.bytes) == llm.tokenizer.token_bytes(wanted.token_id)
        assert [top.logprob for top in found.top_logprobs] == [logprob for _, logprob in wanted.top]


def test_roles_parts_and_the_final_message(llm: LLM, server: Any) -> None:
    def content(messages: Any, **more: Any) -> Any:
        body = {"messages": messages, "max_tokens": 6, "temperature": 0, "thinking": False, **more}
        return ask(server, "/chat/completions", body)["choices"][0]["message"]["content"]

    system = [{"role": "system", "content": "be brief"}, *HELLO]
    developer = [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, *HELLO]
    assert content(system) == content(developer) != content(HELLO)
    begun = [*HELLO, {"role": "assistant", "content": "I say"}]
    params = SamplingParams(temperature=0, max_tokens=6)
    [expected] = llm.chat(begun, params, thinking=False, continue_final_message=True)
    assert content(begun, continue_final_message=True) == expected.text
    assert content(begun, continue_final_message=True, echo=True) == "I say" + expected.text


def test_stops_and_their_reasons(llm: LLM, server: Any) -> None:
    [plain] = llm.generate("hello world", SamplingParams(temperature=0, max_tokens=12))
    body = {"prompt": "hello world", "max_tokens": 12, "temperature": 0}
    token = plain.token_ids[3]
    first = plain.token_ids.index(token)
    [choice] = ask(server, "/v1/completions", body | {"stop_token_ids": [token]})["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    [expected] = llm.generate("hello world", SamplingParams(temperature=0, max_tokens=first + 1))
    seen = ask(server, "/v1/completions", body | {"max_tokens": first + 1, "return_token_ids": True})
    assert seen["choices"][0]["token_ids"] == expected.token_ids
    only = ask(server, "/v1/completions", body | {"allowed_token_ids": [71, 72], "return_token_ids": True})
    assert set(only["choices"][0]["token_ids"]) <= {71, 72}
    cut = ask(server, "/v1/completions", body | {"truncate_prompt_tokens": 3, "return_token_ids": True})
    assert cut["choices"][0]["prompt_token_ids"] == plain.prompt_token_ids[-3:]


def test_bad_words_are_kept_out_at_every_endpoint(llm: LLM, server: Any) -> None:
    body = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
    params = SamplingParams(temperature=0, max_tokens=12)
    [free] = llm.generate("hello", params)
    words = [letter for letter in free.text if letter.isascii()]
    [output] = llm.generate("hello", replace(params, bad_words=words))
    [choice] = ask(server, "/v1/completions", body | {"bad_words": words})["choices"]
    assert choice["text"] == output.text != free.text
    said = [
        ask(server, path, {name: HELLO, "thinking": False, "temperature": 0, "bad_words": words})
        for path, name in (("/v1/chat/completions", "messages"), ("/v1/responses", "input"))
    ]
    assert said[0]["choices"][0]["message"]["content"] == said[1]["output"][0]["content"][0]["text"]
    assert (
        ask(server, "/v1/completions/render", body | {"bad_words": words})[0]["sampling_params"]["bad_words"]
        == words
    )


def test_a_cached_prefix_is_told_and_a_salt_keeps_tenants_apart(server: Any) -> None:
    body = {"prompt": "some prompt of its own, long enough for blocks", "max_tokens": 1}

    def cached(**more: Any) -> Any:
        usage = ask(server, "/v1/completions", body | more)["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert request(server, "/reset_prefix_cache", b"", "POST")[0] == 200
    assert cached() == 0
    assert cached() > 0
    assert cached(cache_salt="mine") == 0


def test_a_known_field_is_obeyed_or_refused_by_its_name(server: Any) -> None:
    text, chat = "/v1/completions", "/v1/chat/completions"
    for path, field, value in [
        (text, "temperature", -1), (text, "temperature", "hot"), (text, "max_tokens", -1), (text, "n", 0),
        (text, "top_p", 2), (text, "logprobs", 1000), (text, "stop", 5), (text, "best_of", 3),
        (text, "suffix", "x"), (text, "use_beam_search", True), (text, "bad_words", [""]),
        (text, "response_format", {"type": "xml"}), (text, "structured_outputs", {"regex": "("}),
        (text, "guided_json", "{"), (text, "logit_bias", {"x": 1}), (text, "allowed_token_ids", []),
        (text, "prompt_logprobs", -1), (text, "truncate_prompt_tokens", -2), (text, "seed", 1 << 70),
        (text, "stream_options", {"include_usage": True}), (chat, "tools", "x"), (chat, "top_logprobs", 2),
        (chat, "tool_choice", "required"), (chat, "functions", [{}]), (chat, "audio", {}),
        (chat, "response_format", {"type": "json_schema"}), (chat, "chat_template", "{{ x }}"),
        (text, "spaces_between_special_tokens", True), (chat, "spaces_between_special_tokens", True),
    ]:  # fmt: skip
        body = {"prompt": "x"} if path == text else {"messages": HELLO}
        if field == "spaces_between_special_tokens":
            assert request(server, path, body | {field: value, "max_tokens": 1})[0] == 200
            body["skip_special_tokens"] = False
            assert request(server, path, body | {field: False, "max_tokens": 1})[0] == 200
        found, _, answer = request(server, path, body | {field: value})
        assert found == 400, (field, answer)
        error = json.loads(answer)["error"]
        assert field in error["message"], (field, answer)
        assert field == "tools" or error["param"] == field
    for bad in (
        [],
        "x",
        None,
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ):
        assert refusal(server, chat, {"messages": bad})["param"] == "messages"


def test_unknown_fields_pass_and_are_counted(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def count() -> float:
        [line] = [line for line in metrics(server) if line.startswith("pagellm:unknown_request_fields_total")]
        return float(line.split()[-1])

    before = count()
    for _ in range(2):
        ask(server, "/v1/completions", {"prompt": "x", "max_tokens": 1, "no_stop_trim": True})
    assert count() == before + 2
    assert capsys.readouterr().err.count("'no_stop_trim'") == 1


def metrics(server: Any) -> list[str]:
    status, headers, text = request(server, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    return text.splitlines()


def test_what_is_no_request_is_refused(server: Any) -> None:
    assert "JSON" in refusal(server, "/v1/completions", b"{")["message"]
    refusal(server, "/v1/completions", b"[]")
    refusal(server, "/v1/completions", b"\xff")
    refusal(server, "/v1/completions", b"")
    assert refusal(server, "/v1/completions", {"prompt": "x", "model": "gpt-5"}, 404)["param"] == "model"
    assert refusal(server, "/v1/embeddings", {}, 404)["type"] == "NotFoundError"
    status, headers, text = request(server, "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")
    assert json.loads(text)["error"]["type"] == "MethodNotAllowedError"


def test_the_clients_errors_are_its_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.chat.completions.create(model="gpt-5", messages=HELLO)


def test_models_and_versions(client: Any, server: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other-name"]
    assert client.models.retrieve("other-name").max_model_len == 256
    assert client.completions.create(model="other-name", prompt="x", max_tokens=1).model == "other-name"
    assert "version" in json.loads(request(server, "/version")[2])
    assert json.loads(request(server, "/load")[2]) == {"server_load": 0}
    for path in ("/metrics", "/health"):
        assert request(server, path, method="HEAD")[0] == 200


def test_tokenize_and_back(llm: LLM, server: Any) -> None:
    tokenizer = llm.tokenizer
    answer = ask(server, "/tokenize", {"prompt": "hello world", "return_token_strs": True})
    ids = tokenizer.encode("hello world")
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), 256)
    assert "".join(answer["token_strs"]) == "hello world"
    assert ask(server, "/tokenize", {"content": "hello world"})["tokens"] == ids
    assert ask(server, "/tokenize", {"messages": HELLO})["tokens"] == llm.chat_prompt(HELLO)
    assert ask(server, "/detokenize", {"tokens": ids})["prompt"] == "hello world"
    refusal(server, "/tokenize", {})
    refusal(server, "/detokenize", {"tokens": [10**9]})
    refusal(server, "/detokenize", {"tokens": "x"})
    info = json.loads(request(server, "/tokenizer_info")[2])
    assert info["eos_token"] == "<|im_end|>"
    assert "im_start" in info["chat_template"]


def test_what_is_rendered_is_what_would_be_computed(llm: LLM, server: Any) -> None:
    chat = ask(server, "/v1/chat/completions/render", {"messages": HELLO, "temperature": 0.5})
    assert chat["token_ids"] == llm.chat_prompt(HELLO)
    assert chat["sampling_params"]["temperature"] == 0.5
    texts = ask(server, "/v1/completions/render", {"prompt": ["a", "b"]})
    assert [one["token_ids"] for one in texts] == [llm.tokenizer.encode("a"), llm.tokenizer.encode("b")]


def test_a_request_has_an_id_which_may_be_given(server: Any) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    status, headers, text = request(server, "/v1/completions", body, **{"X-Request-Id": "mine-1"})
    assert (status, headers["x-request-id"], json.loads(text)["id"]) == (200, "mine-1", "cmpl-mine-1")
    first, second = (request(server, "/v1/completions", body)[1]["x-request-id"] for _ in range(2))
    assert first != second


def test_the_description_names_every_path_and_field(server: Any) -> None:
    document = json.loads(request(server, "/openapi.json")[2])
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models/{model}"} <= set(document["paths"])
    schemas = document["components"]["schemas"]
    assert {"prompt", "temperature", "logprobs"} <= set(schemas["CompletionRequest"]["properties"])
    named = {name for name in json.dumps(document).split('"') if name.startswith("#/components/schemas/")}
    assert {name.rpartition("/")[2] for name in named} <= set(schemas)


def test_metrics_have_the_names_that_dashboards_know(client: Any, server: Any) -> None:
    client.completions.create(model="tiny", prompt="x", max_tokens=3)
    lines = metrics(server)
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
        "request_success_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "request_time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket", "request_inference_time_seconds_bucket",
        "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket",
        "request_prompt_tokens_bucket", "request_generation_tokens_bucket", "request_params_n_bucket",
        "request_params_max_tokens_bucket", "iteration_tokens_total_bucket",
    ):  # fmt: skip
        found = [line for line in lines if line.startswith(f"vllm:{name}{{")]
        assert found, name
        assert all('model_name="tiny"' in line for line in found)
    assert any(line.startswith("vllm:cache_config_info{") and 'block_size="8"' in line for line in lines)


def test_the_same_seed_gives_the_same_answer_whoever_else_is_served(llm: LLM, server: Any) -> None:
    """64 clients at once on few blocks: streams and whole answers, some of which go away in the midst."""
    asked = [(PROMPTS[index % 4], index, 8 + index % 24) for index in range(64)]
    params = [SamplingParams(temperature=1, seed=seed, max_tokens=most) for _, seed, most in asked]
    expected = [output.text for output in llm.generate([prompt for prompt, *_ in asked], params)]

    def one(index: int) -> str | None:
        prompt, seed, most = asked[index]
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            settings = {"model": "tiny", "prompt": prompt, "seed": seed, "temperature": 1, "max_tokens": most}
            if index % 3 == 0:
                return str(client.completions.create(**settings).choices[0].text)
            stream = client.completions.create(**settings, stream=True)
            if index % 3 == 1:
                return "".join(chunk.choices[0].text for chunk in stream)
            next(iter(stream))
            stream.close()
            return None

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(one, range(64)))
    assert [(index, text) for index, text in enumerate(found) if text not in (None, expected[index])] == []
