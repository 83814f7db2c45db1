"""From what was asked for to what the engine may draw, and what is left to check when the reply is there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..chat.constraint import ReplyRules
from ..chat.events import Event, Finish, TextDelta, ToolCallDelta, Warned
from ..chat.grammar import Grammar, Vocabulary
from ..chat.messages import Tool
from ..chat.schema import violations
from ..chat.tokenizer import Tokenizer
from .ask import Ask, Shape


class Afterwards:
    """Looks at what no grammar could hold. What breaks the schema is reported beside the reply, never changed."""

    def __init__(self, tools: Sequence[Tool], beyond: dict[str, list[str]], shape: Shape | None) -> None:
        self._schemas = {tool.name: tool.parameters for tool in tools if tool.name in beyond}
        self._shape = shape
        self._texts: dict[int, str] = {}

    def checked(self, index: int, events: Iterable[Event]) -> list[Event]:
        """`events` of one step of reply `index`, with warnings added where something is amiss."""
        seen: list[Event] = []
        for event in events:
            match event:
                case TextDelta(text) if self._shape is not None:
                    self._texts[index] = self._texts.get(index, "") + text
                case ToolCallDelta(_, call) if call.name in self._schemas:
                    problems = violations(self._schemas[call.name], dict(call.arguments))
                    seen += [Warned(f"The call of {call.name} breaks its schema: {problem}.") for problem in problems]
                case Finish(reason="stop") if self._shape is not None:
                    seen += [Warned(f"The reply breaks its schema: {problem}.") for problem in self._text(index)]
            seen.append(event)
        return seen

    def _text(self, index: int) -> list[str]:
        assert self._shape is not None
        try:
            return violations(self._shape.value, json.loads(self._texts.get(index, "")))
        except (ValueError, RecursionError) as error:
            return [f"it is not JSON ({error})"]


@dataclass(slots=True)
class Constrainer:
    """Makes rules for one tokenizer and width of logits. Safe to use from several threads.

    The vocabulary is prepared on first use, which takes seconds where it is large; `prepare` does it ahead of time.
    """

    tokenizer: Tokenizer
    width: int
    _vocabulary: Vocabulary | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self) -> Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self.tokenizer, self.width)
            return self._vocabulary

    def rules(self, ask: Ask) -> tuple[ReplyRules, Afterwards]:
        """The rules of a chat reply. Raises `RequestError` that names what can't be enforced."""
        content = call = None
        beyond: dict[str, list[str]] = {}
        if ask.callable:
            call, beyond = self.prepare().call(ask.callable)
        if ask.shape is not None and not ask.must_call:
            content = self.shape(ask.shape)
        rules = ReplyRules(
            self.tokenizer,
            self._vocabulary,
            content=content,
            call=call,
            must_call=ask.must_call,
            many_calls=ask.many_calls,
            may_think=_thinks(ask),
            budget=ask.budget,
        )
        return rules, Afterwards(ask.tools, beyond, ask.shape if content and content.unenforced else None)

    def text_rules(self, grammar: Grammar) -> ReplyRules:
        """The rules of a raw continuation that must match `grammar`."""
        return ReplyRules(self.tokenizer, self._vocabulary, content=grammar, may_think=False)

    def shape(self, shape: Shape) -> Grammar:
        """The grammar of the text."""
        vocabulary, value = self.prepare(), shape.value
        match shape.kind:
            case "json_schema":
                schema = _parsed(value) if isinstance(value, str) else value
                return vocabulary.json_schema(schema, strict=shape.strict, field=shape.field)
            case "json_object":
                return vocabulary.json_object(shape.field)
            case "regex":
                return vocabulary.regex(value, shape.field)
            case "grammar":
                return vocabulary.lark(value, shape.field)
            case "choice":
                return vocabulary.choice(value, shape.field)


def _thinks(ask: Ask) -> bool:
    """Whether the model was told to think; if nobody said, the published switch in the system prompt says it."""
    if ask.thinking is not None:
        return ask.thinking
    head = ask.messages[0] if ask.messages[0].role in ("system", "developer") else None
    return head is not None and head.text.lstrip().startswith("<|think|>")


def _parsed(text: str) -> Any:
    """vLLM takes a schema as text, too; what is no JSON is refused as no schema."""
    try:
        return json.loads(text)
    except ValueError:
        return text
