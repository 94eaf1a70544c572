"""vLLM's router before two servers, and the simulator's: on one trace they choose alike.

Where `kv_aware` sends a request is held against `prefix_aware`, asked at that moment about the same two
servers. They agree wherever one server has more of the prompt than the other. Where both have as much, and
nobody is served, any choice is as good: the simulator takes the first, vLLM's router whichever it likes.
"""

import random
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.sim.router import CheckedRouter
from tests.conftest import model_path
from tests.engine.server.conftest import serving, wait_until_ready
from tests.engine.server.test_clients import ask
from tests.engine.server.test_suites import tool

pytest.importorskip("zmq", reason="the server's tests need the extra serve")

LABELS = {"model_name": "tiny", "engine": "0"}
SETTINGS = {"num_blocks": 256, "block_size": 8, "max_num_seqs": 8}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def routed(request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[Any]]]:
    """The router of the policy that is the parameter, and the two servers behind it."""
    from pagellm.engine.server.kv_events import KvEvents

    router = tool("vllm-router")
    with ExitStack() as stack:
        services, sources = [], []
        for _ in range(2):
            events = KvEvents("tcp://127.0.0.1:0", "tcp://127.0.0.1:0")
            stack.callback(events.close)
            path = model_path("llama_tiny")
            load = events.of(lambda path=path: LLM(path, show_progress=False, **SETTINGS))
            service = stack.enter_context(serving(load, "tiny"))
            service.kv_event_sources = events.sources
            wait_until_ready(service)
            services.append(service)
            sources += ["--kv-event-source", f"{service.url}={events.sources['0']['endpoint']}"]
            sources += ["--kv-event-replay-source", f"{service.url}={events.sources['0']['replay_endpoint']}"]
        port, metrics_port = free_port(), free_port()
        if request.param == "kv_aware":
            sources += ["--kv-event-model", "tiny", "--kv-event-block-size", "8"]
        else:
            sources = []
        ports = ["--port", str(port), "--prometheus-port", str(metrics_port)]
        process = subprocess.Popen(
            [
                router, "--policy", request.param, *ports, *sources, "--worker-urls",
                *(service.url for service in services),
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.terminate)
        front = SimpleNamespace(url=f"http://127.0.0.1:{port}")
        wait_until_ready(front)
        time.sleep(1)  # until it has subscribed
        yield front, services


def trace() -> list[list[int]]:
    """Prompts of eight conversations of which each turn goes on with the one before, mixed."""
    rng = random.Random(5)
    talks = [[rng.randrange(1, 250) for _ in range(48)] for _ in range(8)]
    prompts = []
    for _ in range(40):
        talk = rng.choice(talks)
        prompts.append(list(talk))
        talk += [rng.randrange(1, 250) for _ in range(12)]
        del talk[150:]
    return prompts


def num_prompts(service: Any) -> float:
    """How many requests a server has been sent."""
    return float(service.metrics.registry.get_sample_value("vllm:request_params_n_count", LABELS))


def send(front: Any, services: list[Any], prompt: list[int]) -> int:
    """Asks the router; returns which server answered."""
    before = [num_prompts(service) for service in services]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    ask(front, "/v1/completions", body, **{"content-type": "application/json"})
    [chosen] = [i for i, service in enumerate(services) if num_prompts(service) > before[i]]
    return chosen


@pytest.mark.parametrize("routed", ["kv_aware"], indirect=True)
def test_kv_aware_chooses_as_the_simulators_prefix_aware_does(routed: Any) -> None:
    front, services = routed
    replicas: Any = [
        SimpleNamespace(number=i, scheduler=service.llm.engine.scheduler, num_unfinished=0)
        for i, service in enumerate(services)
    ]
    simulated = CheckedRouter("prefix_aware")
    simulated.show(replicas)
    num_ties = 0
    for number, prompt in enumerate(trace()):
        sequence = Sequence(10**6 + number, prompt, SamplingParams(max_tokens=1))
        known = [len(service.llm.engine.block_manager.cached_prefix(sequence)) for service in services]
        expected = simulated.choose(sequence)
        chosen = send(front, services, prompt)
        if known[0] == known[1]:
            num_ties += 1
        else:
            assert chosen == expected, f"request {number}: found {known} blocks"
        time.sleep(0.25)  # until the router has heard of it
    assert num_ties <= 8, "each conversation is new once"


@pytest.mark.parametrize("routed", ["cache_aware"], indirect=True)
def test_cache_aware_keeps_a_conversation_where_it_was(routed: Any) -> None:
    front, services = routed
    chosen = {send(front, services, [7 + turn // 9] * 100 + [turn]) for turn in range(9)}
    assert len(chosen) == 1
