"""What the prefix cache knows, told to routers as it changes: vLLM's KV events over ZMQ.

A batch of events is three frames, the topic, a number that grows by one, and MessagePack: `[time, events,
0]`, each event a map under vLLM's names (its `distributed/kv_events.py`, version 0.33). Who asks the replay
socket for a number gets the batches from there on, as far back as they are kept. The engine's thread only
takes notes; a thread of its own packs and sends them.
"""

import errno
import re
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import msgpack
import zmq

from pagellm.engine.errors import ConfigError
from pagellm.engine.llm import LLM
from pagellm.engine.llm_engine import LLMEngine
from pagellm.engine.progress import say
from pagellm.engine.scheduling.step_loop import StepEnd, StepListener

# vLLM's defaults.
_KEPT_BATCHES = 10_000  # for the replay socket
_MOST_UNSENT = 100_000  # batches that wait for one subscriber before it loses some
_LONGEST_WAIT_S = 0.1  # of a request for a replay
_LAST_SENDS_MS = 1000
# The names of the tiers, by which routers tell the first from slower ones; they say nothing of the hardware.
_MEDIA = ("GPU", "CPU")
_ENDPOINT = re.compile(r"tcp://[^\s/]+:(?:([0-9]{1,5})|\*)|ipc://.+")
_EXPECTED = "expected an address such as tcp://*:5557 or ipc://kv-events"
_END = (-1).to_bytes(8, "big", signed=True)


class _Stored(NamedTuple):
    """Blocks that follow each other and became known in a tier. parent: the hash of the block before.

    Of the second tier no more is told than their hashes, as by vLLM: the first has told the rest.
    """

    parent: int | None
    hashes: list[int]
    tokens: list[bytes]
    salt: str
    tier: int


class _Removed(NamedTuple):
    """Blocks that were forgotten in a tier."""

    hashes: list[int]
    tier: int


_CLEARED = {"type": "AllBlocksCleared"}
_Note = _Stored | _Removed | None  # None: all were forgotten


