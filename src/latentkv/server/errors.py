"""Errors as OpenAI's clients know them: a status, and a body that says what is wrong with what."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from latentkv.errors import BusyError, EngineStoppedError, LatentKVError, RequestError, TokenizerError

RETRY_SECONDS = 2
REFUSALS = (400, 401, 404, 405, 413, 415, 429, 500, 503, 504)
"""Statuses that any path may answer with."""


def refusals(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the schema of paths whose errors look so."""
    return {status: {"model": body} for status in REFUSALS}


class ApiError(Exception):
    """A refusal.

    Attributes:
        status: of HTTP.
        message: one sentence.
        param: the parameter that it is about.
        code: a short name, stable for programs.
        headers: further ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API writes it."""
        return {
            "error": {"message": self.message, "type": _type_of(self.status), "param": self.param, "code": self.code}
        }


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error. What nobody foresaw is not described to strangers."""
    match error:
        case ApiError():
            return error
        case BusyError():
            return ApiError(429, str(error), code="server_busy", headers={"Retry-After": str(RETRY_SECONDS)})
        case EngineStoppedError():
            return ApiError(503, str(error), code="engine_stopped", headers={"Retry-After": str(RETRY_SECONDS)})
        case RequestError() | TokenizerError():
            return ApiError(400, str(error), param=_named_parameter(str(error)))
        case TimeoutError():
            return ApiError(
                504, "The request took longer than this server allows: ask for fewer tokens.", code="timeout"
            )
        case LatentKVError():
            return ApiError(500, str(error), code="engine_error")
        case _:
            return ApiError(500, "The server failed on this request; its log says why.", code="internal_error")


def anthropic_body(error: BaseException) -> dict[str, Any]:
    """As Anthropic's API writes an error."""
    found = as_api_error(error)
    kind = _ANTHROPIC_TYPES.get(found.status, "api_error" if found.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": found.message}}


def ollama_body(error: BaseException) -> dict[str, Any]:
    """As Ollama writes an error."""
    return {"error": as_api_error(error).message}


def body_for(path: str, error: ApiError) -> dict[str, Any]:
    """An error as the API that a path belongs to writes it."""
    if path.startswith("/v1/messages"):
        return anthropic_body(error)
    return ollama_body(error) if path.startswith("/api/") else error.body


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _type_of(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 404:
            return "not_found_error"
        case 429:
            return "rate_limit_error"
        case status if status >= 500:
            return "server_error"
        case _:
            return "invalid_request_error"


def _named_parameter(message: str) -> str | None:
    """`temperature` of "temperature=-1 is not allowed: ...", the form of all messages about sampling parameters."""
    name, equals, _ = message.partition("=")
    return name if equals and name.isidentifier() else None
