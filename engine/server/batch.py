"""Batch files as OpenAI has them, computed by the server's own endpoints without a network.

A line of the input is a request: `custom_id`, `method`, `url` and `body`. A line of the output is its answer,
written whole when it is there, so that a run that was ended anywhere is gone on with: an answer that stands
is not computed again, and half a line is cut off. A line that is no request gets an error in the place of an
answer; one whose body is refused gets the status and the error that a client would get.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import orjson

from pagellm.engine.checks import JsonError, parse_json, text
from pagellm.engine.errors import ConfigError, EngineError, RequestError, found
from pagellm.engine.llm import LLM
from pagellm.engine.progress import Advance
from pagellm.engine.server.app import routes
from pagellm.engine.server.limits import Limits
from pagellm.engine.server.service import Service

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_LONGEST_ID = 512
_IN_FLIGHT_PER_SLOT = 2  # requests under way for each that the engine computes at once: it never waits


class Job(NamedTuple):
    """A line of the input. error: why it is no request; then there is nothing but its number."""

    number: int
    custom_id: str | None
    url: str
    body: bytes
    error: str | None


class BatchCounts(NamedTuple):
    """What became of the lines. kept: answers that stood in the output already."""

    total: int
    kept: int
    completed: int
    failed: int


def read_jobs(path: str) -> Iterator[Job]:
    """The lines of an input file that say something. Raises `ConfigError` if it cannot be read."""
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _job(number, line)
    except OSError as error:
        raise ConfigError(f"input: cannot read {path}: {error.strerror}") from None


def _job(number: int, line: bytes) -> Job:
    try:
        request = parse_json(line)
        if not isinstance(request, dict):
            raise RequestError(f"found {found(request)}, expected an object")
        custom_id = request.get("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _LONGEST_ID:
            raise RequestError(
                f"custom_id: found {found(custom_id)}, expected a text of at most {_LONGEST_ID} characters"
            )
        text("custom_id", custom_id)
    except (JsonError, RequestError) as bad:
        return Job(number, None, "", b"", f"line {number}: {bad}")
    method, url, body = (request.get(name) for name in ("method", "url", "body"))
    error = None
    if method != "POST":
        error = f"line {number}: method: found {found(method)}, expected 'POST'"
    elif url not in URLS:
        error = f"line {number}: url: found {found(url)}, expected one of {', '.join(URLS)}"
    elif not isinstance(body, dict):
        error = f"line {number}: body: found {found(body)}, expected an object"
    elif body.get("stream"):
        error = (
            f"line {number}: body.stream: found {found(body['stream'])}, expected none: a line is one answer"
        )
    return Job(number, custom_id, str(url), b"" if error else json.dumps(body).encode(), error)


def check_jobs(path: str) -> tuple[int, dict[str, int]]:
    """How many lines an input has, and the line of each custom_id.

    Raises `ConfigError` if one occurs twice.
    """
    line_of: dict[str, int] = {}
    total = 0
    for job in read_jobs(path):
        total += 1
        if job.custom_id is None:
            continue
        if job.custom_id in line_of:
            raise ConfigError(
                f"input: {path}:{job.number}: found custom_id {found(job.custom_id)} again, which line "
                f"{line_of[job.custom_id]} has, expected each once"
            )
        line_of[job.custom_id] = job.number
    if not total:
        raise ConfigError(f"input: {path}: found no line, expected one request a line")
    return total, line_of


@contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """An output file, to read what it has and to append.

    Raises `ConfigError` for a file that cannot be written, or that another run writes.
    """
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"output: cannot write {path}: {error.strerror}") from None
    with file:
        with suppress(ImportError):  # only where there is no such lock
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"output: found {path} being written by another run") from None
        yield file


def take_up(file: BinaryIO, path: str, line_of: dict[str, int]) -> set[int]:
    """Which lines of the input have their answers in the output; half a line at its end is cut off.

    Raises `ConfigError` for an output that is not of this input.
    """
    file.seek(0)
    done: set[int] = set()
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        try:
            answer = parse_json(line)
            custom_id = answer["custom_id"]
            done.add(answer["error"]["line"] if custom_id is None else line_of[custom_id])
        except (JsonError, KeyError, TypeError):
            raise ConfigError(
                f"output: {path}:{number}: found a line that is no answer to the input's requests, "
                "expected a new file or one that a run on this input has left"
            ) from None
        end += len(line)
    file.truncate(end)
    return done


class BatchRun:
    """Computes the requests of a file. names: what their bodies may call the model."""

    def __init__(self, load: Callable[[], LLM], names: list[str]) -> None:
        self._ready = asyncio.Event()
        self._service = Service(load, names, self._ready.set, Limits(None, None))
        self._app = routes(self._service)

    async def run(self, jobs: Iterator[Job], file: BinaryIO, advance: Advance) -> tuple[int, int]:
        """Answers the jobs; returns how many were completed and how many failed.

        Raises `PagellmError` if the model cannot be loaded, or the engine fails.
        """
        self._service.start()
        try:
            await self._ready.wait()
            failure = self._service.failure()
            if failure is not None:
                raise failure
            return await self._answer_all(jobs, file, advance)
        finally:
            self._service.close()
            await asyncio.to_thread(self._service.join, 30.0)

    async def _answer_all(self, jobs: Iterator[Job], file: BinaryIO, advance: Advance) -> tuple[int, int]:
        num_completed = num_failed = 0
        most = self._service.llm.engine.config.max_num_seqs * _IN_FLIGHT_PER_SLOT
        under_way: set[asyncio.Task[tuple[bytes, bool]]] = set()
        try:
            while True:
                for job in islice(jobs, most - len(under_way)):
                    under_way.add(asyncio.create_task(self._answer(job)))
                if not under_way:
                    break
                finished, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    line, is_completed = task.result()
                    file.write(line)
                    num_completed += is_completed
                    num_failed += not is_completed
                    advance(1)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
        return num_completed, num_failed

    async def _answer(self, job: Job) -> tuple[bytes, bool]:
        """A line of the output, and whether it is a completed request's."""
        line: dict[str, Any] = {"id": f"batch_req_{uuid4().hex}", "custom_id": job.custom_id}
        if job.error is not None:
            error = {"code": "invalid_request", "message": job.error, "param": None, "line": job.number}
            return orjson.dumps({**line, "response": None, "error": error}) + b"\n", False
        request_id = uuid4().hex
        status, body = await self._ask(job, request_id)
        if status == 503:  # the engine has gone, or is going
            raise EngineError(parse_json(body)["error"]["message"])
        response = {"status_code": status, "request_id": request_id, "body": orjson.Fragment(body)}
        return orjson.dumps({**line, "response": response, "error": None}) + b"\n", status == 200

    async def _ask(self, job: Job, request_id: str) -> tuple[int, bytes]:
        """What the server's application answers."""
        bodies = [{"type": "http.request", "body": job.body, "more_body": False}]
        status, parts = 500, []

        async def receive() -> dict[str, Any]:
            if bodies:
                return bodies.pop()
            await asyncio.Event().wait()  # nobody goes away
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        state = {"request_id": request_id, "max_body_bytes": self._service.limits.max_body_bytes}
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": job.url, "query_string": b"",
            "raw_path": job.url.encode(), "root_path": "", "scheme": "http", "server": None, "client": None,
            "headers": [(b"content-type", b"application/json")], "state": state,
        }  # fmt: skip
        await self._app(scope, receive, send)
        return status, b"".join(parts)


def run_batch(
    load: Callable[[], LLM],
    names: list[str],
    input_path: str,
    output_path: str,
    progress: Callable[[int], Any],
) -> BatchCounts:
    """Answers what an input file asks and an output file does not answer yet.

    progress: a context manager of how many answers are still to come, that yields `Advance`. Raises
    `PagellmError` for files that cannot be used, before anything is computed.
    """
    total, line_of = check_jobs(input_path)
    if Path(output_path).exists() and os.path.samefile(input_path, output_path):
        raise ConfigError(f"output: found the input, {output_path}, expected another file")
    with open_output(output_path) as file:
        done = take_up(file, output_path, line_of)
        rest = (job for job in read_jobs(input_path) if job.number not in done)
        if len(done) >= total:
            return BatchCounts(total, len(done), 0, 0)

        async def run(advance: Advance) -> tuple[int, int]:
            return await BatchRun(load, names).run(rest, file, advance)

        with progress(total - len(done)) as advance:
            completed, failed = asyncio.run(run(advance))
        os.fsync(file.fileno())
    return BatchCounts(total, len(done), completed, failed)