class KvEvents(StepListener):
    """Publishes what the prefix cache of one engine knows, from before its first step on.

    endpoint: of the PUB socket; replay_endpoint: of the ROUTER socket, if there is to be one. Both are
    bound; an endpoint that is another machine's is connected to. topic: the first frame of each batch. Raises
    `ConfigError` for an endpoint that cannot be had.
    """

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: str = "") -> None:
        self._topic = topic.encode()
        self._context = zmq.Context()
        self._notes: list[_Note] = []
        self._batches: SimpleQueue[list[_Note] | None] = SimpleQueue()
        # Where nobody can ask for them nothing is kept: so many batches of long prompts are large.
        num_kept = 0 if replay_endpoint is None else _KEPT_BATCHES
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=num_kept)
        self._block_size = 0
        try:
            self._publisher, endpoint = self._socket(zmq.PUB, "kv_events", endpoint, _MOST_UNSENT)
            self._replay: Any = None
            if replay_endpoint is not None:
                # A whole replay waits for a slow reader, though it tells only now and then how far it is.
                self._replay, replay_endpoint = self._socket(
                    zmq.ROUTER, "kv_events_replay", replay_endpoint, 2 * (_KEPT_BATCHES + 1)
                )
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.sources = {
            "0": {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": endpoint,
                "replay_endpoint": replay_endpoint,
                "buffer_steps": num_kept,
                "hwm": _MOST_UNSENT,
                "max_queue_size": _MOST_UNSENT,
                "topic": topic,
            }
        }
        self._thread = threading.Thread(target=self._run, name="pagellm-kv-events", daemon=True)
        self._thread.start()

    def of(self, load: Callable[[], LLM]) -> Callable[[], LLM]:
        """What loads an LLM whose events are published."""

        def load_and_attach() -> LLM:
            llm = load()
            self.attach(llm.engine)
            return llm

        return load_and_attach

    def attach(self, engine: LLMEngine) -> None:
        """Publishes what becomes of this engine's cache."""
        self._block_size = engine.config.block_size
        engine.block_manager.observe_cache(self)
        engine.loop.listen(self)

    def close(self) -> None:
        """Sends what there is and ends the thread."""
        self._batches.put(None)
        self._thread.join()

    def stored(self, block_hash: int, parent_hash: int | None, tokens: bytes, salt: str, tier: int) -> None:
        """A block is known."""
        last = self._notes[-1] if self._notes else None
        if tier:
            parent_hash, tokens, salt = None, b"", ""
        if isinstance(last, _Stored) and last.tier == 0 and last.hashes[-1] == parent_hash:
            last.hashes.append(block_hash)
            last.tokens.append(tokens)
        else:
            self._notes.append(_Stored(parent_hash, [block_hash], [tokens], salt, tier))

    def removed(self, block_hash: int, tier: int) -> None:
        """A block is forgotten."""
        last = self._notes[-1] if self._notes else None
        if isinstance(last, _Removed) and last.tier == tier:
            last.hashes.append(block_hash)
        else:
            self._notes.append(_Removed([block_hash], tier))

    def cleared(self) -> None:
        """All blocks are forgotten; that is told at once, for it may be long until the next step."""
        self._notes.append(None)
        self._flush()

    def committed(self, end: StepEnd) -> None:
        """A step has ended."""
        if self._notes:
            self._flush()

    def _flush(self) -> None:
        self._batches.put(self._notes)
        self._notes = []

    def _socket(self, kind: int, name: str, endpoint: str, most_unsent: int) -> tuple[Any, str]:
        """A socket, and the endpoint with its port."""
        match = _ENDPOINT.fullmatch(endpoint)
        if match is None or int(match[1] or 0) > 65535:
            raise ConfigError(f"{name}: found {endpoint[:200]!r}, {_EXPECTED}")
        socket = self._context.socket(kind)
        socket.set_hwm(most_unsent)
        socket.linger = _LAST_SENDS_MS
        socket.ipv6 = True
        try:
            try:
                socket.bind(endpoint)
            except zmq.ZMQError as error:
                if error.errno not in (errno.ENODEV, errno.EADDRNOTAVAIL):
                    raise
                socket.connect(endpoint)
                return socket, endpoint
        except (zmq.ZMQError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{name}: found {endpoint[:200]!r}, {_EXPECTED}: {reason}") from None
        if endpoint.startswith("tcp://") and endpoint.rpartition(":")[2] in ("0", "*"):
            endpoint = f"{endpoint.rpartition(':')[0]}:{socket.last_endpoint.decode().rpartition(':')[2]}"
        return socket, endpoint

    def _run(self) -> None:
        number = 0
        while True:
            if self._replay is not None:
                self._answer_replays()
            try:
                notes = self._batches.get(timeout=None if self._replay is None else _LONGEST_WAIT_S)
            except Empty:
                continue
            if notes is None:
                break
            said = number.to_bytes(8, "big")
            payload = msgpack.packb([time.time(), [self._event(note) for note in notes], 0])
            self._publisher.send_multipart((self._topic, said, payload))
            self._kept.append((said, payload))
            number += 1
        self._context.destroy(linger=_LAST_SENDS_MS)

    def _event(self, note: _Note) -> dict[str, Any]:
        if note is None:
            return _CLEARED
        if isinstance(note, _Removed):
            medium = _MEDIA[note.tier]
            return {"type": "BlockRemoved", "block_hashes": note.hashes, "medium": medium, "group_idx": 0}
        token_ids = array("i")
        for tokens in note.tokens:
            token_ids.frombytes(tokens)
        keys: list[list[str] | None] = [None] * len(note.hashes)
        if note.salt:
            keys[0] = [note.salt]
        return {
            "type": "BlockStored",
            "block_hashes": note.hashes,
            "parent_block_hash": note.parent,
            "token_ids": token_ids.tolist(),
            "block_size": self._block_size,
            "lora_id": None,
            "medium": _MEDIA[note.tier],
            "lora_name": None,
            "extra_keys": keys,
            "group_idx": 0,
        }

    def _answer_replays(self) -> None:
        """Sends who has asked what is kept from a number on, then an end."""
        while self._replay.poll(0):
            frames = self._replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                say("kv_events_replay: found a request that is no number of 8 bytes; it is passed over")
                continue
            client, first = frames[0], frames[2]
            with suppress(zmq.ZMQError):  # the client has gone
                for number, payload in list(self._kept):
                    if number >= first:
                        self._replay.send_multipart((client, b"", self._topic, number, payload))
                self._replay.send_multipart((client, b"", b"", _END, b""))
