"""Conversations to token ids: Google's chat templates of July 2026 in code.

Not Jinja, for three reasons. Text reaches the model as text, whatever control tokens it spells. The prompt's own shape
is known (which state the parser starts in, up to where the next turn will share ids, what the model wrote itself). And
where the published template fails on reasonable input, this one does what that plainly means; docs/chat.md lists every
difference. Otherwise the ids are equal, id for id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

from ..errors import RequestError
from .callsyntax import Writer, write_call, write_declaration, write_response
from .messages import Conversation, Media, Message, ParserState, Prompt, Text, Tool, read_messages, read_tools
from .tokenizer import Tokenizer

Family = Literal["small", "large"]
"""E2B and E4B (per-layer embeddings); or 12B, 26B-A4B and 31B, whose prompts hold an empty thought if not thinking."""

_THINK_SWITCH = "<|think|>"


class ChatTemplate(Protocol):
    """What renders conversations: `Template`, or `JinjaTemplate` for a checkpoint with a template of its own."""

    def render(
        self,
        messages: Conversation,
        *,
        tools: Iterable[Tool | Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        preserve_thinking: bool = False,
    ) -> Prompt:
        """A conversation as token ids.

        Args:
            thinking: whether the model may think; None means what the system prompt's `<|think|>` says, else no.
            add_generation_prompt: end where the model's next reply starts.
            preserve_thinking: keep the thinking of earlier turns in messages that call tools.

        Raises:
            RequestError: a message or tool that can't be read; `field` names it.
        """


class Template:
    """The published template of one family over one tokenizer. Stateless; safe to share."""

    def __init__(self, tokenizer: Tokenizer, family: Family = "small") -> None:
        self.tokenizer = tokenizer
        self.family = family

    def render(
        self,
        messages: Conversation,
        *,
        tools: Iterable[Tool | Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        preserve_thinking: bool = False,
    ) -> Prompt:
        """See `ChatTemplate.render`."""
        read, thinks, notices = settle_thinking(read_messages(messages), thinking)
        rendering = _Rendering(self.tokenizer, read, read_tools(tools), thinks, preserve_thinking, notices)
        rendering.system()
        for index, message in enumerate(rendering.messages):
            if message.role != "tool":
                rendering.turn(index, message)
        return rendering.prompt(add_generation_prompt, empty_thought=self.family == "large")


def settle_thinking(
    messages: tuple[Message, ...], thinking: bool | None
) -> tuple[tuple[Message, ...], bool, list[str]]:
    """Follow the documented switch: `<|think|>` at the head of a system prompt is taken out and turns thinking on,
    unless the caller said otherwise. Returns the messages, whether to think, and what to tell the caller."""
    head = messages[0] if messages and messages[0].role in ("system", "developer") else None
    first = head.content[0] if head is not None and head.content else None
    if head is None or not isinstance(first, Text) or not first.text.lstrip().startswith(_THINK_SWITCH):
        return messages, bool(thinking), []
    text = Text(first.text.lstrip().removeprefix(_THINK_SWITCH).lstrip())
    messages = (replace(head, content=(text, *head.content[1:])), *messages[1:])
    if thinking is not None:
        return messages, thinking, []
    return messages, True, [f"{_THINK_SWITCH} at the head of the system prompt switched thinking on."]


class _Rendering:
    """One walk over one conversation."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        messages: tuple[Message, ...],
        tools: tuple[Tool, ...],
        thinking: bool,
        preserve_thinking: bool,
        notices: list[str],
    ) -> None:
        self.tokenizer = tokenizer
        self.out = Writer(tokenizer)
        self.tools = tools
        self.thinking = thinking
        self.preserve_thinking = preserve_thinking
        self.notices = notices
        opens = bool(messages) and messages[0].role in ("system", "developer")
        self.opening = messages[0] if opens else None
        self.messages = messages[1:] if opens else messages
        self.last_user = max((i for i, m in enumerate(self.messages) if m.role == "user"), default=-1)
        self.turn_start: int | None = None
        """Tokens up to the first that the current model turn may lose when the user speaks again."""
        self.in_model_turn = False
        self.after: Literal["call", "response"] | None = None
        """What the last message ended with, as far as the generation prompt needs to know."""
        self._check_orphans()

    def _check_orphans(self) -> None:
        """Tool messages that answer no call aren't shown to the model (so the published template has it)."""
        asked = False
        for message in self.messages:
            if message.role != "tool":
                asked = bool(message.tool_calls) and not message.tool_responses
            elif not asked:
                self.notices.append("A tool message that follows no tool call was left out of the prompt.")

    # The system turn ------------------------------------------------------------------------------------------------

    def system(self) -> None:
        """BOS, and the first turn if there is anything to say in it."""
        out = self.out
        out.control(self.tokenizer.bos)
        if not (self.thinking or self.tools or self.opening):
            return
        out.control(self.tokenizer.turn_open)
        out.text("system\n")
        if self.thinking:
            out.control(self.tokenizer.think)
            out.text("\n")
        if self.opening is not None:
            out.text(self._system_text(self.opening))
        for tool in self.tools:
            write_declaration(out, tool)
        out.control(self.tokenizer.turn_close)
        out.text("\n")

    def _system_text(self, message: Message) -> str:
        if any(isinstance(part, Media) for part in message.content):
            raise RequestError(
                f"The {message.role} prompt holds media, but only text is allowed there.", "messages[0].content"
            )
        texts = [part.text.strip() for part in message.content if not isinstance(part, Media)]
        return texts[0] if len(texts) == 1 else "".join(text + " " for text in texts)

    # The other turns ------------------------------------------------------------------------------------------------

    def turn(self, index: int, message: Message) -> None:
        """One message that isn't a tool's, with the tool messages that answer it."""
        out, is_model = self.out, message.role == "assistant"
        if not (is_model and self.in_model_turn):
            out.control(self.tokenizer.turn_open)
            out.text(f"{'model' if is_model else message.role}\n")
            self.turn_start = out.mark() if is_model else None
        if is_model:
            out.begin_written()
        if message.thinking and (index > self.last_user or (self.preserve_thinking and message.tool_calls)):
            self._thought(message.thinking)
        for call in message.tool_calls:
            write_call(out, call)
        answered = self._responses(index, message)
        shown = self._content(message)
        self._close(index, message, answered, shown)
        self.in_model_turn = is_model

    def _thought(self, thinking: str) -> None:
        self.out.control(self.tokenizer.channel_open)
        self.out.text(f"thought\n{thinking}\n")
        self.out.control(self.tokenizer.channel_close)

    def _responses(self, index: int, message: Message) -> bool:
        """The answers to a message's calls, inside the same turn; true if there were any."""
        for name, response in message.tool_responses:
            write_response(self.out, name or "unknown", response)
        if message.tool_responses:
            return True
        answers = self._answers(index) if message.tool_calls else []
        for place, answer in enumerate(answers):
            name = self._answered_name(message, place, answer)
            if answer.tool_responses:
                write_response(self.out, name, answer.tool_responses[0][1])
            else:
                write_response(self.out, name, answer.text)
            for part in answer.content:
                if isinstance(part, Media):
                    self.out.media(part)
        return bool(answers)

    def _answers(self, index: int) -> list[Message]:
        after = index + 1
        while after < len(self.messages) and self.messages[after].role == "tool":
            after += 1
        return list(self.messages[index + 1 : after])

    def _answered_name(self, message: Message, place: int, answer: Message) -> str:
        """By id; without an id by the name it gives, else by its place."""
        calls = message.tool_calls
        if answer.tool_call_id:
            for call in reversed(calls):
                if call.id == answer.tool_call_id:
                    return call.name
            self.notices.append(f"A tool message answers {answer.tool_call_id!r}, which no call before it is named.")
        elif not answer.name and place < len(calls):
            return calls[place].name
        return answer.name or "unknown"

    def _content(self, message: Message) -> bool:
        """Text and media placeholders, each text trimmed; true if that was more than nothing."""
        shown = False
        for part in message.content:
            if isinstance(part, Media):
                self._resume_writing(message)
                self.out.media(part)
                shown = True
            else:
                text = _without_thoughts(part.text) if message.role == "assistant" else part.text.strip()
                if text:
                    self._resume_writing(message)
                    self.out.text(text)
                    shown = True
        return shown

    def _resume_writing(self, message: Message) -> None:
        if message.role == "assistant":
            self.out.begin_written()

    def _close(self, index: int, message: Message, answered: bool, shown: bool) -> None:
        following = next((m.role for m in self.messages[index + 1 :] if m.role != "tool"), None)
        is_model = message.role == "assistant"
        self.after = None
        if message.tool_calls and not answered:
            self.out.control(self.tokenizer.tool_response_open)
            self.out.end_written()
            self.after = "call"
        elif is_model and following == "assistant":
            pass  # the next message goes on in the same turn
        elif answered and not shown and following is None:
            self.out.end_written()
            self.after = "response"
        else:
            if is_model:
                self.out.begin_written()
            self.out.control(self.tokenizer.turn_close)
            self.out.end_written()
            self.out.text("\n")

    # The end --------------------------------------------------------------------------------------------------------

    def prompt(self, add_generation_prompt: bool, empty_thought: bool) -> Prompt:
        """Add what leads into the reply, and gather everything."""
        out, tokenizer = self.out, self.tokenizer
        state: ParserState = "start"
        boundaries = {self.turn_start} if self.after and self.turn_start is not None else set()
        if add_generation_prompt and self.after == "response":
            boundaries.add(out.mark())
            state = "content"
            if self.thinking:
                out.control(tokenizer.channel_open)
                out.text("thought\n")
                state = "thought"
        elif add_generation_prompt and self.after == "call":
            boundaries.add(out.mark())
            state = "content"
        elif add_generation_prompt:
            out.control(tokenizer.turn_open)
            out.text("model\n")
            boundaries.add(out.mark())
            if empty_thought and not self.thinking:
                out.control(tokenizer.channel_open)
                out.text("thought\n")
                out.control(tokenizer.channel_close)
                state = "content"
        out.mark()
        return Prompt(
            tuple(out.ids),
            state,
            tuple(sorted(boundaries)),
            tuple(out.slots),
            tuple(dict.fromkeys(self.notices)),
            tuple(out.written),
        )


def _without_thoughts(text: str) -> str:
    """Assistant text that still carries thoughts in their markers' spelling loses them; the rest is trimmed."""
    return "".join(part.split("<|channel>")[0] for part in text.split("<channel|>")).strip()
