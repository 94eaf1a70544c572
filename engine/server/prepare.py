"""From a request of a client to the engine's: prompts as token ids, and sampling parameters.

What takes long with long texts, and so runs in a worker. Raises `RequestError` for what cannot be served.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from pagellm.engine.checks import JsonError, integer, integers, parse_json, text
from pagellm.engine.errors import RequestError, found
from pagellm.engine.grammar.forms import closed_where_unsaid
from pagellm.engine.llm import LLM
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.requests.structured import StructuredOutputs
from pagellm.engine.requests.tool_calls import PlainText, ToolParser
from pagellm.engine.server.engine_thread import Entry
from pagellm.engine.server.limits import MAX_COMPLETIONS
from pagellm.engine.server.protocol import (
    ChatCompletionRequest,
    ChatInput,
    CompletionRequest,
    GenerationRequest,
)
from pagellm.engine.server.tools import plan_tools, tell_tools

_DEFAULT_MAX_TOKENS = 16  # of /v1/completions
# Of vLLM's fields those that choose among ways to the same form.
_NO_FORMS = ("disable_fallback", "_backend", "_backend_was_auto")
# Fields that say a form by themselves: of vLLM's older versions, and of llama.cpp's server.
_FORM_FIELDS = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    "json_schema": "json", "grammar": "grammar",
}  # fmt: skip
_SAME_NAMES = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop", "stop_token_ids", "bad_words", "include_stop_str_in_output",
    "min_tokens", "ignore_eos", "skip_special_tokens", "prompt_logprobs", "cache_salt", "priority", "tenant",
    "deadline_s",
)  # fmt: skip


class Prepared(NamedTuple):
    """What goes to the engine, and what the answer needs to know beside it.

    texts: what `echo` says before each prompt's completions. hides_output: no tokens were asked for; the
    engine computes one, which nobody sees. role: whose words the model writes. new_parser: reads the calls of
    tools in one completion; None where there are none. new_thought_parser: what its thoughts go through then.
    """

    entries: list[Entry]
    texts: list[str]
    hides_output: bool
    role: str = "assistant"
    new_parser: Callable[[], ToolParser] | None = None
    new_thought_parser: Callable[[], ToolParser] = PlainText


class Headers(NamedTuple):
    """What may be said in headers instead of the body; None where it is not."""

    tenant: str | None = None
    deadline_s: float | None = None


def prepare_completion(llm: LLM, request: CompletionRequest, headers: Headers, arrival_s: float) -> Prepared:
    """The prompts of a completion request."""
    logprobs = request.logprobs
    params, hides_output = _sampling_params(
        llm, request, headers, _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        logprobs, given_max_tokens="max_tokens" in request.model_fields_set,
    )  # fmt: skip
    form = answer_form(request)
    if form is not None:
        compile_form(llm, request, form)
        params = replace(params, structured=form)
    if request.echo and logprobs is not None and params.prompt_logprobs is None:
        params = replace(params, prompt_logprobs=logprobs)
    prompts = _prompts(request.prompt)
    if len(prompts) * params.n > MAX_COMPLETIONS:
        raise RequestError(
            f"n: found {params.n} for {len(prompts)} prompts, expected {MAX_COMPLETIONS} completions at most"
        )
    entries, texts = [], []
    for index, prompt in enumerate(prompts):
        name = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        if isinstance(prompt, str):
            with_special = request.add_special_tokens is not False
            llm.tokenizer.check_length(name, text(name, prompt), _most_tokens(llm, request))
            ids = llm.tokenizer.encode(prompt, add_special_tokens=with_special)
        elif isinstance(prompt, list):
            ids = integers(name, prompt)
            check_token_ids(llm, name, ids)
        else:
            raise RequestError(f"{name}: found {found(prompt)}, expected a text or a list of token ids")
        kept = _truncated(llm, request, ids)
        if request.echo:
            is_whole = isinstance(prompt, str) and len(kept) == len(ids)
            texts.append(prompt if is_whole else llm.tokenizer.decode(kept))
        entries.append(Entry(kept, params, arrival_s))
    return Prepared(entries, texts, hides_output)


def _prompts(value: Any) -> list[Any]:
    """One prompt or several as a list; what each is, is looked at later."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise RequestError(f"prompt: found {found(value)}, expected a text, token ids, or a list of them")
    return [value] if isinstance(value[0], int) else value


