"""`/tokenize`, `/detokenize`, `/tokenizer_info` and the render endpoints: what a text is to the model."""

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pagellm.engine.checks import text
from pagellm.engine.errors import RequestError
from pagellm.engine.llm import LLM
from pagellm.engine.server.answers import token_text
from pagellm.engine.server.completions import headers_of
from pagellm.engine.server.http import json_response, read_body
from pagellm.engine.server.prepare import (
    Prepared,
    chat_prompt,
    check_token_ids,
    messages_of,
    prepare_chat,
    prepare_completion,
)
from pagellm.engine.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    read_request,
)
from pagellm.engine.server.service import Service
from pagellm.engine.server.tools import read_tools


async def tokenize(service: Service, request: Request) -> Response:
    """`POST /tokenize`: a text, or a conversation, as token ids."""
    llm = service.llm
    body = await service.work(read_request, TokenizeRequest, await read_body(request))
    service.check_model(body.model)
    service.note_unknown_fields(body.unknown_fields)
    return await service.work(lambda: json_response(_tokenized(llm, body)))


def _tokenized(llm: LLM, body: TokenizeRequest) -> dict[str, Any]:
    prompt = body.content if body.prompt is None else body.prompt
    if (prompt is None) == (body.messages is None):
        raise RequestError("prompt: found neither it nor messages, or both, expected one of them")
    if prompt is None:
        read_tools(body.tools)  # which chats have checked when they plan for them
        ids, _ = chat_prompt(llm, body, messages_of(llm, body))
    else:
        with_special = body.add_special_tokens is not False
        ids = llm.tokenizer.encode(text("prompt", prompt), add_special_tokens=with_special)
    strings = [token_text(llm.tokenizer, one, False) for one in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": llm.engine.config.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }


async def detokenize(service: Service, request: Request) -> Response:
    """`POST /detokenize`: token ids as text."""
    llm = service.llm
    body = await service.work(read_request, DetokenizeRequest, await read_body(request))
    service.check_model(body.model)
    service.note_unknown_fields(body.unknown_fields)

    def detokenized() -> Response:
        check_token_ids(llm, "tokens", body.tokens)
        said = llm.tokenizer.decode(body.tokens)
        return json_response({"prompt": said, "content": said})

    return await service.work(detokenized)


async def tokenizer_info(service: Service, request: Request) -> Response:
    """`GET /tokenizer_info`: what a client needs to lay out prompts by itself."""
    tokenizer = service.llm.tokenizer

    def said(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.decode([token_id])

    sources = {} if tokenizer.chat_template is None else tokenizer.chat_template.sources
    return json_response(
        {
            "tokenizer_class": "pagellm",
            "bos_token": said(tokenizer.bos_token_id),
            "eos_token": said(tokenizer.eos_token_id),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_ids": tokenizer.eos_token_ids,
            "add_bos_token": tokenizer.add_bos_token,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": service.llm.engine.config.max_model_len,
            "chat_template": sources.get("default"),
        }
    )


async def render_completion(service: Service, request: Request) -> Response:
    """`POST /v1/completions/render`: what would be computed, of each prompt."""
    return json_response(await _rendered(service, request, CompletionRequest, prepare_completion))


async def render_chat(service: Service, request: Request) -> Response:
    """`POST /v1/chat/completions/render`: what would be computed."""
    [rendered] = await _rendered(service, request, ChatCompletionRequest, prepare_chat)
    return json_response(rendered)


async def _rendered(
    service: Service, request: Request, kind: type[Any], prepare: Any
) -> list[dict[str, Any]]:
    llm = service.llm
    body: GenerationRequest = await service.work(read_request, kind, await read_body(request))
    service.check_model(body.model)
    service.note_unknown_fields(body.unknown_fields)
    prepared: Prepared = await service.work(prepare, llm, body, headers_of(request), None)
    name = body.request_id or request.state.request_id
    rendered = []
    for index, entry in enumerate(prepared.entries):
        params = asdict(entry.params) | {"logit_bias": {str(k): v for k, v in entry.params.bias.items()}}
        rendered.append(
            {
                "request_id": name if len(prepared.entries) == 1 else f"{name}-{index}",
                "token_ids": entry.token_ids,
                "features": None,
                "sampling_params": params,
                "model": body.model or service.names[0],
                "stream": bool(body.stream),
                "stream_options": None if body.stream_options is None else body.stream_options.model_dump(),
                "cache_salt": body.cache_salt,
                "priority": entry.params.priority,
                "kv_transfer_params": None,
            }
        )
    return rendered
