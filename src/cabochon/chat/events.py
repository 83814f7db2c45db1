"""What a reply is made of, in order of arrival, and the whole reply. Plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .messages import Message, Text, ToolCall


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """A piece of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """A piece of the JSON text of a call's arguments, before the call is finished.

    The pieces of a call that its `ToolCallDelta` follows join to its arguments; a call that was cut or can't be read
    has none, and its pieces count for nothing.
    """

    index: int
    id: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A finished tool call; `index` counts the calls of this reply from 0."""

    index: int
    call: ToolCall


@dataclass(frozen=True, slots=True)
class Warned:
    """Something in the reply was not as it should be (a call that can't be parsed comes as text besides)."""

    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted. `reasoning_tokens` are part of `completion_tokens`, `cached_tokens` of `prompt_tokens`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0


FinishReason = Literal["stop", "length", "tool_calls", "abort", "loop", "error"]


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a reply; nothing follows."""

    reason: FinishReason
    usage: Usage = Usage()
    stop: str | None = None
    """The stop string that ended it, where one did."""


Event = ThinkingDelta | TextDelta | ArgumentsDelta | ToolCallDelta | Warned | Finish


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    text: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = "stop"
    usage: Usage = Usage()
    warnings: tuple[str, ...] = ()

    @staticmethod
    def of(events: Iterable[Event]) -> Reply:
        """Gather a stream of events."""
        text, thinking, calls, warnings = [], [], [], []
        finish = Finish("stop")
        for event in events:
            match event:
                case TextDelta(piece):
                    text.append(piece)
                case ThinkingDelta(piece):
                    thinking.append(piece)
                case ToolCallDelta(_, call):
                    calls.append(call)
                case Warned(piece):
                    warnings.append(piece)
                case Finish():
                    finish = event
        joined = "".join(thinking) if thinking else None
        return Reply("".join(text), joined, tuple(calls), finish.reason, finish.usage, tuple(warnings))

    def message(self) -> Message:
        """This reply as the assistant message of the conversation that goes on."""
        content = (Text(self.text),) if self.text else ()
        return Message("assistant", content, thinking=self.thinking, tool_calls=self.tool_calls)
