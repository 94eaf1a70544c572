"""KV events: who subscribes knows at every moment what the prefix cache knows, in vLLM's form."""

import json
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM
from pagellm.engine.errors import ConfigError
from pagellm.engine.scheduling.block_manager import chained_hash
from tests.engine.server.conftest import eventually, serving, settings, wait_until_ready
from tests.engine.server.test_clients import ask, request

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
msgpack = pytest.importorskip("msgpack", reason="the server's tests need the extra serve")
zmq = pytest.importorskip("zmq", reason="the server's tests need the extra serve")

END = (-1).to_bytes(8, "big", signed=True)
STORED = {
    "type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
    "extra_keys", "group_idx",
}  # fmt: skip


class Subscriber:
    """A router's view of one server, from its events alone."""

    def __init__(self, sources: Any) -> None:
        source = sources["0"]
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.subscribe(source["topic"])
        self.socket.connect(source["endpoint"].replace("*", "127.0.0.1"))
        self.replay_endpoint = source["replay_endpoint"].replace("*", "127.0.0.1")
        self.topic = source["topic"].encode()
        self.next = 0
        self.known: dict[int, list[int]] = {}
        self.offloaded: dict[int, list[int]] = {}
        self.events: list[Any] = []

    def close(self) -> None:
        self.context.destroy(linger=0)

    def read(self, wait_ms: int = 0) -> None:
        """Takes in what has come."""
        while self.socket.poll(wait_ms):
            topic, number, payload = self.socket.recv_multipart()
            assert topic == self.topic
            self.take(int.from_bytes(number, "big"), payload)

    def replay(self, first: int) -> list[tuple[int, bytes]]:
        """The batches from a number on, as a REQ client of vLLM's gets them."""
        asking = self.context.socket(zmq.DEALER)
        asking.connect(self.replay_endpoint)
        asking.send_multipart((b"", first.to_bytes(8, "big")))
        batches = []
        while True:
            assert asking.poll(10_000), "no end of the replay"
            empty, topic, number, payload = asking.recv_multipart()
            assert empty == b""
            if number == END:
                assert (topic, payload) == (b"", b"")
                return batches
            assert topic == self.topic
            batches.append((int.from_bytes(number, "big"), payload))

    def take(self, number: int, payload: bytes) -> None:
        if number < self.next:
            return
        assert number == self.next, "a batch is missing"
        self.next += 1
        time_s, events, rank = msgpack.unpackb(payload)
        assert (type(time_s), rank) == (float, 0)
        for event in events:
            self.events.append(event)
            if event["type"] == "AllBlocksCleared":
                assert set(event) == {"type"}
                self.known.clear()
            elif event["type"] == "BlockRemoved":
                assert set(event) == {"type", "block_hashes", "medium", "group_idx"}
                for one in event["block_hashes"]:
                    del (self.known if event["medium"] == "GPU" else self.offloaded)[one]
            elif event["medium"] == "CPU":
                assert set(event) == STORED
                assert (event["parent_block_hash"], event["token_ids"]) == (None, [])
                for one in event["block_hashes"]:
                    self.offloaded[one] = self.known[one]
            else:
                assert event["type"] == "BlockStored"
                assert set(event) == STORED
                size = event["block_size"]
                assert len(event["token_ids"]) == size * len(event["block_hashes"])
                parent = event["parent_block_hash"]
                for index, one in enumerate(event["block_hashes"]):
                    before = [] if parent is None else (self.known | self.offloaded)[parent]
                    assert one not in self.known
                    self.known[one] = [*before, *event["token_ids"][index * size : (index + 1) * size]]
                    parent = one


