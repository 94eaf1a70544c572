"""What a server takes from whom, how much, and for how long."""

import re
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Semaphore
from typing import Any

import pytest

from pagellm.engine import LLM, ConfigError
from tests.engine.server.conftest import eventually, serving, settings, wait_until_ready
from tests.engine.server.test_clients import HELLO, ask, metrics, refusal, request
from tests.engine.server.test_lifetime import open_stream, standing_still, start_command, value_of

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
openai = pytest.importorskip("openai", reason="the server's tests need the client openai")


@pytest.fixture(scope="module")
def guarded(thinker: Path) -> Iterator[Any]:
    """A server with two keys, where three prompts may wait, of 40 tokens together."""
    from pagellm.engine.server.limits import Limits

    def load() -> LLM:
        return LLM(thinker, show_progress=False, **settings())

    with serving(load, "tiny", keys=["first", "second"], limits=Limits(3, 40)) as service:
        wait_until_ready(service)
        yield service


def test_a_key_is_asked_for_wherever_something_is_computed(guarded: Any) -> None:
    for path, body in [
        ("/v1/completions", {"prompt": "x"}), ("/chat/completions", {"messages": HELLO}),
        ("/tokenize", {"prompt": "x"}), ("/v1/completions/render", {"prompt": "x"}), ("/v1/models", None),
        ("/reset_prefix_cache", {}), ("/openapi.json", None), ("/nowhere", None),
    ]:  # fmt: skip
        for authorization in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
            status, headers, text = request(guarded, path, body, **authorization)
            assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
            assert "AuthenticationError" in text
    for path in ("/health", "/metrics", "/version"):
        assert request(guarded, path)[0] == 200


def test_each_of_the_keys_opens(guarded: Any) -> None:
    for key in ("first", "second"):
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0) as client:
            assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="third", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@pytest.mark.parametrize(("prompt", "num_before", "said"), [("a", 3, "3 requests"), ("a" * 45, 1, "tokens")])
def test_who_would_wait_too_long_is_refused_at_once(
    guarded: Any, prompt: str, num_before: int, said: str
) -> None:
    thread = guarded.thread
    body = {"prompt": prompt, "max_tokens": 2, "stream": True}

    def ask() -> Any:
        return request(guarded, "/v1/completions", body, Authorization="Bearer first")

    assert eventually(lambda: thread.num_queued == 0)
    with standing_still(guarded):
        connections = [open_stream(guarded.url, body, "first") for _ in range(num_before)]
        assert eventually(lambda: thread.num_queued == num_before)
        status, headers, text = ask()
        assert (status, headers["retry-after"]) == (503, "1")
        assert said in text
        connections.pop().close()
    for connection in connections:  # who was there before is served
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(1 << 16)
        connection.close()
    assert eventually(lambda: (thread.num_queued, thread.num_queued_tokens) == (0, 0))
    assert ask()[0] == 200


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagellm.engine.commands.serve import _api_keys

    file = tmp_path / "keys"
    file.write_text("one\n\ntwo\n")
    assert _api_keys(None) == []
    assert _api_keys(str(file)) == ["one", "two"]
    monkeypatch.setenv("PAGELLM_API_KEYS", "three, four")
    assert _api_keys(str(file)) == ["three", "four", "one", "two"]
    for content in (b"", b"\n", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="api_key_file"):
            _api_keys(str(file))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_queued_requests", 0, "a positive integer"),
        ("max_queued_tokens", 0, "a positive integer"),
        ("max_body_bytes", None, "a positive integer"),
        ("max_n", 1025, "an integer from 1 to 1024"),
        ("max_logprobs", 101, "an integer from 0 to 100"),
        ("max_stop_strings", -1, "an integer from 0 on"),
        ("request_timeout", 0.0, "a number from 0.001 to 1e+06"),
        ("keep_alive", float("nan"), "a number from 0.001 to 1e+06"),
    ],
)
def test_a_bound_that_could_not_hold_is_refused_by_its_name(name: str, value: Any, expected: str) -> None:
    from pagellm.engine.server.limits import Limits

    with pytest.raises(ConfigError, match=rf"^{name}: found .*, expected {re.escape(expected)}$"):
        Limits(**{name: value})


