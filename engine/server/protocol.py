"""The requests that the endpoints take: OpenAI's fields, vLLM's and our own.

A field that is known is obeyed, or refused by its name where it asks for what is not supported. One that is
not known passes: clients and routers send fields of their own. Null is what is not given.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.errors import found
from pagellm.engine.requests.sampling_params import MAX_LOGPROBS
from pagellm.engine.server.errors import ApiError, bad_request
from pagellm.engine.server.limits import MAX_COMPLETIONS


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


_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}
_CHOICE = {"anyOf": [{"enum": [None, "none", "auto", "required"]}, {"type": "object"}]}


class Neutral:
    """Marks a field that is known and not supported: values that ask for what happens anyway, beside null."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """What the description of the interface says of it."""
        return {"enum": [None, *self.values]}


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
    media_io_kwargs: Annotated[Any, Neutral({})] = None
    mm_processor_kwargs: Annotated[Any, Neutral({})] = None


class GenerationRequest(Request):
    """How a prompt is to be continued, whatever it is."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Integer | None = Field(None, ge=1, le=MAX_COMPLETIONS)
    max_tokens: Integer | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[Integer] | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Integer] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Integer | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = Field(
        None, description="There are none: true is refused where special tokens are in the text."
    )
    prompt_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Integer | None = Field(None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    echo: bool | None = None
    cache_salt: str | None = None
    priority: float | None = None
    tenant: str | None = None
    deadline_s: float | None = Field(None, ge=0)
    thinking_token_budget: Integer | None = Field(None, ge=-1)
    response_format: dict[str, Any] | None = Field(
        None, description="The form of the answer: of type text, json_object, json_schema or structural_tag."
    )
    structured_outputs: dict[str, Any] | None = Field(
        None,
        description="The same in vLLM's form: json, regex, choice, grammar, json_object or structural_tag.",
    )
    guided_json: Annotated[Any, WithJsonSchema(_SCHEMA)] = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: Annotated[Any, WithJsonSchema(_SCHEMA)] = None
    grammar: str | None = Field(None, description="In Lark or GBNF.")
    request_id: str | None = None
    # What names a request for others, and changes nothing here.
    user: str | None = None
    session_id: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    # What is not supported but for the value that asks for nothing.
    best_of: Annotated[Any, Neutral(1)] = None
    use_beam_search: Annotated[Any, Neutral(False)] = None
    length_penalty: Annotated[Any, Neutral(1)] = None
    logprob_token_ids: Annotated[Any, Neutral()] = None
    stream_interval: Annotated[Any, Neutral(1)] = None
    repetition_detection: Annotated[Any, Neutral()] = None
    watermarking: Annotated[Any, Neutral(False)] = None
    kv_transfer_params: Annotated[Any, Neutral({})] = None
    ec_transfer_params: Annotated[Any, Neutral({})] = None
    vllm_xargs: Annotated[Any, Neutral({})] = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None
    store: Annotated[Any, Neutral(False)] = None


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: Prompts = None
    logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None
    suffix: Annotated[Any, Neutral("")] = None
    prompt_embeds: Annotated[Any, Neutral()] = None


class ChatCompletionRequest(GenerationRequest, ChatInput):
    """The body of `POST /v1/chat/completions`."""

    max_completion_tokens: Integer | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include_reasoning: bool | None = None
    tool_choice: Annotated[Any, WithJsonSchema(_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral("none")] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    audio: Annotated[Any, Neutral()] = None
    prediction: Annotated[Any, Neutral()] = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    web_search_options: Annotated[Any, Neutral()] = None


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


@lru_cache
def _unsupported(kind: type[Request]) -> dict[str, tuple[Any, ...]]:
    """The fields that are known and not supported, and the values that ask for nothing."""
    return {
        name: one.values
        for name, field in kind.model_fields.items()
        for one in field.metadata
        if isinstance(one, Neutral)
    }


_Kind = TypeVar("_Kind", bound=Request)


def read_request(kind: type[_Kind], body: bytes) -> _Kind:
    """A request taken from its JSON and checked. Raises `ApiError` for anything that is none."""
    try:
        request: _Kind = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error, body) from None
    for name, neutral in _unsupported(kind).items():  # type: ignore[arg-type]
        value = getattr(request, name)
        if value is None or value in neutral:
            continue
        expected = " or ".join(map(repr, neutral)) or "nothing"
        raise ApiError(400, f"{name}: found {found(value)}, expected {expected}: it is not supported", name)
    return request


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
