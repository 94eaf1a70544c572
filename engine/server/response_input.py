"""What `/v1/responses` takes, and the chat request that it comes to.

Nothing is kept between two requests: what needs that is refused by its name. An item of the input becomes a
message, or a part of the assistant's: a thought, a call and a text that follow each other are one turn.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from pagellm.engine.errors import RequestError, found
from pagellm.engine.llm import LLM
from pagellm.engine.requests.sampling_params import MAX_LOGPROBS
from pagellm.engine.server.errors import ApiError, bad_request
from pagellm.engine.server.http import json_bytes
from pagellm.engine.server.prepare import Headers, Prepared, prepare_chat
from pagellm.engine.server.protocol import (
    ChatCompletionRequest,
    GenerationRequest,
    Integer,
    Neutral,
    Tools,
    read_request,
)

_LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_ROLES = ("user", "system", "developer", "assistant")
# The same thing under the name that the client used.
_NAMES = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "reasoning_effort": "reasoning",
    "response_format": "text",
}  # fmt: skip
_OWN = ("n", "max_tokens", "prompt_logprobs", "return_token_ids", "response_format", "stream_options")
_KNOWN_WITHIN = {
    "stream_options": ("include_obfuscation",), "text": ("format", "verbosity"),
    "reasoning": ("effort", "summary", "generate_summary"),
}  # fmt: skip
Items = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})
]


class ResponseRequest(GenerationRequest):
    """The body of `POST /v1/responses`."""

    input: Items = None
    instructions: str | None = None
    max_output_tokens: Integer | None = Field(None, ge=0)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None, description="Reasoning comes as it is; there is nothing to encrypt."
    )
    reasoning: dict[str, Any] | None = Field(None, description="effort.")
    text: dict[str, Any] | None = Field(None, description="format, and verbosity where it is medium.")
    tools: Tools = None
    tool_choice: Annotated[Any, WithJsonSchema({"type": ["string", "object", "null"]})] = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    thinking: bool | None = None
    stream_options: dict[str, Any] | None = None  # type: ignore[assignment]
    # What would have to be kept, or is not supported but for the value that asks for nothing.
    background: Annotated[Any, Neutral(False)] = None
    conversation: Annotated[Any, Neutral()] = None
    previous_response_id: Annotated[Any, Neutral()] = None
    prompt: Annotated[Any, Neutral()] = None
    truncation: Annotated[Any, Neutral("disabled")] = None
    max_tool_calls: Annotated[Any, Neutral()] = None
    moderation: Annotated[Any, Neutral()] = None
    context_management: Annotated[Any, Neutral([])] = None
    n: Annotated[Any, Neutral(1)] = None
    max_tokens: Annotated[Any, Neutral()] = None
    echo: Annotated[Any, Neutral(False)] = None
    prompt_logprobs: Annotated[Any, Neutral()] = None
    return_token_ids: Annotated[Any, Neutral(False)] = None
    response_format: Annotated[Any, Neutral({"type": "text"})] = None  # here it is text.format


class ResponseChat(ChatCompletionRequest):
    """A chat request that a response request comes to. asked: what that was."""

    _asked: ResponseRequest

    @property
    def asked(self) -> ResponseRequest:
        """The request as the client sent it."""
        return self._asked

    @property
    def unknown_fields(self) -> list[str]:
        """The names of fields that mean nothing here."""
        names = self._asked.unknown_fields
        for field, known in _KNOWN_WITHIN.items():
            given = getattr(self._asked, field) or {}
            names += [f"{field}.{name}" for name in given if name not in known]
        return names


def read_response_request(body: bytes) -> ResponseChat:
    """A request taken from its JSON, checked, as a chat. Raises `ApiError` for anything that is none."""
    asked = read_request(ResponseRequest, body)
    shared = GenerationRequest.model_fields.keys() - set(_OWN)
    given = asked.model_dump(exclude_none=True, include=set(shared))
    try:
        given |= _chat_fields(asked)
        chat = read_request(ResponseChat, json_bytes(given))
    except RequestError as error:
        raise bad_request(str(error)) from None
    except ApiError as error:
        raise _renamed(error) from None
    chat._asked = asked
    return chat


def prepare_response(llm: LLM, request: ResponseChat, headers: Headers, arrival_s: float) -> Prepared:
    """The prompt of a response request."""
    try:
        return prepare_chat(llm, request, headers, arrival_s)
    except RequestError as error:
        raise _renamed(bad_request(str(error))) from None


def _renamed(error: ApiError) -> ApiError:
    """An error about the chat request as one about the client's own."""
    name = _NAMES.get(error.param or "")
    if name is None:
        return error
    return ApiError(error.status, error.message.replace(error.param or "", name, 1), name, error.headers)


