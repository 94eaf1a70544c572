"""HTTP below the endpoints: bodies within bounds, clients that go away, streams of events, the log."""

import asyncio
import hashlib
import hmac
import json
import re
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from uuid import uuid4

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pagellm.engine.server.access_log import AccessLog, Ended
from pagellm.engine.server.errors import ApiError, as_api_error, error_body

_BODY_PAUSE_S = 60.0  # that a client may take between two parts of a body
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OPEN = frozenset({"/", "/health", "/metrics", "/version"})
_NO_KEY = ApiError(
    401,
    "the key is missing or wrong, expected Authorization: Bearer KEY",
    headers={"www-authenticate": "Bearer"},
)
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_TRACE = b"traceparent", b"tracestate"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_Result = TypeVar("_Result")


class ClientGoneError(Exception):
    """Nobody is there any more to be answered."""


async def read_body(request: Request) -> bytes:
    """The body. Raises `ApiError` for one that is too large or too slow, before all of it has come."""
    parts: list[bytes] = []
    size, most = 0, request.state.max_body_bytes
    too_large = ApiError(413, f"body: found more than {most} bytes, expected as many at most")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    stream = aiter(request.stream())
    try:
        while True:
            async with asyncio.timeout(_BODY_PAUSE_S):
                part = await anext(stream, None)
            if part is None:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > most:
                raise too_large
    except TimeoutError:
        raise ApiError(408, f"body: nothing more came for {_BODY_PAUSE_S:g} s") from None
    except ClientDisconnect:
        raise ClientGoneError from None


def json_bytes(value: Any) -> bytes:
    """A value as JSON: one that a client sent may have integers of more bits than orjson writes."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value).encode()


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON as a response."""
    return Response(json_bytes(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """An error as a response."""
    return json_response(error_body(error), error.status, error.headers)


def named_event(name: str, value: Any) -> bytes:
    """One event of a stream whose events have names."""
    return b"event: " + name.encode() + b"\n" + event(value)


def event(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json_bytes(value) + b"\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """What the work gives. It is cancelled if the client goes away: then this raises `ClientGoneError`."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    raise ClientGoneError


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class KeepAlive:
    """Wakes a stream that has nothing to say, every so many seconds, so that nobody takes it for dead."""

    def __init__(self, wake: Callable[[], None], interval_s: float) -> None:
        self._wake = wake
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._said_something = False  # since the timer was set
        self._is_due = False
        self._set()

    def is_due(self) -> bool:
        """Whether the stream was woken for this; else it was because there is news."""
        if self._is_due:
            self._is_due = False
            return True
        self._said_something = True
        return False

    def stop(self) -> None:
        """Wakes it no more."""
        self._timer.cancel()

    def _set(self) -> None:
        self._timer = self._loop.call_later(self._interval_s, self._tick)

    def _tick(self) -> None:
        if not self._said_something:
            self._is_due = True
            self._wake()
        self._said_something = False
        self._set()


class EventStream(Response):
    """A response of server-sent events, which ends early if the client goes away.

    on_end: called at the end, however it comes. done: what is said last.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None], done: bytes = DONE) -> None:
        super().__init__(None)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._events = events
        self._on_end = on_end
        self._done = done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the events."""
        try:
            await unless_gone(Request(scope, receive), self._send(send))
        except ClientGoneError:
            scope["state"]["client_gone"] = True
        finally:
            self._on_end()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for events in self._events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
        except Exception as error:
            said = event(error_body(as_api_error(error)))
            await send({"type": "http.response.body", "body": said, "more_body": True})
            if not isinstance(error, ApiError):
                traceback.print_exception(error)
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
        await send({"type": "http.response.body", "body": self._done, "more_body": False})


class Door:
    """The first and the last to see a request: gives it an id, and says in one line what became of it.

    keys: those of which a request must have one, where there are any; `_OPEN` are for everybody.
    """

    def __init__(
        self, app: Any, service: Any, keys: Sequence[str] = (), log: AccessLog | None = None
    ) -> None:
        self._app = app
        self._log = log or AccessLog()
        self._service = service
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, start_s = time.perf_counter(), time.time()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["max_body_bytes"] = self._service.limits.max_body_bytes
        status = 0

        async def send_on(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        outcome = ""
        try:
            if scope["path"] in _OPEN or self._admits(headers.get(b"authorization", b"")):
                await self._app(scope, receive, send_on)
            else:
                await error_response(_NO_KEY)(scope, receive, send_on)
            if scope["state"].get("client_gone"):
                outcome = "the client went away"
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            seconds = time.perf_counter() - start
            self._service.metrics.answered(method, status, route, seconds)
            path = scope["path"][:200].encode("unicode_escape").decode()
            client = (scope.get("client") or ("",))[0]
            traced = {name.decode(): headers[name].decode("latin-1") for name in _TRACE if name in headers}
            ended = Ended(
                request_id, client, method, path, route, status, outcome, start_s, seconds, traced,
                state.get("generation"),
            )  # fmt: skip
            self._log.write(ended)

    def _admits(self, authorization: bytes) -> bool:
        """Whether there is one of the keys; how long that takes says nothing of them."""
        scheme, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        equal = [hmac.compare_digest(digest, one) for one in self._keys]
        return not self._keys or (scheme.lower() == b"bearer" and any(equal))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
