"""Errors in the words of each protocol. Every message is one sentence; a fault of ours never shows its insides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AccessError, BusyError, CabochonError, ContextError, InputError, UnknownModelError

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class TooLargeError(InputError):
    """The body is larger than the server takes."""

    status = 413


class DrainingError(CabochonError):
    """The server is finishing what it has and takes nothing new."""

    status = 503


class TooSlowError(CabochonError):
    """The request took longer than the server allows."""

    status = 504


def openai_error(error: Exception) -> dict[str, Any]:
    """OpenAI's error object."""
    status = status_of(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    return {"error": {"message": sentence(error), "type": kind, "param": field_of(error), "code": code_of(error)}}


def anthropic_error(error: Exception) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = _ANTHROPIC_TYPES.get(status_of(error), "api_error")
    field = field_of(error)
    message = sentence(error)
    return {"type": "error", "error": {"type": kind, "message": message, **({"param": field} if field else {})}}


def status_of(error: Exception) -> int:
    return error.status if isinstance(error, CabochonError) else 500


def code_of(error: Exception) -> str | None:
    match error:
        case ContextError():
            return "context_length_exceeded"
        case UnknownModelError():
            return "not_found"
        case AccessError():
            return "invalid_api_key"
        case BusyError():
            return "queue_full"
        case _:
            return None


def field_of(error: Exception) -> str | None:
    return getattr(error, "field", None)


def sentence(error: Exception) -> str:
    if isinstance(error, CabochonError):
        return str(error)
    return "The server met a fault of its own; its log holds the details under this request's id."


def headers_of(error: Exception) -> dict[str, str]:
    """Response headers that an error brings along."""
    match error:
        case BusyError():
            return {"Retry-After": str(max(1, round(error.retry_after)))}
        case DrainingError():
            return {"Retry-After": "5", "Connection": "close"}
        case AccessError():
            return {"WWW-Authenticate": "Bearer"}
        case _:
            return {}


def wire_fault(problems: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """One sentence and the field for what pydantic found wrong in a body; of several, the one deepest in the body."""
    worst = max(problems, key=lambda problem: len(_path(problem["loc"])))
    path = _path(worst["loc"])
    name = _spelt(path)
    message = str(worst["msg"])
    if worst["type"] == "missing":
        return f"{name or 'The body'} is missing.", name
    if worst["type"] == "json_invalid":
        return f"The body is not JSON: {worst.get('ctx', {}).get('error', message)}.", None
    if not path and isinstance(worst.get("input"), bytes):
        return "The body did not come as JSON; send it with the header content-type: application/json.", None
    limits = worst.get("ctx", {})
    if worst["type"] in ("too_short", "too_long"):
        bound = f"at least {limits['min_length']}" if "min_length" in limits else f"at most {limits['max_length']}"
        return f"{name or 'The body'} has {limits['actual_length']} entries, but must have {bound}.", name
    came = _shown(worst.get("input"))
    wanted = message.removeprefix("Input should be ").removeprefix("Input should ")
    if worst["type"] == "model_attributes_type":
        wanted = "an object"
    if wanted == message:
        return f"{name or 'The body'} is {came}: {message[0].lower()}{message[1:]}.", name
    return f"{name or 'The body'} is {came}, but must be {wanted}.", name


def _path(loc: Sequence[Any]) -> list[Any]:
    """The place in the body, without the names of our own classes that unions put in between."""
    kept = list(loc[1:]) if loc and loc[0] in ("body", "query", "path", "header") else list(loc)
    return [part for part in kept if isinstance(part, int) or _is_field(part)]


def _is_field(part: str) -> bool:
    return not (part[:1].isupper() or "[" in part or "-" in part or part in ("str", "int", "float", "bool", "[key]"))


def _spelt(path: Sequence[Any]) -> str | None:
    spelt = ""
    for part in path:
        spelt += f"[{part}]" if isinstance(part, int) else f".{part}" if spelt else str(part)
    return spelt or None


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
