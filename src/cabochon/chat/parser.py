"""A reply's token ids to events: one state machine for streamed and whole replies.

It works on ids, not on text: a marker is one token, so there is nothing to search for in text, nothing to cut wrongly,
and text that merely spells a marker stays text. It starts in the state in which the renderer left the prompt
(`Prompt.state`). However the ids are cut into pushes, the events say the same.

What is no proper call comes out as text with a warning; nothing but control tokens and a thought's heading is dropped.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from .callstream import ArgumentsStream
from .callsyntax import MalformedCallError, read_call
from .events import ArgumentsDelta, Event, Finish, FinishReason, TextDelta, ThinkingDelta, ToolCallDelta, Usage, Warned
from .messages import ParserState
from .tokenizer import Tokenizer

_HEADING = "thought\n"


def random_call_id(index: int) -> str:
    """An id that no other call of the conversation has."""
    return f"call_{secrets.token_hex(12)}"


class Parser:
    """Reads one reply. `push` its ids as they come, then `finish` once."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        state: ParserState = "start",
        *,
        call_id: Callable[[int], str] = random_call_id,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.stream()
        self._state: Literal["start", "content", "heading", "thought", "call"] = state
        self._call_id = call_id
        self._events: list[Event] = []
        self._held = ""
        """Text that may turn out to be a heading or the line end that closes a thought."""
        self._segments: list[str] = []
        """A call's text so far, cut at the quote tokens."""
        self._arguments = ArgumentsStream()
        self._open_id = ""
        self._warned: set[str] = set()
        self.calls = 0
        """Tool calls so far."""
        self.tokens = 0
        """Tokens so far; those of the thinking with its markers are in `reasoning_tokens` too."""
        self.reasoning_tokens = 0
        self.spoken: list[int] = []
        """Places in the last push of the tokens that the answer's text shows: not those of thoughts, calls, markers."""

    @property
    def thinking(self) -> bool:
        """True inside a thought."""
        return self._state in ("heading", "thought")

    def push(self, token_ids: Iterable[int]) -> list[Event]:
        """Take the next ids; returns what became certain, neighbouring deltas of one kind joined."""
        control = self._tokenizer.control
        self.spoken = []
        for place, token_id in enumerate(token_ids):
            if self._state in ("start", "content") and (token_id not in control or token_id == self._tokenizer.quote):
                self.spoken.append(place)
            self.tokens += 1
            self.reasoning_tokens += self.thinking or token_id == self._tokenizer.channel_open
            if token_id in control:
                self._text(self._detokenizer.flush())
                self._control(token_id)
            else:
                self._text(self._detokenizer.push((token_id,)))
        return self._take()

    def finish(self, reason: FinishReason, *, prompt_tokens: int = 0, cached_tokens: int = 0) -> list[Event]:
        """Release what is still held and end with `Finish`, which counts the tokens.

        A reply that stopped by itself after calling tools is finished by "tool_calls".
        """
        self._text(self._detokenizer.flush())
        if self._state == "call":
            self._end_call(closed=False, cut=reason in ("length", "loop"))
        self._release()
        if reason == "stop" and self.calls:
            reason = "tool_calls"
        usage = Usage(prompt_tokens, self.tokens, self.reasoning_tokens, cached_tokens)
        self._events.append(Finish(reason, usage))
        return self._take()

    # Text -----------------------------------------------------------------------------------------------------------

    def _text(self, text: str) -> None:
        if not text:
            return
        match self._state:
            case "content":
                self._say(text)
            case "thought":
                self._think(text)
            case "call":
                self._segments[-1] += text
                self._argue(self._arguments.text(text))
            case "start" | "heading":
                self._held += text
                if self._state == "heading" and self._held.startswith(_HEADING):
                    rest, self._held, self._state = self._held[len(_HEADING) :], "", "thought"
                    self._think(rest)
                elif not _HEADING.startswith(self._held):
                    self._release()

    def _release(self) -> None:
        """What was held is no marker: it is text, or thinking."""
        held, self._held = self._held, ""
        if self._state == "start":
            self._state = "content"
            self._say(held)
        elif self._state == "heading":
            self._state = "thought"
            if held.strip() not in ("", "thought"):
                self._warn("The reply opened a channel that isn't named 'thought'; it is shown as thinking.")
                self._think(held)
        elif self._state == "thought":
            self._add_thinking(held)

    def _think(self, text: str) -> None:
        """Thinking, all but one line end, which may belong to the closing marker."""
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._add_thinking(text.removesuffix("\n"))

    def _add_thinking(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if text and isinstance(last, ThinkingDelta):
            self._events[-1] = ThinkingDelta(last.text + text)
        elif text:
            self._events.append(ThinkingDelta(text))

    def _say(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if text and isinstance(last, TextDelta):
            self._events[-1] = TextDelta(last.text + text)
        elif text:
            self._events.append(TextDelta(text))

    def _argue(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if text and isinstance(last, ArgumentsDelta) and last.id == self._open_id:
            self._events[-1] = replace(last, text=last.text + text)
        elif text:
            assert self._arguments.name is not None
            self._events.append(ArgumentsDelta(self.calls, self._open_id, self._arguments.name, text))

    def _warn(self, text: str) -> None:
        """Each warning once per reply."""
        if text not in self._warned:
            self._warned.add(text)
            self._events.append(Warned(text))

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # Control tokens -------------------------------------------------------------------------------------------------

    def _control(self, token_id: int) -> None:
        tokens = self._tokenizer
        if self._state == "call":
            if token_id == tokens.quote:
                self._segments.append("")
                self._argue(self._arguments.quote())
                return
            self._end_call(closed=token_id == tokens.tool_call_close)
            if token_id == tokens.tool_call_close:
                return
        if token_id == tokens.channel_close:
            self._close_thought()
        elif token_id == tokens.channel_open:
            self._release()
            self._state = "heading"
        elif token_id == tokens.tool_call_open:
            self._release()
            self._state, self._segments, self._arguments = "call", [""], ArgumentsStream()
            self._open_id = self._call_id(self.calls)
        elif token_id == tokens.quote:
            self._text('"')
        else:
            self._release()
            self._state = "content"
            if token_id not in (tokens.turn_close, tokens.eos, tokens.tool_response_open, tokens.pad):
                self._warn(f"The reply held a stray {tokens.control[token_id]}, which was left out.")

    def _close_thought(self) -> None:
        if self._state == "content":
            self._warn("The reply closed a thought that it had not opened.")
        elif self._state == "start" and self._held != _HEADING:
            self._release()
            self._warn("The reply closed a thought that it had not opened.")
        elif self._state == "heading":
            self._release()
        # At the start a bare heading is an empty thought whose opener is missing; in a thought the line end is ours.
        self._held, self._state = "", "content"

    def _end_call(self, closed: bool, cut: bool = False) -> None:
        """The call is over: by its closing marker, by another marker, or because the reply ended.

        A reply that was `cut` never ends in a call: what looks complete may have been meant to go on.
        """
        segments, self._segments, self._state = self._segments, [], "content"
        try:
            if cut:
                raise MalformedCallError("the reply was cut off inside it")
            call, loose = read_call(segments)
        except MalformedCallError as error:
            self._warn(f"A tool call could not be read ({error}); it is shown as text.")
            spelt = self._tokenizer.control[self._tokenizer.quote].join(segments)
            self._say(f"<|tool_call>{spelt}{'<tool_call|>' if closed else ''}")
            return
        if not closed:
            self._warn(f"The call of {call.name} was not closed, but is complete.")
        if loose:
            self._warn(f"The call of {call.name} lacks quotes around text.")
        self._events.append(ToolCallDelta(self.calls, replace(call, id=self._open_id)))
        self.calls += 1
