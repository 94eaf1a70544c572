"""What a client is told when it cannot be served: an HTTP status and a JSON object of vLLM's form."""

import re
from collections.abc import Mapping
from typing import Any

from pagellm.engine.errors import EngineError, PagellmError, RequestError

_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 405: "MethodNotAllowedError",
    408: "RequestTimeoutError", 413: "RequestTooLargeError", 500: "InternalServerError",
    503: "ServiceUnavailableError", 504: "TimeoutError",
}  # fmt: skip
_FIELD = re.compile(r"(?:request \d+: )?([a-z_]+)(?:[.\[][^:]*)?:")


class ApiError(Exception):
    """An answer that is an error. param: the field of the request that it is about."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


def bad_request(message: str) -> ApiError:
    """A 400 whose message begins with the field that it is about."""
    field = _FIELD.match(message)
    return ApiError(400, message, field[1] if field else None)


def not_ready(message: str) -> ApiError:
    """A 503 that invites to come again."""
    return ApiError(503, message, headers={"retry-after": "1"})


def too_late(seconds: float | None) -> ApiError:
    """A 504 for what took longer than that."""
    return ApiError(504, f"the request took more than {seconds or 0:g} s")


def as_api_error(error: Exception) -> ApiError:
    """The answer to whatever was raised while a request was served."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return bad_request(str(error))
    if isinstance(error, EngineError):
        return not_ready(str(error))
    if isinstance(error, PagellmError):
        return ApiError(500, str(error))
    return ApiError(500, f"internal error: {type(error).__name__}")


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON object that says it."""
    kind = _TYPES.get(error.status, "BadRequestError" if error.status < 500 else "InternalServerError")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.status}}
