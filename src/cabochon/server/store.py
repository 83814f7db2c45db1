"""Responses that can be fetched, continued and cancelled: in memory, the latest ones only."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..chat.messages import Message
from ..errors import RequestError, UnknownModelError
from .response_writer import ResponseWriter


@dataclass(slots=True)
class Stored:
    """One response with what led to it."""

    writer: ResponseWriter
    items: list[dict[str, Any]]
    """Its input."""
    messages: tuple[Message, ...]
    """The conversation before its output, without instructions."""
    task: asyncio.Task[None] | None = None
    """What still works on it in the background."""

    def conversation(self) -> tuple[Message, ...]:
        """What a following response continues."""
        return (*self.messages, self.writer.message())


class ResponseStore:
    """At most `most` responses; the oldest finished ones make room."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[str, Stored] = OrderedDict()

    def put(self, stored: Stored) -> None:
        self._kept[stored.writer.identity] = stored
        excess = len(self._kept) - self._most
        finished = [name for name, one in self._kept.items() if one.task is None or one.task.done()]
        for name in finished[: max(excess, 0)]:
            del self._kept[name]

    def get(self, identity: str) -> Stored:
        """Raises `UnknownModelError` for one that isn't here (any more)."""
        if identity not in self._kept:
            raise UnknownModelError(f"There is no response {identity!r}; the latest {self._most} are kept in memory.")
        return self._kept[identity]

    def drop(self, identity: str) -> None:
        self.get(identity)
        del self._kept[identity]

    def earlier(self, identity: str | None) -> Sequence[Message]:
        """The conversation up to a response, for the one that continues it."""
        if identity is None:
            return ()
        stored = self.get(identity)
        if stored.writer.status not in ("completed", "incomplete"):
            raise RequestError(
                f"The response {identity!r} is {stored.writer.status}, so nothing can follow it yet.",
                "previous_response_id",
            )
        return stored.conversation()
