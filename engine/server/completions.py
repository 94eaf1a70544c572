"""`/v1/completions` and `/v1/chat/completions`: from the body to the answer, whole or as a stream."""

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from pagellm.engine.errors import RequestError
from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.requests.tool_calls import Thought, ToolCall, ToolParser
from pagellm.engine.server.answers import (
    CompletionLogprobs,
    Delta,
    Reader,
    chat_logprobs,
    check_shed,
    frame,
    joined_logprobs,
    now,
    prompt_logprobs,
    readers_of,
    usage_of,
)
from pagellm.engine.server.engine_thread import Generation
from pagellm.engine.server.errors import ApiError, as_api_error, too_late
from pagellm.engine.server.http import (
    DONE,
    KEEP_ALIVE,
    EventStream,
    KeepAlive,
    event,
    json_response,
    read_body,
    unless_gone,
)
from pagellm.engine.server.limits import Limits
from pagellm.engine.server.prepare import (
    Headers,
    Prepared,
    prepare_chat,
    prepare_completion,
)
from pagellm.engine.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    StreamOptions,
    read_request,
)
from pagellm.engine.server.service import Service
from pagellm.engine.server.tools import new_call_id


async def complete(service: Service, request: Request) -> Response:
    """`POST /v1/completions`."""
    read = partial(read_request, CompletionRequest)
    return await generate(service, request, read, prepare_completion, CompletionAnswer)