def _chat_fields(asked: ResponseRequest) -> dict[str, Any]:
    """What is said of a chat in other words."""
    reasoning, text = asked.reasoning or {}, asked.text or {}
    for name in ("summary", "generate_summary"):
        if reasoning.get(name) not in (None, "auto"):
            raise RequestError(
                f"reasoning.{name}: found {found(reasoning[name])}, expected 'auto': it is not supported"
            )
    if text.get("verbosity") not in (None, "medium"):
        raise RequestError(
            f"text.verbosity: found {found(text['verbosity'])}, expected 'medium': it is not supported"
        )
    fields = {
        "messages": messages_of_input(asked.input, asked.instructions),
        "max_completion_tokens": asked.max_output_tokens,
        "reasoning_effort": reasoning.get("effort"),
        "response_format": _response_format(text.get("format")),
        "parallel_tool_calls": asked.parallel_tool_calls,
        "chat_template_kwargs": asked.chat_template_kwargs,
        "thinking": asked.thinking,
    }
    if asked.tools:
        fields["tools"] = asked.tools
        if isinstance(asked.tools, list):
            fields["tools"] = [_tool(index, tool) for index, tool in enumerate(asked.tools)]
        fields["tool_choice"] = _tool_choice(asked.tool_choice)
    elif asked.tool_choice is not None:
        fields["tool_choice"] = asked.tool_choice
    if _LOGPROBS in (asked.include or ()):
        fields |= {"logprobs": True, "top_logprobs": asked.top_logprobs}
    elif asked.top_logprobs:
        raise RequestError(f"top_logprobs: found {asked.top_logprobs}, expected {_LOGPROBS!r} in include")
    return {name: value for name, value in fields.items() if value is not None}


def _response_format(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("type") != "json_schema":
        return value
    schema = {name: value[name] for name in value if name != "type"}
    return {"type": "json_schema", "json_schema": schema}


def _tool(index: int, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        shown = tool.get("type") if isinstance(tool, dict) else tool
        raise RequestError(f"tools[{index}]: found {found(shown)}, expected a tool of the type 'function'")
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def messages_of_input(value: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    """The messages that the items of an input are. Raises `RequestError` for one that is none."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(value, str):
        return [*messages, {"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise RequestError(f"input: found {found(value)}, expected a text or a list of items")
    names: dict[Any, Any] = {}  # of the calls
    for index, item in enumerate(value):
        _add_item(messages, names, f"input[{index}]", item)
    return messages


def _add_item(messages: list[dict[str, Any]], names: dict[Any, Any], place: str, item: Any) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        role, content = item.get("role"), _text_of(f"{place}.content", item.get("content"))
        if role not in _ROLES:
            raise RequestError(f"{place}.role: found {found(role)}, expected one of {', '.join(_ROLES)}")
        turn = _open_turn(messages) if role == "assistant" else None
        if turn is not None and "content" not in turn and "tool_calls" not in turn:
            turn["content"] = content
        else:
            messages.append({"role": role, "content": content})
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        messages.append({"role": "assistant", "reasoning": _text_of(f"{place}.content", parts)})
    elif kind == "function_call":
        for name in ("name", "arguments", "call_id"):
            if not isinstance(item.get(name), str):
                raise RequestError(f"{place}.{name}: found {found(item.get(name))}, expected a text")
        names[item["call_id"]] = item["name"]
        turn = _open_turn(messages)
        if turn is None:
            turn = {"role": "assistant"}
            messages.append(turn)
        call = {"name": item["name"], "arguments": item["arguments"]}
        turn.setdefault("tool_calls", []).append(
            {"id": item["call_id"], "type": "function", "function": call}
        )
    elif kind == "function_call_output":
        call_id = item.get("call_id")
        if not isinstance(call_id, str | None):
            raise RequestError(f"{place}.call_id: found {found(call_id)}, expected a text")
        answer = {"role": "tool", "tool_call_id": call_id}
        if call_id in names:
            answer["name"] = names[call_id]
        messages.append({**answer, "content": _text_of(f"{place}.output", item.get("output"))})
    else:
        raise RequestError(
            f"{place}: found {found(item if kind is None else kind)}, expected an item of the type message,"
            " reasoning, function_call or function_call_output"
        )


def _open_turn(messages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The assistant's message that a further item of the same turn belongs to."""
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else None


def _text_of(place: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{place}: found {found(content)}, expected a text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in (*_TEXT_PARTS, "refusal") or not isinstance(text, str):
            raise RequestError(
                f"{place}[{index}]: found {found(part if kind is None else kind)}, expected a part that is"
                " a text, such as input_text"
            )
        texts.append(text)
    return "\n".join(texts)
