"""The application: which path is served by what, errors as JSON, and the document that describes it all."""

import traceback
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from pagellm import __version__
from pagellm.engine.server import completions, responses, tokens
from pagellm.engine.server.access_log import AccessLog
from pagellm.engine.server.errors import ApiError, as_api_error
from pagellm.engine.server.http import ClientGoneError, Door, EventStream, error_response, json_response
from pagellm.engine.server.live import PAGE
from pagellm.engine.server.metrics import CONTENT_TYPE
from pagellm.engine.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from pagellm.engine.server.response_input import ResponseRequest
from pagellm.engine.server.service import AnyEndpoint, Service

_SCHEMA_PLACE = "#/components/schemas/{model}"


def make_app(
    service: Service,
    keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    log: AccessLog | None = None,
) -> Any:
    """The ASGI application of a service behind its door; the model begins to load when it starts.

    keys: those of which clients must send one, as `Authorization: Bearer`; none: everybody is served.
    allowed_origins: whose pages browsers let ask; "*" is all, and nobody's where there is none.
    """
    door = Door(routes(service), service, keys, log)
    if not allowed_origins:
        return door
    return CORSMiddleware(
        door, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"],
        expose_headers=["x-request-id"],
    )  # fmt: skip


def routes(service: Service) -> Any:
    """The application without its door: all paths, for everybody."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="pagellm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url="/openapi.json", redirect_slashes=False,
    )  # fmt: skip
    schemas: dict[str, Any] = {}

    def serve(
        path: str,
        endpoint: AnyEndpoint,
        body: type[Any] | None = None,
        method: str = "GET",
        shown: bool = True,
        media: tuple[str, ...] = ("application/json",),
    ) -> None:
        """Adds a path; one that takes GET takes HEAD, too. media: what it may answer with."""

        async def answer(request: Request) -> Response:
            try:
                response: Response = await endpoint(service, request)
            except ClientGoneError:
                request.state.client_gone = True
                return Response(status_code=499)
            except Exception as error:
                told = as_api_error(error)
                if told.status == 500 and not isinstance(error, ApiError):
                    traceback.print_exception(error)
                return error_response(told)
            return response

        extra: dict[str, Any] = {}
        if "{" in path:
            extra["parameters"] = [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        if body is not None:
            schema = body.model_json_schema(ref_template=_SCHEMA_PLACE)
            schemas.update(schema.pop("$defs", {}))
            schemas[body.__name__] = schema
            place = {"$ref": _SCHEMA_PLACE.format(model=body.__name__)}
            content = {"application/json": {"schema": place}}
            extra["requestBody"] = {"required": True, "content": content}
        answer.__doc__ = endpoint.__doc__
        add = partial(app.add_api_route, path, answer, response_class=Response, openapi_extra=extra)
        responses: dict[int | str, Any] = {
            status: {"description": text, "content": {"application/json": {}}}
            for status, text in _ANSWERS.items()
        }
        responses[200] = {"description": "The answer.", "content": {kind: {} for kind in media}}
        add(methods=[method], include_in_schema=shown, operation_id=endpoint.__name__, responses=responses)
        if method == "GET":
            add(methods=["HEAD"], include_in_schema=False)

    take = partial(serve, method="POST")

    either = "application/json", "text/event-stream"
    for prefix in ("/v1", ""):
        take(
            f"{prefix}/completions", completions.complete, CompletionRequest, shown=bool(prefix), media=either
        )
        take(
            f"{prefix}/chat/completions",
            completions.chat,
            ChatCompletionRequest,
            shown=bool(prefix),
            media=either,
        )
        take(f"{prefix}/responses", responses.respond, ResponseRequest, shown=bool(prefix), media=either)
    take("/v1/completions/render", tokens.render_completion, CompletionRequest)
    take("/v1/chat/completions/render", tokens.render_chat, ChatCompletionRequest)
    serve("/v1/models", _models)
    serve("/v1/models/{model:path}", _model)
    take("/tokenize", tokens.tokenize, TokenizeRequest)
    take("/detokenize", tokens.detokenize, DetokenizeRequest)
    serve("/tokenizer_info", tokens.tokenizer_info)
    serve("/", _page, media=("text/html",))
    serve("/live", _live, media=("text/event-stream",))
    serve("/health", _health, media=())
    serve("/version", _version)
    serve("/load", _load)
    serve("/kv_event_sources", _kv_event_sources)
    serve("/get_server_info", _server_info)
    serve("/metrics", _metrics, media=("text/plain",))
    take("/reset_prefix_cache", _reset_prefix_cache, media=())
    app.add_exception_handler(HTTPException, _refused)
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document: dict[str, Any] = describe()
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return document

    app.openapi = openapi
    return app


# Nothing comes from elsewhere, and nothing goes there.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
    " img-src data:"
)
_ANSWERS: dict[int | str, str] = {
    400: "A field is wrong, or not supported.", 404: "No such path or model.",
    503: "Not ready, or no more.",
}  # fmt: skip


async def _refused(request: Request, error: Any) -> Response:
    """What the router refuses: an unknown path or method."""
    message = error.detail
    if error.status_code == 404:
        message = f"{request.url.path[:200]}: no such path"
    elif error.status_code == 405:
        message = f"{request.method[:20]} {request.url.path[:200]}: the path does not take this method"
    return error_response(ApiError(error.status_code, message, headers=error.headers))


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "pagellm",
        "root": service.names[0],
        "parent": None,
        "max_model_len": service.llm.engine.config.max_model_len,
    }


async def _models(service: Service, request: Request) -> Response:
    """The models that are served."""
    return json_response({"object": "list", "data": [_card(service, name) for name in service.names]})


async def _model(service: Service, request: Request) -> Response:
    """One model that is served."""
    name = request.path_params["model"]
    service.check_model(name)
    return json_response(_card(service, name))


async def _health(service: Service, request: Request) -> Response:
    """Whether requests are served: 200, or 503 before the model is loaded and after the engine's end."""
    _ = service.thread
    return Response(status_code=200)