def prepare_chat(llm: LLM, request: ChatCompletionRequest, headers: Headers, arrival_s: float) -> Prepared:
    """The prompt of a chat request."""
    max_tokens = (
        request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    )
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if request.top_logprobs and not request.logprobs:
        raise RequestError(f"top_logprobs: found {request.top_logprobs}, expected logprobs true with it")
    params, hides_output = _sampling_params(
        llm, request, headers, max_tokens, logprobs, given_max_tokens=max_tokens is not None
    )
    hides_special = params.skip_special_tokens
    plan = plan_tools(
        llm, request.tools, request.tool_choice, request.parallel_tool_calls, answer_form(request),
        request.chat_template, hides_special,
    )  # fmt: skip
    if plan.form is not None:
        compile_form(llm, request, plan.form)
    params = replace(params, structured=plan.form, skip_special_tokens=hides_special and plan.parser is None)
    messages = messages_of(llm, request)
    ids, in_thought = chat_prompt(llm, request, messages, _most_tokens(llm, request))
    kept = _truncated(llm, request, ids)
    texts, role = [], _answer_role(request, messages)
    if request.echo:
        texts.append(_content_of(messages[-1]) if messages[-1].get("role") == role else "")
    entry = Entry(kept, params, arrival_s, plan.separates_reasoning, in_thought)
    return Prepared([entry], texts, hides_output, role, plan.parser, plan.thought_parser)


def answer_form(request: GenerationRequest) -> StructuredOutputs | None:
    """The form that a request asks for, whichever field says it. Raises `RequestError`, which names that."""
    asked = _asked_form(request)
    if asked is None:
        return None
    name, fields = asked
    with _naming(name):
        return StructuredOutputs.read("structured", fields)


def _asked_form(request: GenerationRequest) -> tuple[str, dict[str, Any]] | None:
    """The field that asks for a form, and the form in the words of `StructuredOutputs`."""
    given: dict[str, Any] = {}
    if request.response_format is not None:
        form = _form_of_response(request.response_format)
        given |= {} if form is None else {"response_format": form}
    if request.structured_outputs is not None:
        fields = {name: value for name, value in request.structured_outputs.items() if name not in _NO_FORMS}
        given["structured_outputs"] = fields
    for name, kind in _FORM_FIELDS.items():
        value = getattr(request, name)
        if value is not None:
            given[name] = {kind: value}
    if len(given) > 1:
        raise RequestError(f"{list(given)[1]}: found a form, expected none beside {next(iter(given))}")
    return next(iter(given.items()), None)


def _form_of_response(response_format: dict[str, Any]) -> dict[str, Any] | None:
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")  # llama.cpp's server has one here
        return {"json_object": True} if schema is None else {"json": closed_where_unsaid(schema)}
    if kind == "structural_tag":
        return {"structural_tag": response_format}
    described = response_format.get("json_schema", response_format if "schema" in response_format else None)
    if kind != "json_schema":
        raise RequestError(
            f"response_format.type: found {found(kind)}, expected text, json_object, json_schema or "
            "structural_tag"
        )
    if not isinstance(described, dict) or not isinstance(described.get("schema", {}), dict | bool):
        raise RequestError(
            f"response_format.json_schema: found {found(described)}, expected an object with a schema"
        )
    return {"json": closed_where_unsaid(described.get("schema", {"type": "object"}))}


def compile_form(llm: LLM, request: GenerationRequest, form: StructuredOutputs) -> None:
    """Compiles a request's form, which is not the engine's thread's business. Raises `RequestError`."""
    asked = _asked_form(request)
    with _naming("tools" if asked is None else asked[0]):
        llm.engine.compile_form(form)


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Says of a form that is refused in which field of the request it is."""
    try:
        yield
    except RequestError as error:
        raise RequestError(re.sub("^structured(?=[.:])", field, str(error))) from None


def _answer_role(request: ChatInput, messages: list[dict[str, Any]]) -> str:
    """Whose words the model writes: the assistant's, or those of the last message that it goes on with."""
    if request.continue_final_message or request.add_generation_prompt is False:
        return str(messages[-1].get("role", "assistant"))
    return "assistant"


def messages_of(llm: LLM, request: ChatInput) -> list[dict[str, Any]]:
    """The messages as templates expect them.

    A developer is a system where the template knows none, and the arguments of tools' calls are objects.
    """
    if not isinstance(request.messages, list) or not request.messages:
        raise RequestError(
            f"messages: found {found(request.messages)}, expected a non-empty list of messages"
        )
    template = llm.tokenizer.chat_template
    knows_developer = template is not None and any("developer" in one for one in template.sources.values())
    messages = []
    for index, message in enumerate(request.messages):
        if not isinstance(message, dict):
            raise RequestError(
                f'messages[{index}]: found {found(message)}, expected {{"role": ..., "content": ...}}'
            )
        message = dict(message)
        if message.get("role") == "developer" and not knows_developer:
            message["role"] = "system"
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        messages.append(message)
    return messages


