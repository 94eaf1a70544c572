"""The requests that the endpoints take: OpenAI's fields, vLLM's and our own.

A field that is known is obeyed, or refused by its name where it asks for what is not supported. One that is
not known passes: clients and routers send fields of their own. Null is what is not given.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.errors import found
from pagellm.engine.server.errors import ApiError, bad_request


def _whole(value: Any) -> Any:
    """A float that is an integer, as JSON's writers may put one, as that integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
# Looked into by the engine's own checks, which name the place of what is wrong.
Prompts = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _IDS,
                {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS]}},
                {"type": "null"},
            ]
        }
    ),
]
_OBJECTS = {"type": "array", "items": {"type": "object"}, "minItems": 1}
Messages = Annotated[Any, WithJsonSchema({"anyOf": [_OBJECTS, {"type": "null"}]})]
Tools = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]})
]
_ANYTHING = WithJsonSchema({})
Unsupported = Annotated[Any, _ANYTHING]


class Request(BaseModel):
    """What all requests have in common."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model: str | None = Field(
        None, description="One of /v1/models; the one that is served where it is not given."
    )

    @property
    def unknown_fields(self) -> list[str]:
        """The names of fields that mean nothing here."""
        return list(self.model_extra or ())


class StreamOptions(BaseModel):
    """What a stream says besides the text."""

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatInput(Request):
    """A conversation, and how it becomes a prompt."""

    messages: Messages = None
    tools: Tools = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = Field(None, description="The name of one of the model's templates.")
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    thinking: bool | None = Field(None, description="Whether the model is to think before it answers.")
    reasoning_effort: str | None = None
    sanitize_control_tokens: bool | None = None
    media_io_kwargs: Unsupported = None
    mm_processor_kwargs: Unsupported = None


class GenerationRequest(Request):
    """How a prompt is to be continued, whatever it is."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Integer | None = None
    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[Integer] | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Integer] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Integer | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: Integer | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Integer | None = None
    truncation_side: Literal["left", "right"] | None = None
    echo: bool | None = None
    cache_salt: str | None = None
    priority: float | None = None
    tenant: str | None = None
    deadline_s: float | None = None
    thinking_token_budget: Integer | None = None
    request_id: str | None = None
    # What names a request for others, and changes nothing here.
    user: str | None = None
    session_id: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    # What is not supported but for the value that asks for nothing.
    best_of: Unsupported = None
    bad_words: Unsupported = None
    use_beam_search: Unsupported = None
    length_penalty: Unsupported = None
    logprob_token_ids: Unsupported = None
    response_format: Unsupported = None
    structured_outputs: Unsupported = None
    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None
    stream_interval: Unsupported = None
    repetition_detection: Unsupported = None
    watermarking: Unsupported = None
    kv_transfer_params: Unsupported = None
    ec_transfer_params: Unsupported = None
    vllm_xargs: Unsupported = None
    service_tier: Unsupported = None
    store: Unsupported = None


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: Prompts = None
    logprobs: Integer | None = None
    add_special_tokens: bool | None = None
    suffix: Unsupported = None
    prompt_embeds: Unsupported = None


class ChatCompletionRequest(GenerationRequest, ChatInput):
    """The body of `POST /v1/chat/completions`."""

    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    include_reasoning: bool | None = None
    tool_choice: Unsupported = None
    parallel_tool_calls: bool | None = None
    functions: Unsupported = None
    function_call: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


class TokenizeRequest(ChatInput):
    """The body of `POST /tokenize`: a text or a conversation."""

    prompt: Annotated[Any, WithJsonSchema({"type": ["string", "null"]})] = None
    content: Annotated[Any, WithJsonSchema({"type": ["string", "null"]})] = Field(
        None, description="Another name of prompt."
    )
    return_token_strs: bool | None = None


class DetokenizeRequest(Request):
    """The body of `POST /detokenize`."""

    tokens: list[Integer]


# The values of unsupported fields that ask for what happens anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "bad_words": ([],), "use_beam_search": (False,), "length_penalty": (1,),
    "response_format": ({"type": "text"},), "stream_interval": (1,), "vllm_xargs": ({},),
    "watermarking": (False,), "service_tier": ("auto", "default"), "store": (False,), "suffix": ("",),
    "functions": ([],), "function_call": ("none",), "modalities": (["text"],), "verbosity": ("medium",),
    "media_io_kwargs": ({},), "mm_processor_kwargs": ({},), "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
}  # fmt: skip
_UNSUPPORTED = {
    kind: [
        name
        for name, field in kind.model_fields.items()
        if _ANYTHING in field.metadata and name != "tool_choice"  # see `_check_tools`
    ]
    for kind in (CompletionRequest, ChatCompletionRequest, TokenizeRequest)
}

_Kind = TypeVar("_Kind", bound=Request)


def read_request(kind: type[_Kind], body: bytes) -> _Kind:
    """A request taken from its JSON and checked. Raises `ApiError` for anything that is none."""
    try:
        request: _Kind = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error, body) from None
    for name in _UNSUPPORTED.get(kind, ()):
        value = getattr(request, name)
        neutral = _NEUTRAL.get(name, ())
        if value is None or value in neutral:
            continue
        expected = " or ".join(map(repr, neutral)) or "nothing"
        raise ApiError(400, f"{name}: found {found(value)}, expected {expected}: it is not supported", name)
    _check_tools(request)
    return request


def _check_tools(request: Request) -> None:
    """A model may be told of tools; that it calls them is not supported."""
    if not isinstance(request, ChatCompletionRequest):
        return
    choice = request.tool_choice
    if request.tools and choice != "none":
        shown = "nothing" if choice is None else found(choice)
        raise ApiError(
            400,
            f"tool_choice: found {shown} beside tools, expected 'none': calls are not supported",
            "tool_choice",
        )
    if choice not in (None, "none", "auto"):
        raise ApiError(
            400, f"tool_choice: found {found(choice)} without tools, expected 'none' or 'auto'", "tool_choice"
        )


def _refused(error: ValidationError, body: bytes) -> ApiError:
    """One clear error for the first thing that is wrong."""
    first: Mapping[str, Any] = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        try:
            parse_json(body)
        except JsonError as bad:
            return ApiError(400, f"body: {bad}")
        return ApiError(400, f"body: {first['msg']}")
    names = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-"))]
    names = [name for name in names if name not in ("str", "int", "float")] or ["body"]
    if first["type"] == "missing":
        return bad_request(f"{names[0]}: found nothing, expected a value")
    place = names[0] + "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in names[1:])
    expected = str(first["msg"]).removeprefix("Input should be ")
    return bad_request(f"{place}: found {found(first['input'])}, expected {expected}")
