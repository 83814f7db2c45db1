"""Server-sent events that notice when the client has left.

Starlette's own streaming response looks for a disconnect or learns of it at the next send, depending on the protocol
version of the server. A reply that computes for nobody is expensive here, so this one always listens while it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .answers import encode

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def data_event(payload: Any) -> bytes:
    """An event without a name, as OpenAI sends them."""
    return b"data: " + encode(payload) + b"\n\n"


def named_event(name: str, payload: Any) -> bytes:
    return b"event: " + name.encode() + b"\n" + data_event(payload)


class EventStream(Response):
    """Sends `events` as they come, `idle` after every `keep_alive` seconds of silence.

    The first event is awaited before the status line, so that a request which fails at once gets its proper status.
    One task walks through `events` from beginning to end, and their clean-up runs in it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], keep_alive: float, idle: bytes = b": still here\n\n") -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keep_alive = keep_alive
        self._idle = idle
        self._begun = False
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = {
            asyncio.create_task(self._pump(send)),
            asyncio.create_task(self._keep_awake(send)),
            asyncio.create_task(_gone(receive)),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in done:
            task.result()

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events):
            async for event in self._events:
                await self._write(send, event)
        await self._write(send, b"", last=True)

    async def _keep_awake(self, send: Send) -> None:
        while True:
            before = self._sent
            await asyncio.sleep(self._keep_alive)
            if self._sent == before:
                await self._write(send, self._idle)

    async def _write(self, send: Send, body: bytes, *, last: bool = False) -> None:
        self._sent += 1
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body, "more_body": not last})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ClientGoneError(Exception):
    """The client left before its reply was ready; nobody reads what is answered."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves (then `ClientGoneError`)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
