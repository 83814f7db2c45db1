"""What stands before every request: its id, the keys, the size of its body, the drain, one line in the log.

Plain ASGI instead of Starlette's middleware classes, which put a queue between a stream and its client. The log holds
no prompt text.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import AccessError
from .faults import DrainingError, TooLargeError, anthropic_error, headers_of, openai_error, status_of
from .options import MIB, ServerOptions

log = logging.getLogger("cabochon.server")

UNANSWERED = 499
"""What proxies write down for a client that left before it was answered."""
_OPEN = {"/", "/health", "/ping", "/ready", "/load", "/version", "/metrics", "/docs", "/openapi.json", "/favicon.ico"}
_IDENTITY = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class Traffic:
    """What the guard counts: requests by route and status. `draining` closes the door to new work."""

    answered: dict[tuple[str, int], int] = field(default_factory=dict)
    inside: int = 0
    """Requests that came in and are not answered to the end yet."""
    draining: bool = False

    def count(self, route: str, status: int) -> None:
        self.answered[route, status] = self.answered.get((route, status), 0) + 1


class Guard:
    """Wraps the application; see the module's head."""

    def __init__(self, app: ASGIApp, options: ServerOptions, traffic: Traffic) -> None:
        self._app = app
        self._options = options
        self._traffic = traffic
        self._keys = [hashlib.sha256(key.encode()).digest() for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        identity = given if _IDENTITY.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = identity
        started = time.perf_counter()
        status = UNANSWERED

        async def send_with_identity(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])["x-request-id"] = identity
                MutableHeaders(raw=message["headers"])["x-content-type-options"] = "nosniff"
            await send(message)

        self._traffic.inside += 1
        try:
            fault = self._refusal(scope, headers)
            if fault is not None:
                await _refuse(fault, scope, send_with_identity)
            else:
                await self._app(scope, self._bounded(receive), send_with_identity)
        except Exception as error:
            log.error("%s failed", identity, exc_info=error)
            if status != UNANSWERED:
                raise  # in the midst of an answer: all that can be done is to cut the connection
            await _refuse(error, scope, send_with_identity)
        finally:
            taken = (time.perf_counter() - started) * 1e3
            self._traffic.inside -= 1
            self._traffic.count(_route(scope), status)
            log.info("%s %s %d %.1f ms %s", scope["method"], scope["path"], status, taken, identity)

    def _refusal(self, scope: Scope, headers: Headers) -> Exception | None:
        path = scope["path"]
        closed = path not in _OPEN and not path.startswith("/static/")
        if closed and self._keys and scope["method"] != "OPTIONS" and not self._known(headers):
            return AccessError(
                "The API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key'."
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._options.max_body_bytes:
            return _too_large(int(length), self._options.max_body_bytes)
        if self._traffic.draining and scope["method"] == "POST":
            return DrainingError("The server is shutting down and takes no new requests; try again in a few seconds.")
        return None

    def _known(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode()).digest()
        # Every key is compared, so that time tells nothing about which one came close.
        return any([hmac.compare_digest(digest, key) for key in self._keys])  # noqa: C419  # a list, so that all keys are compared

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, but a body without a stated length is counted as it comes."""
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._options.max_body_bytes:
                    raise _too_large(taken, self._options.max_body_bytes)
            return message

        return counted


def _too_large(came: int, most: int) -> TooLargeError:
    return TooLargeError(f"The body has {came / MIB:.1f} MiB or more, but {most / MIB:.1f} MiB is the most.")


def _route(scope: Scope) -> str:
    """The route's pattern, so that identities in paths don't become labels."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))


async def _refuse(error: Exception, scope: Scope, send: Send) -> None:
    body = json.dumps(error_body(error, scope["path"])).encode()
    extra = headers_of(error) | {"content-type": "application/json", "content-length": str(len(body))}
    headers = [(name.lower().encode(), value.encode()) for name, value in extra.items()]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(error: Exception, path: str) -> dict[str, Any]:
    """The error in the words of the protocol that the path belongs to."""
    return anthropic_error(error) if path.startswith("/v1/messages") else openai_error(error)
