"""What goes out: replies as they come, on a terminal or into a pipe."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

from rich.console import Console
from rich.style import Style

from ..chat.events import Event, Reply, TextDelta, ThinkingDelta, ToolCallDelta, Warned
from ..chat.messages import ToolCall

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

CUT = {
    "length": "The reply is cut: it took as many tokens as it may have (--max-tokens) or as the context has.",
    "loop": "The reply is cut: it repeated itself over and over.",
}
"""What is said about a reply that didn't come to its end."""


class Screen:
    """Prints events. The answer goes to stdout; with `quiet`, all else to stderr, so that a pipe gets the answer."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.aside = self.err if quiet else self.out

    def say(self, text: str) -> None:
        """A line from the program itself."""
        self.aside.print(text, style="dim")

    def plan(self, text: str) -> None:
        """What a model takes and how fast it may be; not where only the answer is wanted."""
        if self.aside is self.out:
            self.aside.print(text, style="dim")

    def complain(self, text: str) -> None:
        """A line about something that went wrong."""
        self.err.print(text, style="yellow")

    def show(self, events: Iterable[Event]) -> Reply:
        """Print a reply while it comes, and return it whole. Ctrl-C ends it early; what has come stays."""
        seen: list[Event] = []
        column: Console | None = None
        for event in _until_interrupted(events):
            seen.append(event)
            match event:
                case ThinkingDelta(text):
                    column = self._piece(column, self.aside, text, "dim italic")
                case TextDelta(text):
                    column = self._piece(column, self.out, text, None)
                case ToolCallDelta(_, call):
                    column = self._end_line(column)
                    self.aside.print(f"→ {spell_call(call)}", style="cyan")
                case Warned(text):
                    column = self._end_line(column)
                    self.complain(text)
        self._end_line(column)
        reply = Reply.of(seen)
        if reply.finish_reason in CUT:
            self.say(CUT[reply.finish_reason])
        return reply

    def _piece(self, column: Console | None, console: Console, text: str, style: str | None) -> Console:
        """One more piece of a stream; thinking and answer don't share a line."""
        if column is not None and (column, self._last_style) != (console, style):
            column.print()
        self._last_style = style
        # Not through the console's own print, which turns tabs into spaces.
        if console.is_terminal:
            text = _printable(text)
            text = Style.parse(style).render(text) if style and not console.no_color else text
        console.file.write(text)
        console.file.flush()
        return console

    _last_style: str | None = None

    @staticmethod
    def _end_line(column: Console | None) -> None:
        if column is not None:
            column.print()


def spell_call(call: ToolCall) -> str:
    """A tool call for people: `name(key=value, ...)`."""
    arguments = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in call.arguments.items())
    return _printable(f"{call.name}({arguments})")


def reply_as_json(reply: Reply) -> dict[str, Any]:
    """A reply for programs."""
    calls = [{"id": call.id, "name": call.name, "arguments": dict(call.arguments)} for call in reply.tool_calls]
    return {
        "text": reply.text,
        "thinking": reply.thinking,
        "tool_calls": calls,
        "finish_reason": reply.finish_reason,
        "usage": asdict(reply.usage),
        "warnings": list(reply.warnings),
    }


def _printable(text: str) -> str:
    """A model must not move the cursor, ring the bell or rename the window: escapes are shown, not sent."""
    return _CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 32 else "\ufffd", text)


def _until_interrupted(events: Iterable[Event]) -> Iterator[Event]:
    """The events up to the first Ctrl-C.

    A handler instead of KeyboardInterrupt, because that would break into a step of the engine and leave it half done. A
    second Ctrl-C does.
    """
    with _ctrl_c() as pressed:
        iterator = iter(events)
        for event in iterator:
            yield event
            if pressed:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
                return


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
