"""A crowd that comes and goes for as long as you like: random requests, many of them given up midway.

    python -m tests.engine.server.soak --minutes 60

Every answer that came whole is held against the first one to the same request, bit for bit. At the end nobody
is left, blocks are conserved, the gauges are at 0, and the process is no larger than it was after its first
tenth.
"""

import argparse
import http.client
import json
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MODEL_SETTINGS = {"num_blocks": 160, "block_size": 8, "max_num_seqs": 24}
_GROWTH_BYTES = 48 << 20  # of a process whose allocator keeps some of what it had
_CHAT = [{"role": "user", "content": "hello there"}]
_NAME = {"type": "object", "properties": {"name": {"enum": ["a", "b"]}}, "required": ["name"]}


def requests(number: int = 40) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies, each of which has one right answer."""
    rng = random.Random(1)
    made: list[tuple[str, dict[str, Any]]] = []
    for seed in range(number):
        body: dict[str, Any] = {"seed": seed, "max_tokens": rng.randint(1, 60), "temperature": 1.0}
        kind = rng.randrange(5)
        if kind == 0:
            made.append(("/v1/chat/completions", {**body, "messages": _CHAT}))
            continue
        words = " ".join(rng.choices(["hello", "world", "the quick", "brown fox"], k=rng.randint(1, 12)))
        if kind == 1:
            body |= {"n": rng.randint(2, 3)}
        elif kind == 2:
            body |= {"structured_outputs": {"json": _NAME}}
        elif kind == 3:
            body |= {"logprobs": 2, "echo": True}
        made.append(("/v1/completions", {**body, "prompt": words}))
    return made


@dataclass
class Crowd:
    """Clients in threads of their own that ask until they are told to stop."""

    url: str
    seed: int
    stop: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=requests)
    right: dict[int, Any] = field(default_factory=dict)
    num_whole: int = 0
    num_given_up: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, clients: int) -> list[threading.Thread]:
        """Starts the clients."""
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        return threads

    def _client(self, number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        while not self.stop.is_set():
            try:
                self._ask(rng)
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                return

    def _ask(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.asked))
        path, body = self.asked[which]
        is_stream, gives_up = rng.random() < 0.5, rng.random() < 0.4
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        try:
            connection.request("POST", path, json.dumps({**body, "stream": is_stream}))
            if gives_up and not is_stream:
                time.sleep(rng.random() * 0.02)
                self.num_given_up += 1
                return
            answer = connection.getresponse()
            if answer.status != 200:
                raise AssertionError(f"{answer.status}: {answer.read(500)!r}")
            if gives_up:
                answer.read(rng.randint(1, 400))
                self.num_given_up += 1
                return
            said = _texts(answer.read().decode(), is_stream)
        finally:
            connection.close()
        with self.lock:
            self.num_whole += 1
            if self.right.setdefault(which, said) != said:
                raise AssertionError(f"{path} {body}: found {said!r}, expected {self.right[which]!r}")


def _texts(text: str, is_stream: bool) -> list[str]:
    """What each choice says."""
    if not is_stream:
        chunks = [json.loads(text)]
    else:
        lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]", text[-500:]
        chunks = [json.loads(line) for line in lines[:-1]]
    texts: dict[int, str] = {}
    for chunk in chunks:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            message = choice.get("message") or choice.get("delta") or choice
            said = (
                (message.get("content") or "")
                + (message.get("reasoning") or "")
                + (message.get("text") or "")
            )
            texts[choice["index"]] = texts.get(choice["index"], "") + said
    return [texts[index] for index in sorted(texts)]


def gauges(text: str) -> dict[str, float]:
    """The gauges that are 0 when nobody is served."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    found = {}
    for line in text.splitlines():
        name = line.partition("{")[0]
        if name in names:
            found[name] = float(line.rpartition(" ")[2])
    assert sorted(found) == sorted(names)
    return found


def resident_bytes() -> int:
    """Memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def soak(service: Any, seconds: float, clients: int, seed: int) -> Crowd:
    """Lets a crowd ask a server of this process, and asserts what must hold of it then."""
    from tests.engine.server.conftest import eventually
    from tests.engine.server.test_clients import request

    crowd = Crowd(service.url, seed)
    threads = crowd.run(clients)
    time.sleep(seconds / 10)
    early_bytes = resident_bytes()
    end_s = time.monotonic() + seconds * 9 / 10
    while time.monotonic() < end_s and not crowd.errors:
        time.sleep(min(5.0, max(0.0, end_s - time.monotonic())))
    crowd.stop.set()
    for thread in threads:
        thread.join(60)
    assert crowd.errors == []
    engine = service.llm.engine
    assert eventually(lambda: not engine.has_unfinished and service.num_serving == 0)
    assert service.thread.num_live == service.thread.num_queued == service.thread.num_queued_tokens == 0
    engine.scheduler.check()
    assert set(gauges(request(service, "/metrics")[2]).values()) == {0.0}
    grown = resident_bytes() - early_bytes
    assert grown < _GROWTH_BYTES, f"{grown} bytes more than after the first tenth"
    return crowd


def main() -> int:
    """Runs it on the small model of the tests."""
    from pagellm.engine import LLM
    from tests.conftest import model_path
    from tests.engine.server.conftest import serving, wait_until_ready

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = model_path("llama_tiny")
    with serving(lambda: LLM(path, show_progress=False, **MODEL_SETTINGS), "tiny") as service:
        wait_until_ready(service)
        sys.stderr = None  # the log of each request
        before = resident_bytes()
        crowd = soak(service, options.minutes * 60, options.clients, options.seed)
        print(
            f"{crowd.num_whole} whole, {crowd.num_given_up} given up; "
            f"{before / 1e6:.0f} MB at first, {resident_bytes() / 1e6:.0f} MB at the end"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
