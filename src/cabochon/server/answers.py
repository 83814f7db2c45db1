"""JSON answers, and the identities that they carry."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..chat.tokenizer import Tokenizer
from ..engine.request import TokenLogprob
from .faults import headers_of, status_of
from .guard import error_body


def encode(payload: Any) -> bytes:
    """Compact JSON in UTF-8. What JSON can't say (NaN, lone surrogates) echoes the client's words and is replaced."""
    try:
        text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(payload), ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


def logprob_entries(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """OpenAI's entries, one per token. JSON has no -inf; a token that was impossible has -9999, as with them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        spelt = tokenizer.token_bytes(token_id)
        return {"token": spelt.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(spelt)}

    return [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in one.top]}
        for one in logprobs
    ]


def failure(request: Request, error: Exception) -> Json:
    """An error in the words of the protocol that the request came by."""
    return Json(error_body(error, request.url.path), status_of(error), headers_of(error))


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}" if prefix != "chatcmpl" else f"chatcmpl-{secrets.token_hex(16)}"


def now() -> int:
    return int(time.time())


def request_id(request: Request) -> str:
    return str(request.state.request_id)
