"""A server from its start to its end: the socket, uvicorn, and what signals do."""

import asyncio
import json
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from pagellm.engine.errors import ConfigError
from pagellm.engine.llm import LLM
from pagellm.engine.progress import say
from pagellm.engine.server.access_log import AccessLog, batched_tracer
from pagellm.engine.server.app import make_app
from pagellm.engine.server.kv_events import KvEvents
from pagellm.engine.server.limits import Limits
from pagellm.engine.server.service import Service

_BACKLOG = 2048
_IDLE_S = 75  # that a connection without a request is kept: longer than clients keep one
_LAST_WORDS_S = 2.0  # for streams to end after their requests were given up
# The event loop takes the interpreter's lock several times for one answer, and waits so long each time while
# a worker cuts a long text into tokens.
_SWITCH_INTERVAL_S = 0.0005


class _Server(uvicorn.Server):
    """uvicorn, which the first signal lets drain: no new connections, and what goes on is finished.

    What still goes on after `drain_s` is given up, as it is at the second signal; a stream says so.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_s = drain_s
        self._num_signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: "list[socket.socket] | None" = None) -> None:
        """Serves until a signal."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal."""
        self._num_signals += 1
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        assert self._loop is not None
        if self._num_signals == 1:
            self._service.end_feed()
            say("no new requests; those under way are finished. Once more to give them up")
            self._loop.call_later(self._drain_s, self._give_up)
        else:
            self._give_up()

    def _give_up(self) -> None:
        assert self._loop is not None
        self._service.close()
        self._loop.call_later(_LAST_WORDS_S, self._force)

    def _force(self) -> None:
        self.force_exit = True


def run_server(
    load: Callable[[], LLM],
    names: Sequence[str],
    host: str,
    port: int,
    drain_s: float,
    limits: Limits,
    keys: Sequence[str] = (),
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    allowed_origins: Sequence[str] = (),
    events: KvEvents | None = None,
    log_format: str = "text",
    otlp_traces_endpoint: str | None = None,
    as_json: bool = False,
) -> None:
    """Serves until it is told to end.

    load: makes the LLM, after the server has begun to answer. names: what clients may call the model.
    drain_s: seconds that requests under way have after the first signal. keys: one of them must be in each
    request, where there are any. allowed_origins: whose pages browsers let ask. events: publishes what
    becomes of the prefix cache. log_format: "text" or "json". otlp_traces_endpoint: where spans are sent.
    as_json: say on standard output, as JSON, that it serves.
    Raises `PagellmError` if the model cannot be loaded or the address cannot be had.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    tracer = None if otlp_traces_endpoint is None else batched_tracer(otlp_traces_endpoint)
    log = AccessLog(log_format == "json", tracer)
    listener = _listen(host, port)
    server: _Server

    def tell() -> None:
        if service.load_error is not None:
            server.should_exit = True
            return
        say(f"serving {names[0]}")
        if as_json:
            served = {
                "url": url,
                "models": service.names,
                "max_model_len": service.llm.engine.config.max_model_len,
            }
            print(json.dumps(served), flush=True)

    service = Service(load if events is None else events.of(load), names, tell, limits)
    if events is not None:
        service.kv_event_sources = events.sources
    config = uvicorn.Config(
        make_app(service, keys, allowed_origins, log), log_config=None, access_log=False, lifespan="on",
        server_header=False, timeout_keep_alive=_IDLE_S,
        ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile,
    )  # fmt: skip
    server = _Server(config, service, drain_s)
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if ssl_certfile else "http"
    url = f"{scheme}://{shown}:{listener.getsockname()[1]}"
    say(f"listening on {url}")
    with listener:
        server.run(sockets=[listener])
    service.close()
    service.join(_LAST_WORDS_S)
    if events is not None:
        events.close()
    if tracer is not None:
        tracer.close()
    failure = service.failure()
    if failure is not None:
        raise failure


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"host, port: found {host}:{port}, expected an address to listen at: {reason}"
        ) from None
