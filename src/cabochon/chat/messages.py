"""The values that conversations are made of. Plain data: no tokens, no tensors, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text in a message's content."""

    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """An image, a video or a sound in a message's content, still as the caller named it."""

    kind: Literal["image", "video", "audio"]
    source: str | bytes
    """A URL (http, https, data, file), a path, or the bytes themselves."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the part asked for: `max_soft_tokens`, `detail`, `fps`, `max_frames`, `format`."""


Part = Text | Media


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool. `arguments` are already parsed."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `Message.of` reads OpenAI-style dicts."""

    role: Role
    content: tuple[Part, ...] = ()
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    tool_responses: tuple[tuple[str, Any], ...] = ()
    """(tool name, response) pairs that an assistant message may carry itself."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    response: Mapping[str, Any] | None = None
    strict: bool = False


# What a reply is made of, in order of arrival -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """A piece of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer."""

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


Event = ThinkingDelta | TextDelta | ToolCallDelta | Warned | Finish


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    text: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = "stop"
    usage: Usage = Usage()
    warnings: tuple[str, ...] = ()


# What the renderer hands on -----------------------------------------------------------------------------------------

ParserState = Literal["start", "thought", "content"]
"""Where the prompt leaves the model: at the start of its turn, inside an open thought, or after a closed one / a tool response."""


@dataclass(frozen=True, slots=True)
class MediaSlot:
    """A media part's place in a prompt: before expansion a single placeholder token, afterwards all its soft tokens."""

    media: Media
    start: int
    """Index of the first token that belongs to the part (its begin marker once expanded)."""
    length: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the model reads it."""

    token_ids: tuple[int, ...]
    state: ParserState = "start"
    boundaries: tuple[int, ...] = ()
    """Token counts up to which the next turn of the same conversation will share ids with this prompt (ascending)."""
    media: tuple[MediaSlot, ...] = ()
    notices: tuple[str, ...] = ()
    """Things the caller should be told once, for example that `<|think|>` in the system prompt switched thinking on."""


Conversation = Sequence[Message | Mapping[str, Any]]