async def chat(service: Service, request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    read = partial(read_request, ChatCompletionRequest)
    return await generate(service, request, read, prepare_chat, ChatAnswer)


def headers_of(request: Request) -> Headers:
    """What the headers say of the request to the scheduler."""
    deadline = request.headers.get("x-deadline-s")
    try:
        return Headers(request.headers.get("x-tenant"), None if deadline is None else float(deadline))
    except ValueError:
        raise RequestError(f"x-deadline-s: found {deadline!r}, expected a number of seconds") from None


async def generate(
    service: Service,
    request: Request,
    read: Callable[[bytes], Any],
    prepare: Callable[..., Prepared],
    answer_kind: "type[Answer]",
) -> Response:
    """An answer, whole or as a stream. read: takes a request from its JSON."""
    engine = service.llm.engine
    arrival_s, start_s = engine.now(), asyncio.get_running_loop().time()
    body = await service.work(read, await read_body(request))
    service.check_model(body.model)
    service.note_unknown_fields(body.unknown_fields)
    options = body.stream_options
    if options is not None:
        service.note_unknown_fields(f"stream_options.{name}" for name in options.model_extra or ())
        if not body.stream:
            raise ApiError(
                400, "stream_options: found some, expected stream true with them", "stream_options"
            )
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(
            400, "prompt_logprobs: found some with stream true, expected one of them", "prompt_logprobs"
        )
    check_bounds(body, service.limits)
    prepared = await service.prepare(prepare, service.llm, body, headers_of(request), arrival_s)
    request_id = body.request_id or request.state.request_id
    if body.stream:
        generation = await submit(service, request, prepared, start_s)
        await check_admission(service, request, generation)
        answer = answer_kind(service, body, prepared, generation, request_id)
        return EventStream(_stream(service, generation, answer), generation.close, answer.done)

    async def whole() -> Response:
        generation = await submit(service, request, prepared, start_s)
        service.num_serving += 1
        try:
            await generation.wait_for_end()
            answer = answer_kind(service, body, prepared, generation, request_id)
            return await service.work(lambda: json_response(answer.whole()))
        finally:
            service.num_serving -= 1
            generation.close()

    return await unless_gone(request, whole())


def check_bounds(body: GenerationRequest, limits: Limits) -> None:
    """Raises `ApiError` for a request that asks for more than is given."""
    num_stops = 0 if body.stop is None or isinstance(body.stop, str) else len(body.stop)
    for name, value, most in [
        ("n", body.n, limits.max_n),
        ("logprobs", getattr(body, "logprobs", None), limits.max_logprobs),
        ("top_logprobs", getattr(body, "top_logprobs", None), limits.max_logprobs),
        ("prompt_logprobs", body.prompt_logprobs, limits.max_logprobs),
    ]:
        if type(value) is int and value > most:
            raise ApiError(400, f"{name}: found {value}, expected {most} at most", name)
    if num_stops > limits.max_stop_strings:
        raise ApiError(400, f"stop: found {num_stops}, expected {limits.max_stop_strings} at most", "stop")


async def submit(service: Service, request: Request, prepared: Prepared, start_s: float) -> Generation:
    """Gives what was prepared to the engine. Raises `ApiError` where too many wait, or it took too long.

    start_s: when the request arrived, on the loop's clock.
    """
    service.check_queue(sum(len(entry.token_ids) for entry in prepared.entries))
    most_s = service.limits.request_timeout
    end_s = None if most_s is None else start_s + most_s
    try:
        async with asyncio.timeout_at(end_s):
            generation = await service.thread.submit(prepared.entries)
    except TimeoutError:  # a step is under way, or the prompt took long to come or to make
        raise too_late(most_s) from None
    request.state.generation = generation
    if end_s is not None and most_s is not None:
        generation.expire_at(end_s, most_s)
    return generation


async def check_admission(service: Service, request: Request, generation: Generation) -> None:
    """Waits, where a policy decides on who is let in, until it has. Raises `ApiError` if it does not let in.

    So that whoever asks for a stream is told so by a status, too.
    """
    if not service.llm.engine.scheduler.policies.admits:
        return
    try:
        await unless_gone(request, generation.changed.wait())
        check_shed(generation)
    except BaseException:
        generation.close()
        raise


async def _stream(service: Service, generation: Generation, answer: "Answer") -> AsyncIterator[bytes]:
    """The chunks of an answer; what has come together is sent together."""
    service.num_serving += 1
    keep_alive = KeepAlive(generation.changed.set, service.limits.keep_alive)
    try:
        opening = answer.opening()
        if opening:
            yield b"".join(map(answer.encode, opening))
        under_way = answer.readers
        while under_way:
            await generation.wait()
            if keep_alive.is_due():
                yield KEEP_ALIVE
            events = []
            for reader in under_way:
                delta = reader.take()
                if delta is not None:
                    events += [answer.encode(chunk) for chunk in answer.chunks(reader, delta)]
            under_way = [reader for reader in under_way if not reader.ended]
            if events:
                yield b"".join(events)
        if answer.options.include_usage:
            yield event(answer.last_chunk())
    except Exception as error:
        failure = answer.failure(as_api_error(error))
        if not failure:
            raise
        if not isinstance(error, ApiError):
            traceback.print_exception(error)
        yield b"".join(map(answer.encode, failure))
    finally:
        keep_alive.stop()
        service.num_serving -= 1


class Answer:
    """One answer in the making. request_id: what its id is made of."""

    object_name = ""
    chunk_name = ""
    prefix = ""
    done = DONE  # what its stream ends with

    def __init__(
        self,
        service: Service,
        body: GenerationRequest,
        prepared: Prepared,
        generation: Generation,
        request_id: str,
    ) -> None:
        self.prepared = prepared
        self.tokenizer = service.llm.tokenizer
        self.readers = readers_of(generation, prepared.hides_output)
        self.options = body.stream_options or StreamOptions()
        self._model = body.model or service.names[0]
        self._id = f"{self.prefix}{request_id[:200] or uuid4().hex}"
        self._created = now()
        self._names_ids = bool(body.return_tokens_as_token_ids)
        self._returns_ids = bool(body.return_token_ids)

    def whole(self) -> dict[str, Any]:
        """The answer after its end."""
        choices = []
        for reader in self.readers:
            delta = reader.take()
            assert delta is not None
            choices.append(self.choice(reader, delta))
        answer = frame(self._id, self.object_name, self._model, self._created)
        return {**answer, "choices": choices, "usage": usage_of(self.readers)}

    def encode(self, chunk: dict[str, Any]) -> bytes:
        """A chunk as an event of a stream."""
        return event(chunk)

    def opening(self) -> list[dict[str, Any]]:
        """What a stream says before there is anything."""
        return []

    def failure(self, error: ApiError) -> list[dict[str, Any]]:
        """What a stream that cannot go on says; nothing: the error as such."""
        return []

    def last_chunk(self) -> dict[str, Any]:
        """The chunk that has the usage alone."""
        return {**self._chunk(), "choices": [], "usage": usage_of(self.readers)}

    def _chunk(self) -> dict[str, Any]:
        chunk = frame(self._id, self.chunk_name, self._model, self._created)
        if self.options.continuous_usage_stats and self.options.include_usage:
            chunk["usage"] = usage_of(self.readers)
        elif self.options.include_usage:
            chunk["usage"] = None
        return chunk

    def _end(self, reader: Reader, delta: Delta) -> dict[str, Any]:
        """Why a choice has ended, or that it has not."""
        reason = delta.finish_reason
        stop_reason = None if reason is not FinishReason.STOP else reader.stop_reason(self.tokenizer)
        return {"finish_reason": reason, "stop_reason": stop_reason}

    def choice(self, reader: Reader, delta: Delta) -> dict[str, Any]:
        """One completion as the whole answer has it."""
        raise NotImplementedError

    def chunks(self, reader: Reader, delta: Delta) -> list[dict[str, Any]]:
        """What is new of a completion as chunks of a stream."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """An answer of `/v1/completions`."""

    object_name = chunk_name = "text_completion"
    prefix = "cmpl-"

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        prepared: Prepared,
        generation: Generation,
        request_id: str,
    ) -> None:
        super().__init__(service, body, prepared, generation, request_id)
        self._echo = bool(body.echo)
        self._wants_prompt_logprobs = body.prompt_logprobs is not None
        self._logprobs: list[CompletionLogprobs] | None = None
        if body.logprobs is not None:
            skip = body.skip_special_tokens is not False
            self._logprobs = [CompletionLogprobs(self.tokenizer, skip, self._names_ids) for _ in self.readers]

    def choice(self, reader: Reader, delta: Delta) -> dict[str, Any]:
        """One completion as the whole answer has it."""
        choice = self._choice(reader, delta)
        output = reader.live.output
        if self._wants_prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs(self.tokenizer, output.prompt_logprobs)
        return choice

    def chunks(self, reader: Reader, delta: Delta) -> list[dict[str, Any]]:
        """What is new of a completion as chunks of a stream."""
        says_something = delta.text or delta.finish_reason or (self._echo and delta.number == 0)
        if not says_something and self._logprobs is None and not self._returns_ids:
            return []
        return [{**self._chunk(), "choices": [self._choice(reader, delta)]}]

    def _choice(self, reader: Reader, delta: Delta) -> dict[str, Any]:
        output = reader.live.output
        is_first = delta.number == 0
        text, logprobs = delta.text, None
        if self._logprobs is not None:
            writer = self._logprobs[reader.index]
            before = None
            if is_first and self._echo:
                assert output.prompt_logprobs is not None
                before = writer.prompt(self._echoed(reader), output.prompt_token_ids, output.prompt_logprobs)
            logprobs = writer.write(delta.token_ids, delta.logprobs)
            if before is not None:
                logprobs = joined_logprobs(before, logprobs)
        if is_first and self._echo:
            text = self._echoed(reader) + text
        choice = {"index": reader.index, "text": text, "logprobs": logprobs, **self._end(reader, delta)}
        if self._returns_ids:
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
            choice["token_ids"] = delta.token_ids
        return choice

    def _echoed(self, reader: Reader) -> str:
        num_each = len(self.readers) // len(self.prepared.texts)
        return self.prepared.texts[reader.index // num_each]


class ChatAnswer(Answer):
    """An answer of `/v1/chat/completions`."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(
        self,
        service: Service,
        body: ChatCompletionRequest,
        prepared: Prepared,
        generation: Generation,
        request_id: str,
    ) -> None:
        super().__init__(service, body, prepared, generation, request_id)
        self._role = prepared.role
        self._said = prepared.texts[0] if prepared.texts else ""
        self._has_logprobs = bool(body.logprobs)
        self._tells_reasoning = body.include_reasoning is not False
        self._wants_prompt_logprobs = body.prompt_logprobs is not None
        self._parsers: list[ToolParser] | None = None
        if prepared.new_parser is not None:
            self._parsers = [prepared.new_parser() for _ in self.readers]
        self._thought_parsers = [prepared.new_thought_parser() for _ in self.readers]
        self._num_calls = [0] * len(self.readers)

    def whole(self) -> dict[str, Any]:
        """The answer after its end."""
        answer = super().whole()
        output = self.readers[0].live.output
        if self._wants_prompt_logprobs:
            answer["prompt_logprobs"] = prompt_logprobs(self.tokenizer, output.prompt_logprobs)
        if self._returns_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    def choice(self, reader: Reader, delta: Delta) -> dict[str, Any]:
        """One completion as the whole answer has it."""
        delta, calls = self._told_apart(reader, delta)
        message: dict[str, Any] = {"role": self._role, "content": self._said + delta.text, "refusal": None}
        message |= self._reasoning(delta)
        if calls:
            message["tool_calls"] = [
                {name: call[name] for name in ("id", "type", "function")} for call in calls
            ]
            message["content"] = message["content"] or None
        choice = {"index": reader.index, "message": message, "logprobs": self._logprobs(delta)}
        choice |= self._end(reader, delta)
        if self._returns_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _end(self, reader: Reader, delta: Delta) -> dict[str, Any]:
        end = super()._end(reader, delta)
        if delta.finish_reason is FinishReason.STOP and self._num_calls[reader.index]:
            end["finish_reason"] = "tool_calls"
        return end

    def _told_apart(self, reader: Reader, delta: Delta) -> tuple[Delta, list[dict[str, Any]]]:
        """What is new without the calls of tools in it, and those."""
        if self._parsers is None:
            return delta, []
        parser, thought_parser = self._parsers[reader.index], self._thought_parsers[reader.index]
        parts, thought = parser.append(delta.text), thought_parser.append(delta.reasoning)
        if delta.finish_reason is not None:
            parts += parser.finish()
            thought += thought_parser.finish()
        calls = []
        for part in parts:
            if isinstance(part, ToolCall):
                function = {"name": part.name, "arguments": part.arguments}
                index = self._num_calls[reader.index]
                calls.append({"index": index, "id": new_call_id(), "type": "function", "function": function})
                self._num_calls[reader.index] += 1
        text = "".join(part for part in parts if isinstance(part, str))
        thoughts = [part.text for part in parts if isinstance(part, Thought)]
        reasoning = "".join([part for part in thought if isinstance(part, str)] + thoughts)
        return delta._replace(text=text, reasoning=reasoning), calls

    def chunks(self, reader: Reader, delta: Delta) -> list[dict[str, Any]]:
        """What is new of a completion as chunks of a stream, after one that says whose words they are."""
        chunks = []
        if delta.number == 0:
            opening = {"role": self._role, "content": self._said}
            chunk = self._chunk()
            chunk["choices"] = [
                {"index": reader.index, "delta": opening, "logprobs": None, "finish_reason": None}
            ]
            if self._returns_ids:
                chunk["prompt_token_ids"] = reader.live.output.prompt_token_ids
            chunks.append(chunk)
        delta, calls = self._told_apart(reader, delta)
        new: dict[str, Any] = self._reasoning(delta)
        if delta.text:
            new["content"] = delta.text
        if calls:
            new["tool_calls"] = calls
        if new or delta.finish_reason or self._has_logprobs or self._returns_ids:
            choice = {"index": reader.index, "delta": new, "logprobs": self._logprobs(delta)}
            choice |= self._end(reader, delta)
            if self._returns_ids:
                choice["token_ids"] = delta.token_ids
            chunks.append({**self._chunk(), "choices": [choice]})
        return chunks

    def _reasoning(self, delta: Delta) -> dict[str, Any]:
        """The thought under vLLM's name and the one that most others use."""
        if not delta.reasoning or not self._tells_reasoning:
            return {}
        return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        return chat_logprobs(self.tokenizer, delta.logprobs, self._names_ids)