@pytest.fixture(scope="module")
def bounded(thinker: Path) -> Iterator[Any]:
    """A server that takes little, and whose streams say soon that they are alive."""
    from pagellm.engine.server.limits import Limits

    limits = Limits(
        max_queued_tokens=50,
        max_body_bytes=2000,
        max_n=2,
        max_logprobs=3,
        max_stop_strings=2,
        request_timeout=3,
        keep_alive=0.05,
    )
    load = partial(LLM, thinker, show_progress=False, max_num_batched_tokens=8, **settings())
    with serving(load, "tiny", limits=limits, allowed_origins=["https://one.example"]) as service:
        wait_until_ready(service)
        yield service


@pytest.mark.parametrize(
    ("path", "field", "value", "most"),
    [
        ("/v1/completions", "n", 3, 2),
        ("/v1/completions", "logprobs", 4, 3),
        ("/v1/completions", "prompt_logprobs", 4, 3),
        ("/v1/chat/completions", "top_logprobs", 4, 3),
        ("/v1/completions", "stop", ["a", "b", "c"], 2),
    ],
)
def test_a_request_may_ask_for_so_much(bounded: Any, path: str, field: str, value: Any, most: int) -> None:
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": HELLO, "logprobs": True}
    error = refusal(bounded, path, body | {field: value})
    assert error["param"] == field
    assert f"expected {most} at most" in error["message"]
    less = value[:-1] if isinstance(value, list) else value - 1
    assert request(bounded, path, body | {field: less, "max_tokens": 1})[0] == 200


def test_a_text_that_cannot_fit_is_refused_before_its_tokens_are_looked_for(
    server: Any,
) -> None:
    text = "the quick brown fox " * 10_000
    messages = [{"role": "user", "content": text}]
    for path, body in [
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": ["a", text]}),
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/chat/completions", {"messages": messages, "sanitize_control_tokens": True}),
        ("/v1/responses", {"input": text}),
    ]:
        error = refusal(server, path, body)
        assert "tokens at least, expected at most" in error["message"]
        assert error["param"] == next(iter(body))
    body = {"prompt": text, "truncate_prompt_tokens": 5, "max_tokens": 1}
    assert ask(server, "/v1/completions", body)["usage"]["prompt_tokens"] == 5
    assert ask(server, "/tokenize", {"prompt": text})["count"] > 100_000


def test_a_body_has_so_many_bytes(bounded: Any) -> None:
    error = refusal(bounded, "/v1/completions", {"prompt": "x" * 2000}, 413)
    assert error["type"] == "RequestTooLargeError"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = bounded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:  # one that does not say how many
        connection.sendall(head + b"400\r\n" + b"x" * 1024 + b"\r\n400\r\n" + b"x" * 1024 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_who_would_wait_with_too_many_tokens_is_refused_after_its_text_was_seen(bounded: Any) -> None:
    short, long = {"prompt": "a", "max_tokens": 1}, {"prompt": "a b c d " * 12, "max_tokens": 1}
    assert request(bounded, "/v1/completions", long)[0] == 200  # it waits for nobody
    with standing_still(bounded):
        connection = open_stream(bounded.url, short)
        assert eventually(lambda: bounded.thread.num_queued == 1)
        status, headers, _ = request(bounded, "/v1/completions", long)
        assert (status, headers["retry-after"]) == (503, "1")
    connection.close()
    lines = metrics(bounded)
    rejected = [line for line in lines if line.startswith("vllm:admission_rejections_total{")]
    assert [float(line.split()[-1]) for line in rejected] == [0.0, 1.0]


def test_a_request_that_takes_too_long_is_given_up(bounded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True}
    engine = bounded.llm.engine
    asked = [body, body | {"stream": True, "n": 2}]
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.1) or step())
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(partial(request, bounded, "/v1/completions"), asked))
    with standing_still(bounded), ThreadPoolExecutor() as pool:  # before the engine has seen them
        answers += list(pool.map(partial(request, bounded, "/v1/completions"), asked))
    for (status, _, text), expected in zip(answers, (504, 200, 504, 504), strict=True):
        assert status == expected
        assert "more than 3 s" in text
        assert text.endswith("data: [DONE]\n\n") == (status == 200)
    assert eventually(lambda: not engine.has_unfinished)
    assert engine.block_manager.num_free_blocks == engine.config.num_blocks


