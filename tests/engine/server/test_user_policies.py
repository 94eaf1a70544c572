"""A server whose policies its operator wrote: they see what requests say; who is not let in is told so."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM
from tests.engine.server.conftest import eventually, serving, settings, wait_until_ready
from tests.engine.server.test_clients import ask, request
from tests.engine.server.test_lifetime import open_stream, standing_still, value_of

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
POLICIES = """
from pagellm import AdmissionPolicy, SchedulingPolicy

class GoldFirst(SchedulingPolicy):
    def order(self, sequence, stats):
        asked = sequence.sampling_params
        deadline = 1000 if asked.deadline_s is None else asked.deadline_s
        return (asked.tenant != "gold", deadline, asked.priority)

class NoLongPrompts(AdmissionPolicy):
    def admit(self, sequence, stats):
        return "shed" if sequence.num_prompt_tokens > 20 else "accept"
"""


@pytest.fixture(scope="module")
def ruled(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with an order and an admission of its operator's own, that computes one request at a time."""
    file = tmp_path_factory.mktemp("policies") / "own_policies.py"
    file.write_text(POLICIES)
    own = {"policy": f"{file}:GoldFirst", "admission": f"{file}:NoLongPrompts", "max_num_seqs": 1}
    with serving(partial(LLM, thinker, show_progress=False, **settings() | own), "tiny") as service:
        wait_until_ready(service)
        yield service


@pytest.mark.parametrize("stream", [False, True])
def test_who_is_not_let_in_gets_503_and_others_are_served(ruled: Any, stream: bool) -> None:
    long, short = "hello there " * 8, "hello"
    for path, body in [
        ("/v1/completions", {"prompt": long}),
        ("/v1/completions", {"prompt": long, "n": 3}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/v1/responses", {"input": long}),
    ]:
        status, headers, text = request(ruled, path, body | {"stream": stream})
        assert (status, headers["retry-after"]) == (503, "1"), text
        assert "admission policy" in text
    body = {"prompt": short, "max_tokens": 2, "stream": stream}
    assert request(ruled, "/v1/completions", body)[0] == 200
    assert value_of(ruled, "vllm:request_success_total", '"shed"') >= 2
    assert eventually(lambda: not ruled.llm.engine.has_unfinished)
    assert ruled.llm.engine.block_manager.num_free_blocks == ruled.llm.engine.config.num_blocks
    assert ruled.thread.num_queued == 0


def test_one_of_several_prompts_that_is_not_let_in_ends_all(ruled: Any) -> None:
    status, _, text = request(ruled, "/v1/completions", {"prompt": ["hello", "x" * 60], "max_tokens": 100})
    assert status == 503, text
    assert eventually(lambda: not ruled.llm.engine.has_unfinished)


def test_an_order_sees_tenants_deadlines_and_priorities_of_body_and_headers(
    ruled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({}, {}),
        ({"priority": -1}, {}),
        ({}, {"x-deadline-s": "100"}),
        ({"deadline_s": 50}, {}),
        ({"tenant": "gold"}, {}),
        ({"priority": -2}, {"x-tenant": "gold"}),
    ]
    ends: list[str] = []
    step = ruled.llm.engine.step

    def noted() -> Any:
        outputs = step()
        ends.extend(output.request_id for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(ruled.llm.engine, "step", noted)
    with ThreadPoolExecutor(8) as pool, standing_still(ruled):
        for number, (fields, headers) in enumerate(asked, 1):
            body = {"prompt": "hello", "max_tokens": 2, "ignore_eos": True, **fields}
            pool.submit(ask, ruled, "/v1/completions", body, **headers)
            assert eventually(partial(_are_queued, ruled, number))
    numbers = [int(name.removeprefix("http-")) for name in ends]
    assert [number - min(numbers) for number in numbers] == [5, 4, 3, 2, 1, 0]


def _are_queued(server: Any, number: int) -> bool:
    return server.thread.num_queued == number


def test_a_stream_that_is_let_in_is_whole(ruled: Any) -> None:
    connection = open_stream(
        ruled.url, {"prompt": "hello", "max_tokens": 5, "stream": True, "temperature": 0}
    )
    received = b""
    while b"[DONE]" not in received:
        received += connection.recv(1 << 16)
    connection.close()
    [choice] = ask(ruled, "/v1/completions", {"prompt": "hello", "max_tokens": 5, "temperature": 0})[
        "choices"
    ]
    assert received.startswith(b"HTTP/1.1 200")
    assert choice["finish_reason"] == "length"
