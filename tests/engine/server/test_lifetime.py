"""From a server's start to its end: readiness, clients that go away or read slowly, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, CheckpointError, SamplingParams
from tests.conftest import model_path
from tests.engine.server.conftest import eventually, serving, wait_until_ready
from tests.engine.server.test_clients import ask, metrics, refusal, request

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
ROOT = Path(__file__).parents[3]
LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 240, "ignore_eos": True, "stream": True}


def open_stream(url: str, body: Any, key: str = "") -> socket.socket:
    """A connection that has asked for something and has read nothing."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = ["POST /v1/completions HTTP/1.1", "Host: x", f"Content-Length: {len(data)}"]
    head += [f"Authorization: Bearer {key}", "", ""]
    connection.sendall("\r\n".join(head).encode() + data)
    return connection


def value_of(server: Any, *words: str) -> float:
    """The sum of the metrics whose lines have these words."""
    lines = [line for line in metrics(server) if line[0] != "#" and all(word in line for word in words)]
    return sum(float(line.split()[-1]) for line in lines)


def aborted(server: Any) -> float:
    return value_of(server, "vllm:request_success_total", '"abort"')


@contextmanager
def standing_still(server: Any) -> Iterator[None]:
    """Lets the engine's thread take no step; what is asked of it waits."""
    may_go_on, stands = threading.Event(), threading.Event()

    def stand() -> None:
        stands.set()
        may_go_on.wait(60)

    server.thread._commands.put(stand)
    assert stands.wait(60)
    try:
        yield
    finally:
        may_go_on.set()


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_goes_away_before_anything_was_computed_is_given_up(server: Any, is_stream: bool) -> None:
    answered = "http_requests_total", "/v1/completions"
    tokens, before = value_of(server, "vllm:generation_tokens_total"), value_of(server, *answered)
    with standing_still(server):
        for _ in range(3):
            open_stream(server.url, LONG | {"stream": is_stream}).close()
    assert eventually(lambda: value_of(server, *answered) == before + 3)
    engine = server.llm.engine
    assert eventually(lambda: not engine.has_unfinished)
    assert engine.block_manager.num_free_blocks == engine.config.num_blocks
    assert value_of(server, "vllm:generation_tokens_total") < tokens + 3 * LONG["max_tokens"]


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_goes_away_in_the_midst_frees_what_was_held(
    server: Any, is_stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before, engine = aborted(server), server.llm.engine
    connection = open_stream(server.url, LONG | {"stream": is_stream, "n": 4})
    assert eventually(lambda: engine.scheduler.running)
    with standing_still(server):
        assert engine.has_unfinished
        connection.close()
        assert eventually(lambda: "the client went away" in capsys.readouterr().err)
    assert eventually(lambda: not engine.has_unfinished)
    assert eventually(lambda: aborted(server) == before + 4)
    assert engine.block_manager.num_free_blocks == engine.config.num_blocks


def test_who_reads_slowly_holds_up_nobody(llm: LLM, server: Any) -> None:
    slow = [open_stream(server.url, LONG | {"n": 4, "seed": 1, "logprobs": 20}) for _ in range(2)]
    body = {"prompt": "hello", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    [expected] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    assert ask(server, "/v1/completions", body)["choices"][0]["text"] == expected.text
    assert eventually(lambda: not server.llm.engine.has_unfinished)  # nor does it wait for them
    for connection in slow:
        received = b""
        while b"[DONE]" not in received:
            part = connection.recv(1 << 20)
            assert part
            received += part
        connection.close()


def test_before_the_model_is_loaded_and_after_it_failed_the_answer_is_503() -> None:
    may_load = threading.Event()

    def load() -> LLM:
        may_load.wait(60)
        raise CheckpointError("no such model")

    with serving(load) as service:
        assert eventually(lambda: request(service, "/version")[0] == 200)
        for path, body in [("/health", None), ("/v1/models", None), ("/v1/completions", {"prompt": "x"})]:
            status, headers, text = request(service, path, body)
            assert (status, headers["retry-after"]) == (503, "1"), text
        may_load.set()
        assert eventually(lambda: service.failure() is not None)
        assert "no such model" in refusal(service, "/v1/completions", {"prompt": "x"}, 503)["message"]
        assert str(service.failure()) == "no such model"


@contextmanager
def start_command(*more: str, stdout: int | None = None, **environment: str) -> Iterator[Any]:
    """`pagellm serve` as a process; its `url` is where it listens."""
    flags = ["--model", str(model_path("llama_tiny")), "--port", "0", "--num-blocks", "64"]
    process: Any = subprocess.Popen(
        [sys.executable, "-m", "pagellm", "serve", *flags, "--served-model-name", "tiny", *more],
        cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip
    try:
        process.url = process.stderr.readline().split()[-1]
        process.stderr.readline()
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def command() -> Iterator[Any]:
    """`pagellm serve` as a process that is ready."""
    with start_command() as process:
        wait_until_ready(process)
        yield process


def test_the_first_signal_lets_streams_end_whole(command: Any) -> None:
    data = json.dumps(LONG).encode()
    with urllib.request.urlopen(f"{command.url}/v1/completions", data) as stream:
        received = stream.readline()
        command.send_signal(signal.SIGTERM)
        received += stream.read()
    events = [line for line in received.decode().splitlines() if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert command.wait(60) == 0


def test_a_second_signal_ends_it(command: Any) -> None:
    connection = open_stream(command.url, LONG | {"n": 64})
    assert connection.recv(1)
    command.send_signal(signal.SIGINT)
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 0
    connection.close()


def test_the_command_says_as_json_where_it_serves() -> None:
    with start_command("--json", stdout=subprocess.PIPE) as process:
        served = json.loads(process.stdout.readline())
        assert served == {"url": process.url, "models": ["tiny"], "max_model_len": served["max_model_len"]}
        assert request(process, "/health")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == ""


def test_the_command_says_what_is_wrong() -> None:
    for flags, said in [
        (["--model", "no/such"], "no/such"),
        (["--port", "70000"], "port"),
        (["--shutdown-timeout", "-1"], "shutdown_timeout"),
    ]:
        done = subprocess.run(
            [sys.executable, "-m", "pagellm", "serve", "--port", "0", *flags],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 2
        assert said in done.stderr.splitlines()[-1]


def test_the_package_does_without_the_server() -> None:
    program = (
        "import sys, pagellm, pagellm.engine.llm, pagellm.engine.commands.cli;"
        "print({'fastapi', 'uvicorn', 'pydantic', 'prometheus_client', 'asyncio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("words", [["serve"], ["batch", "in.jsonl", "out.jsonl"]])
def test_without_the_extra_one_line_says_what_to_install(words: list[str]) -> None:
    program = (
        "import sys; sys.modules['pydantic'] = None; from pagellm.__main__ import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(f"pagellm: {words[0]}: needs pip install 'pagellm[serve]' (import of ")
    assert run.stderr.count("\n") == 1