def test_the_time_counts_from_the_arrival(bounded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "limits", replace(bounded.limits, request_timeout=0.2))
    host, port = bounded.url.removeprefix("http://").split(":")
    body = b'{"prompt": "hello", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head)
        time.sleep(0.4)  # a slow client's body
        connection.sendall(body)
        assert connection.recv(100).startswith(b"HTTP/1.1 504")
    assert eventually(lambda: not bounded.llm.engine.has_unfinished)


def test_a_stream_without_news_says_that_it_is_alive(bounded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bounded.llm.engine
    steps, step = Semaphore(0), engine.step
    monkeypatch.setattr(engine, "step", lambda: steps.acquire(timeout=60) and step())
    connection = open_stream(bounded.url, {"prompt": "hello", "max_tokens": 2, "stream": True})
    received = b""
    while received.count(b": keep-alive\n\n") < 2:
        received += connection.recv(1000)
    steps.release(10)
    while b"[DONE]" not in received:
        received += connection.recv(1000)
    connection.close()
    # Comments, which no client takes for data.
    with openai.OpenAI(base_url=f"{bounded.url}/v1", api_key="x", max_retries=0) as client:
        chunks = client.completions.create(model="tiny", prompt="hello", max_tokens=2, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_pages_from_elsewhere_are_let_in_where_their_origin_is_named(bounded: Any, guarded: Any) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for server, origin, allowed in [
        (bounded, "https://one.example", "https://one.example"),
        (bounded, "https://two.example", None),
        (guarded, "https://one.example", None),
    ]:
        _, headers, _ = request(server, "/v1/completions", method="OPTIONS", Origin=origin, **asks)
        assert headers["access-control-allow-origin"] == allowed
        _, headers, _ = request(server, "/version", Origin=origin)
        assert headers["access-control-allow-origin"] == allowed


@pytest.mark.parametrize("when", ["queued", "prefilling", "streaming"])
def test_who_goes_away_frees_everything_whenever_it_is(
    bounded: Any, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = bounded.llm.engine
    steps, step = Semaphore(0), engine.step

    def slow_step() -> Any:
        steps.acquire(timeout=60)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)
    num_steps = {"queued": 0, "prefilling": 2, "streaming": 12}[when]  # of 8 tokens, of a prompt of 50
    connection = open_stream(bounded.url, {"prompt": "a b c d " * 6, "max_tokens": 200, "stream": True})
    assert eventually(lambda: bounded.thread.num_live == 1)
    for _ in range(num_steps):
        steps.release()
    assert eventually(lambda: steps._value == 0)
    before = value_of(bounded, "vllm:iteration_tokens_total_count")
    connection.close()
    assert eventually(lambda: bounded.thread._commands.qsize() == 1)
    steps.release()  # the step that was under way; the next never comes
    assert eventually(lambda: not engine.has_unfinished)
    assert engine.block_manager.num_free_blocks == engine.config.num_blocks
    assert value_of(bounded, "vllm:iteration_tokens_total_count") <= before + num_steps + 1


def test_over_tls(tmp_path: Path) -> None:
    """With a key of the environment, by OpenAI's client, which trusts our certificate."""
    files = Path(__file__).parents[2] / "fixtures" / "tls"
    flags = ["--ssl-certfile", str(files / "certificate.pem"), "--ssl-keyfile", str(files / "key.pem")]
    trusted = ssl.create_default_context(cafile=str(files / "certificate.pem"))
    with (
        start_command(*flags, PAGELLM_API_KEYS="secret") as process,
        openai.DefaultHttpxClient(verify=trusted) as http,
    ):
        assert process.url.startswith("https://")
        assert eventually(lambda: http.get(f"{process.url}/health").status_code == 200, 60)
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="secret", http_client=http)
        assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").models.list()
