"""`/v1/responses`: a chat's answer as items, and a stream of it as events.

Whatever a chat's stream says becomes an item here: a thought, a text, a call. An item is open as long as
what comes belongs to it. The whole answer is what the events of a stream add up to. Nothing is kept.
"""

from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.server.answers import Delta, Reader, usage_of
from pagellm.engine.server.completions import ChatAnswer, generate
from pagellm.engine.server.engine_thread import Generation
from pagellm.engine.server.errors import ApiError
from pagellm.engine.server.http import named_event
from pagellm.engine.server.prepare import Prepared
from pagellm.engine.server.response_input import ResponseChat, prepare_response, read_response_request
from pagellm.engine.server.service import Service


async def respond(service: Service, request: Request) -> Response:
    """`POST /v1/responses`."""
    return await generate(service, request, read_response_request, prepare_response, ResponseAnswer)


class ResponseAnswer(ChatAnswer):
    """An answer of `/v1/responses`."""

    prefix = "resp_"  # by which clients know one
    done = b""

    def __init__(
        self,
        service: Service,
        body: ResponseChat,
        prepared: Prepared,
        generation: Generation,
        request_id: str,
    ) -> None:
        super().__init__(service, body, prepared, generation, request_id)
        self._asked = body.asked
        self._params = prepared.entries[0].params
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None  # what the last item is, while more of it may come
        self._call: Any = None  # the number of the call that is open
        self._waiting: list[dict[str, Any]] = []  # log-probabilities that no event has had yet
        self._num_taken = 0  # of log-probabilities
        self._logprobs_so_far: list[dict[str, Any]] = []  # of the text that is open
        self._number = 0

    def whole(self) -> dict[str, Any]:
        """The answer after its end."""
        [reader] = self.readers
        delta = reader.take()
        assert delta is not None
        events = self.chunks(reader, delta)
        response: dict[str, Any] = events[-1]["response"]
        return response

    def encode(self, chunk: dict[str, Any]) -> bytes:
        """An event, with its type as its name, too."""
        return named_event(chunk["type"], chunk)

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [
            self._event("response.created", response=self._response("in_progress")),
            self._event("response.in_progress", response=self._response("in_progress")),
        ]

    def failure(self, error: ApiError) -> list[dict[str, Any]]:
        """What a stream that cannot go on ends with."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        said = {"code": code, "message": error.message}
        return [self._event("response.failed", response=self._response("failed", said))]

    def chunks(self, reader: Reader, delta: Delta) -> list[dict[str, Any]]:
        """What is new as events."""
        events: list[dict[str, Any]] = []
        for chunk in super().chunks(reader, delta):
            for choice in chunk["choices"]:
                events += self._take(choice)
        if delta.finish_reason is not None:
            if not self._items:
                events += self._begin("text", self._message())
            events += self._finish(delta.finish_reason is FinishReason.LENGTH)
        return events

    def _take(self, choice: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of one choice of a chunk of a chat."""
        events: list[dict[str, Any]] = []
        new = choice["delta"]
        if new.get("reasoning"):
            events += self._begin("reasoning", self._thought())
            events.append(self._grow("response.reasoning_text.delta", new["reasoning"], content_index=0))
        self._waiting += (choice.get("logprobs") or {}).get("content") or []
        if new.get("content"):
            events += self._begin("text", self._message())
            more = {"content_index": 0, "logprobs": self._text_logprobs()}
            events.append(self._grow("response.output_text.delta", new["content"], **more))
        for call in new.get("tool_calls") or ():
            if self._open != "call" or call["index"] != self._call:
                events += self._close()
                events += self._begin("call", self._function_call(call))
                self._call = call["index"]
            arguments = call["function"].get("arguments")
            if arguments:
                events.append(self._grow("response.function_call_arguments.delta", arguments))
        return events

    def _text_logprobs(self) -> list[dict[str, Any]]:
        """Log-probabilities that have not been told yet, those of a thought left out."""
        num_thoughts = self.readers[0].completion.num_reasoning_tokens
        logprobs = self._waiting[max(num_thoughts - self._num_taken, 0) :]
        self._num_taken += len(self._waiting)
        self._waiting = []
        self._logprobs_so_far += logprobs
        return logprobs

    def _thought(self) -> dict[str, Any]:
        return {"id": f"rs_{uuid4().hex}", "type": "reasoning", "summary": [], "content": []}

    def _message(self) -> dict[str, Any]:
        return {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "content": []}

    def _function_call(self, call: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"fc_{uuid4().hex}", "type": "function_call", "call_id": call["id"],
            "name": call["function"]["name"], "arguments": "",
        }  # fmt: skip

    def _begin(self, kind: str, item: dict[str, Any]) -> list[dict[str, Any]]:
        """Opens an item, unless one of its kind is open; closes the one before."""
        if self._open == kind:
            return []
        events = self._close()
        self._open = kind
        self._logprobs_so_far = []
        self._items.append(item | {"status": "in_progress"})
        shown = {**self._items[-1]}
        events.append(self._event("response.output_item.added", output_index=self._index, item=shown))
        part = self._part("")
        if part is not None:
            self._items[-1]["content"] = [part]
            events.append(self._of_item("response.content_part.added", content_index=0, part={**part}))
        return events

    def _part(self, text: str) -> dict[str, Any] | None:
        """The part of the open item that has its text."""
        if self._open == "text":
            part = {"type": "output_text", "text": text, "annotations": []}
            return part | ({"logprobs": [*self._logprobs_so_far]} if self._has_logprobs else {})
        return {"type": "reasoning_text", "text": text} if self._open == "reasoning" else None

    def _grow(self, kind: str, more: str, **fields: Any) -> dict[str, Any]:
        item = self._items[-1]
        if self._open == "call":
            item["arguments"] += more
        else:
            item["content"][0]["text"] += more
        return self._of_item(kind, delta=more, **fields)

    def _close(self, status: str = "completed") -> list[dict[str, Any]]:
        """Ends the item that is open, if one is."""
        if self._open is None:
            return []
        item = self._items[-1]
        item["status"] = status
        events = []
        if self._open == "call":
            events.append(
                self._of_item(
                    "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
                )
            )
        else:
            text = item["content"][0]["text"]
            if self._open == "text":
                self._text_logprobs()
            part = self._part(text)
            item["content"] = [part]
            name = "output_text" if self._open == "text" else "reasoning_text"
            more = {"logprobs": [*self._logprobs_so_far]} if self._open == "text" else {}
            events.append(self._of_item(f"response.{name}.done", content_index=0, text=text, **more))
            events.append(self._of_item("response.content_part.done", content_index=0, part=part))
        events.append(self._event("response.output_item.done", output_index=self._index, item={**item}))
        self._open = None
        return events

    def _finish(self, is_cut: bool) -> list[dict[str, Any]]:
        status = "incomplete" if is_cut else "completed"
        return [*self._close(status), self._event(f"response.{status}", response=self._response(status))]

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=self._index, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _response(self, status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        """The response as it is now."""
        asked, params = self._asked, self._params
        reasoning, text = asked.reasoning or {}, asked.text or {}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata or {},
            "model": self._model,
            "output": [*self._items],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": reasoning.get("effort"), "summary": None},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": text.get("format") or {"type": "text"}, "verbosity": "medium"},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if status in ("in_progress", "failed") else self._usage(),
            "user": asked.user,
        }

    def _usage(self) -> dict[str, Any]:
        usage = usage_of(self.readers)
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }
