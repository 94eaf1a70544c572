"""What a server takes from whom: keys, and how much may wait."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, ConfigError
from tests.engine.server.conftest import eventually, serving, settings, wait_until_ready
from tests.engine.server.test_clients import HELLO, request
from tests.engine.server.test_lifetime import open_stream, standing_still

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
openai = pytest.importorskip("openai", reason="the server's tests need the client openai")


@pytest.fixture(scope="module")
def guarded(thinker: Path) -> Iterator[Any]:
    """A server with two keys, where three prompts may wait, of 40 tokens together."""
    from pagellm.engine.server.service import Limits

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