@pytest.fixture
def published(thinker: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server that publishes its events, and a subscriber from the beginning."""
    from pagellm.engine.server.kv_events import KvEvents

    events = KvEvents("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "kv@tiny")
    subscriber = Subscriber(events.sources)
    try:
        more = getattr(request, "param", {})
        load = events.of(lambda: LLM(thinker, show_progress=False, **settings(), **more))
        with serving(load, "tiny") as service:
            service.kv_event_sources = events.sources
            wait_until_ready(service)
            yield service, subscriber
    finally:
        subscriber.close()
        events.close()


def cached(service: Any) -> dict[int, list[int]]:
    """Each hash that the cache knows, with the tokens of its whole prefix."""
    cache = service.llm.engine.block_manager._cache
    known: dict[int, list[int]] = {}
    for block in cache:
        tokens, at = list[int](), block
        while at >= 0:
            tokens = [*memoryview(cache.tokens(at)).cast("i"), *tokens]
            at = cache.before(at)
        known[cache.hash_of(block)] = tokens
    return known


def agree(service: Any, subscriber: Subscriber) -> bool:
    subscriber.read(50)
    return subscriber.known | subscriber.offloaded == cached(service)


def test_a_subscriber_knows_what_the_cache_knows_also_after_evictions(published: Any) -> None:
    service, subscriber = published
    for round_ in range(12):
        ask(service, "/v1/completions", {"prompt": [round_ * 3 + 5] * 40, "max_tokens": 30, "seed": 1})
        assert eventually(lambda: agree(service, subscriber))
    kinds = {event["type"] for event in subscriber.events}
    assert kinds == {"BlockStored", "BlockRemoved"}, "it was to be so much that blocks are evicted"
    assert {event["medium"] for event in subscriber.events} == {"GPU"}
    assert request(service, "/reset_prefix_cache", {})[0] == 200
    assert eventually(lambda: agree(service, subscriber))
    assert subscriber.events[-1] == {"type": "AllBlocksCleared"}
    assert subscriber.known == {}


@pytest.mark.parametrize("published", [{"enable_hierarchical_cache": True}], indirect=True)
def test_a_subscriber_knows_in_which_tier_a_block_is(published: Any) -> None:
    service, subscriber = published
    for first in [*range(5, 41, 3), 5, 38]:
        ask(service, "/v1/completions", {"prompt": [first] * 40, "max_tokens": 30, "seed": 1})
        assert eventually(lambda: agree(service, subscriber))
    manager = service.llm.engine.block_manager
    assert manager.stats.host_hits > 0
    assert not subscriber.known.keys() & subscriber.offloaded.keys()
    sizes = len(subscriber.known), len(subscriber.offloaded)
    assert sizes == (manager.num_cached_blocks, manager.num_offloaded_blocks)
    lines = request(service, "/metrics")[2].splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if line.startswith("vllm:") and "created" not in line)
    labels = '{engine="0",model_name="tiny"'
    host, stats = manager.stats.host_hits, manager.stats
    for name, expected in (
        ("external_prefix_cache_hits_total" + labels, host),
        ("external_prefix_cache_queries_total" + labels, stats.queries - stats.hits + host),
        ("prefix_cache_hits_total" + labels, stats.hits - host),
        ("prompt_tokens_cached_by_source_total" + labels + ',source="host"', host),
        ("prompt_tokens_by_source_total" + labels + ',source="external_kv_transfer"', host),
        ("prompt_tokens_by_source_total" + labels + ',source="local_cache_hit"', stats.hits - host),
    ):
        assert float(counts[f"vllm:{name}}}"]) == expected, name
    assert request(service, "/reset_prefix_cache", {})[0] == 200
    assert eventually(lambda: agree(service, subscriber))
    assert subscriber.events[-1] == {"type": "AllBlocksCleared"}
    assert subscriber.offloaded == {}


def test_the_blocks_of_a_prompt_are_told_as_one_chain(published: Any) -> None:
    service, subscriber = published
    prompt = list(range(10, 42))
    ask(service, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
    assert eventually(lambda: agree(service, subscriber))
    [event] = subscriber.events
    hashes, previous = [], 0
    for start in range(0, 32, 8):
        previous = chained_hash(array("i", prompt[start : start + 8]).tobytes(), previous)
        hashes.append(previous)
    assert event["block_hashes"] == hashes
    assert event["parent_block_hash"] is None
    assert event["token_ids"] == prompt
    assert event["extra_keys"] == [None] * 4
    ask(service, "/v1/completions", {"prompt": prompt, "max_tokens": 1, "cache_salt": "mine"})
    assert eventually(lambda: agree(service, subscriber))
    assert subscriber.events[1]["extra_keys"] == [["mine"], None, None, None]


def test_what_was_missed_is_sent_again(published: Any) -> None:
    service, early = published
    for first in (20, 40, 60):
        ask(service, "/v1/completions", {"prompt": [first] * 20, "max_tokens": 2})
    assert eventually(lambda: agree(service, early))
    late = Subscriber(json.loads(request(service, "/kv_event_sources")[2]))
    try:
        for number, payload in late.replay(0):
            late.take(number, payload)
        assert late.known == early.known
        assert [number for number, _ in late.replay(early.next - 1)] == [early.next - 1]
        assert late.replay(early.next) == []
    finally:
        late.close()


def test_without_events_nobody_listens_and_no_source_is_told(server: Any) -> None:
    assert json.loads(request(server, "/kv_event_sources")[2]) == {}
    assert server.llm.engine.block_manager._cache.observer is None


def test_a_router_is_told_the_size_of_blocks_and_who_is_who(server: Any) -> None:
    told = json.loads(request(server, "/get_server_info")[2])
    assert (told["model_id"], told["kv_block_size"]) == ("tiny", 8)
    assert told["instance_id"] == server.instance_id


@pytest.mark.parametrize("endpoint", ["5557", "tcp://127.0.0.1:99999", "udp://x", "tcp://*"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    from pagellm.engine.server.kv_events import KvEvents

    with pytest.raises(ConfigError, match=r"^kv_events_replay: found '.*', expected an address such as tcp:"):
        KvEvents("tcp://127.0.0.1:0", endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://*:0", "ipc://kv-events"])
def test_an_address_is_of_the_network_or_of_this_machine(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pagellm.engine.server.kv_events import KvEvents

    monkeypatch.chdir(tmp_path)
    events = KvEvents(endpoint)
    try:
        [source] = events.sources.values()
        assert source["endpoint"].rstrip("0123456789") == endpoint.rstrip("0")
        assert (source["replay_endpoint"], source["buffer_steps"]) == (None, 0), "none is kept for nobody"
    finally:
        events.close()


def test_an_endpoint_in_use_is_refused() -> None:
    from pagellm.engine.server.kv_events import KvEvents

    first = KvEvents("tcp://127.0.0.1:0")
    try:
        with pytest.raises(ConfigError, match=r"kv_events: found .*in use"):
            KvEvents(first.sources["0"]["endpoint"])
    finally:
        first.close()


@pytest.mark.parametrize(
    "flags", [("--kv-events-topic", "t"), ("--kv-events", "tcp://*:0", "--no-prefix-caching")]
)
def test_flags_that_would_do_nothing_are_refused(flags: tuple[str, ...]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pagellm", "serve", "--port", "0", *flags], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "kv_events: found " in run.stderr
    assert run.stderr.count("\n") == 1
