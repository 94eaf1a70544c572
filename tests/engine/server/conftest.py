"""A live server on a small random model, and OpenAI's own client to ask it."""

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM
from tests.conftest import model_path

THOUGHTS = "<think>...</think>"


@contextmanager
def serving(
    load: Callable[[], LLM], *names: str, keys: Any = (), limits: Any = None, **settings: Any
) -> Iterator[Any]:
    """A server in a thread of this process; yields its service, whose `url` is where it listens."""
    import uvicorn

    from pagellm.engine.server.app import make_app
    from pagellm.engine.server.service import Service

    service: Any = Service(load, names or ("tiny",), limits=limits)
    server = uvicorn.Server(
        uvicorn.Config(make_app(service, keys, **settings), log_config=None, lifespan="on")
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield service
        finally:
            server.should_exit = True
            thread.join(30)
            service.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a chat template that opens a thought before each answer."""
    directory = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(model_path("llama_tiny"), directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    opening = "{% if enable_thinking is not false %}<think>\n{% endif %}{% endif %}"
    config["chat_template"] = config["chat_template"].removesuffix("{% endif %}") + opening
    path.write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def caller(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template that knows of tools; it says little, for the context is short."""
    directory = tmp_path_factory.mktemp("caller") / "model"
    shutil.copytree(thinker, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = '{% if tools %}<tool_call>{"name"}{% endif %}' + config["chat_template"]
    path.write_text(json.dumps(config))
    return directory


def settings() -> dict[str, Any]:
    """So few blocks that a crowd has to make way for one another."""
    return {"num_blocks": 48, "block_size": 8, "max_num_seqs": 32, "reasoning_markers": THOUGHTS}


@pytest.fixture(scope="session")
def llm(thinker: Path) -> Iterator[LLM]:
    """The model without a server, to compare with."""
    with LLM(thinker, show_progress=False, **settings()) as llm:
        yield llm


@pytest.fixture(scope="session")
def server(thinker: Path) -> Iterator[Any]:
    """A server that is ready."""
    with serving(lambda: LLM(thinker, show_progress=False, **settings()), "tiny", "other-name") as service:
        wait_until_ready(service)
        yield service


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        service = request.getfixturevalue("server")
        engine = service.llm.engine
        assert eventually(lambda: not engine.has_unfinished and service.num_serving == 0)
        assert service.thread.num_live == 0
        engine.scheduler.check()


def wait_until_ready(service: Any) -> None:
    """Waits until /health says 200."""
    import urllib.error
    import urllib.request

    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"{service.url}/health"):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    assert eventually(is_ready, 60)


def eventually(condition: Callable[[], bool], within_s: float = 30) -> bool:
    """Whether something becomes true."""
    waited = threading.Event()
    for _ in range(int(within_s * 50)):
        if condition():
            return True
        waited.wait(0.02)
    return condition()


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    """OpenAI's client."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client