async def _page(service: Service, request: Request) -> Response:
    """A page that shows the engine live, and has a box to chat in."""
    return Response(PAGE.read_bytes(), headers={"content-security-policy": _POLICY}, media_type="text/html")


async def _live(service: Service, request: Request) -> Response:
    """The engine as it is, twice a second, as a stream of events."""
    _ = service.thread
    feed = service.feed
    if feed is None or request.method == "HEAD":
        return Response(status_code=200)
    return EventStream(feed.watch(), lambda: None)


async def _version(service: Service, request: Request) -> Response:
    """The version of pagellm."""
    return json_response({"version": __version__})


async def _load(service: Service, request: Request) -> Response:
    """How many generation requests are being served."""
    return json_response({"server_load": service.num_serving})


async def _server_info(service: Service, request: Request) -> Response:
    """What routers tell servers apart by, and whether two have the same model cut into the same blocks."""
    config = service.llm.engine.config
    return json_response(
        {
            "model_id": service.names[0],
            "model_path": service.names[0],
            "instance_id": service.instance_id,
            "kv_block_size": config.block_size,
            "max_model_len": config.max_model_len,
            "version": __version__,
        }
    )


async def _kv_event_sources(service: Service, request: Request) -> Response:
    """Where KV events are published, by rank; empty where they are not."""
    return json_response(service.kv_event_sources)


async def _metrics(service: Service, request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(
        await service.work(service.metrics.text), media_type=None, headers={"content-type": CONTENT_TYPE}
    )


async def _reset_prefix_cache(service: Service, request: Request) -> Response:
    """Forgets every cached prefix; requests under way keep theirs."""
    await service.thread.reset_prefix_cache()
    return Response(status_code=200)