def _with_object(call: Any) -> Any:
    """A tool's call with its arguments taken from their JSON, where that is an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = parse_json(function["arguments"] or "{}")
    except JsonError:
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def chat_prompt(
    llm: LLM, request: ChatInput, messages: list[dict[str, Any]], most_tokens: int | None = None
) -> tuple[list[int], bool]:
    """The token ids of a conversation, and whether it ends within a thought. most_tokens: as for `LLM`."""
    kwargs = dict(request.chat_template_kwargs or {})
    if request.documents is not None:
        kwargs["documents"] = request.documents
    thinking, effort = request.thinking, request.reasoning_effort
    if effort == "none" and thinking is not True:  # a model without thoughts has none anyway
        effort, thinking = None, None if llm.engine.thoughts is None else False
    messages, tools = tell_tools(llm, messages, request.tools or None, request.chat_template)
    options: dict[str, Any] = {
        "tools": tools,
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": bool(request.continue_final_message),
        "chat_template": request.chat_template,
        "chat_template_kwargs": kwargs,
        "thinking": thinking,
        "reasoning_effort": effort,
        "sanitize_control_tokens": bool(request.sanitize_control_tokens),
    }
    ids = llm.chat_prompt(messages, most_tokens=most_tokens, **options)
    in_thought = llm.opens_thought(messages, ids, options)
    if request.add_special_tokens:
        ids = [*llm.tokenizer.prefix_ids, *ids, *llm.tokenizer.suffix_ids]
    return ids, in_thought


def check_token_ids(llm: LLM, name: str, ids: list[int]) -> None:
    """Raises `RequestError` for an id that the model does not have."""
    vocab_size = llm.engine.spec.vocab_size
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"{name}: found token id {found(token)} at {place}, expected 0 to {vocab_size - 1}"
            )


def _sampling_params(
    llm: LLM, request: GenerationRequest, headers: Headers, max_tokens: int | None, logprobs: int | None,
    given_max_tokens: bool,
) -> tuple[SamplingParams, bool]:  # fmt: skip
    """The parameters of a request, and whether its output is hidden. What is open is as the model has it."""
    given = {name: value for name in _SAME_NAMES if (value := getattr(request, name)) is not None}
    given |= {
        name: value for name, value in headers._asdict().items() if value is not None and name not in given
    }
    defaults: Mapping[str, Any] = llm.engine.generation_defaults
    values: dict[str, Any] = {**defaults, **given, "logprobs": logprobs}
    if given_max_tokens or "max_tokens" not in defaults:
        values["max_tokens"] = max_tokens
    if request.spaces_between_special_tokens and request.skip_special_tokens is False:
        raise RequestError(
            "spaces_between_special_tokens: found true with skip_special_tokens false, expected false: the"
            " tokenizer puts none there"
        )
    hides_output = max_tokens == 0
    if hides_output:
        values["max_tokens"] = 1
    most = values["max_tokens"]
    if most is not None and "min_tokens" not in given and values.get("min_tokens", 0) > most >= 0:
        values["min_tokens"] = most
    if request.thinking_token_budget not in (None, -1):  # -1 is without end
        values["thinking_token_budget"] = request.thinking_token_budget
    bias = _bias(llm, request)
    if bias is not None:
        values["logit_bias"] = bias
    return SamplingParams(**values), hides_output


def _bias(llm: LLM, request: GenerationRequest) -> dict[int, float] | None:
    """What is added to logits: the request's own biases, minus infinity for all but the allowed tokens."""
    bias: dict[int, float] = {}
    for name, value in (request.logit_bias or {}).items():
        try:
            bias[int(name)] = value
        except ValueError:
            raise RequestError(f"logit_bias: found {found(name)}, expected a token id") from None
    if request.allowed_token_ids is not None:
        allowed = set(request.allowed_token_ids)
        if not allowed:
            raise RequestError("allowed_token_ids: found none, expected at least one token id")
        check_token_ids(llm, "allowed_token_ids", request.allowed_token_ids)
        bias |= {token: -math.inf for token in range(llm.engine.spec.vocab_size) if token not in allowed}
    return bias or None


def _most_tokens(llm: LLM, request: GenerationRequest) -> int | None:
    """The tokens that a prompt may have before it is cut; None where it will be."""
    return llm.engine.scheduler.max_len if request.truncate_prompt_tokens is None else None


def _truncated(llm: LLM, request: GenerationRequest, ids: list[int]) -> list[int]:
    """The prompt's last, or first, tokens, where it is asked to be cut; -1 is what the model takes."""
    most = request.truncate_prompt_tokens
    if most is None:
        return ids
    integer("truncate_prompt_tokens", most, -1, None)
    if most == 0:
        raise RequestError("truncate_prompt_tokens: found 0, expected -1 or a positive integer")
    if most == -1:
        most = llm.engine.config.max_model_len
    if len(ids) <= most:
        return ids
    return ids[:most] if request.truncation_side == "right" else ids[-most:]


def _content_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or () if isinstance(part, dict))
