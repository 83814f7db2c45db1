"""One exercise: a conversation up to the point where the model speaks, and what it should say.

Training and scoring share the generators. What keeps them apart is `held_out`: it looks at the content of a case
(operands, names, schema) and never at its wording, so no phrasing trick lets a test case into the training text.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from shown import Shown

JsonDict = dict[str, Any]
Score = Literal["text", "calls", "json", "characters", "box"]


class Spot(NamedTuple):
    """Where in a picture something is (in parts of its sides), and the names of what it is."""

    x: float
    y: float
    names: tuple[str, ...]
    box: tuple[float, ...] = ()
    """Top, left, bottom, right, where they are worth learning."""


@dataclass(frozen=True)
class Case:
    """`messages` end where the model's last reply belongs; earlier assistant messages are trained on as well."""

    task: str
    content: str
    """What the split looks at."""
    messages: list[JsonDict]
    reply: JsonDict
    tools: list[JsonDict] = field(default_factory=list)
    thinking: bool = False
    score: Score = "text"
    choices: int | None = None
    """Among how many answers a guesser would draw, where the question itself names them."""

    shown: list[Shown] = field(default_factory=list)
    """Pictures, clips and sounds; a content part names one by its place here, as bytes (`look`)."""
    spots: list[Spot] = field(default_factory=list)
    """What is where in the picture; the eye learns from it by the side."""
    given: str = ""
    """Beginning of the reply that is put into the model's mouth: what follows is learned, it is not."""
    after_another: bool = False
    """Unrelated exchanges come first; only the last reply is trained on."""

    def record(self) -> JsonDict:
        """One line of a task file, as `cabochon eval` reads it."""
        expect: Any = self.reply.get("content", "")
        if self.score == "calls":
            expect = [
                {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
                for call in self.reply["tool_calls"]
            ]
        elif self.score in ("json", "box"):
            expect = json.loads(expect)
        messages = [self._filed(message) for message in self.messages]
        line: JsonDict = {"task": self.task, "messages": messages, "expect": expect, "score": self.score}
        if self.tools:
            line["tools"] = self.tools
        if self.thinking:
            line["thinking"] = True
        if self.choices:
            line["choices"] = self.choices
        return line

    def _filed(self, message: JsonDict) -> JsonDict:
        """The message with files in data URLs for what it shows."""
        if isinstance(message["content"], str):
            return message
        parts = [
            part if part["type"] == "text" else {"type": part["type"], "url": self.shown[int(part["url"])].data_url()}
            for part in message["content"]
        ]
        return {**message, "content": parts}


Generator = Callable[[random.Random], Case]


def held_out(content: str) -> bool:
    """True for the tenth of all contents that no training case may have."""
    return zlib.crc32(content.encode()) % 10 == 0


def draw(generator: Generator, rng: random.Random, test: bool) -> Case:
    """A case from the training or the test side of the split."""
    while True:
        case = generator(rng)
        if held_out(case.content) == test:
            return case


def user(text: str) -> JsonDict:
    return {"role": "user", "content": text}


def look(shown: Shown, text: str) -> JsonDict:
    """A question about the first thing shown."""
    return {"role": "user", "content": [{"type": shown.kind, "url": b"0"}, {"type": "text", "text": text}]}


def discuss(shown: Shown, exchanges: list[tuple[str, str]]) -> tuple[list[JsonDict], JsonDict]:
    """Questions about the first thing shown with their answers: the messages up to the last answer, and that."""
    (first, answer), *rest = exchanges
    messages, reply = [look(shown, first)], says(answer)
    for question, answer in rest:
        messages += [reply, user(question)]
        reply = says(answer)
    return messages, reply


def system(text: str) -> JsonDict:
    return {"role": "system", "content": text}


def says(text: str, thought: str | None = None) -> JsonDict:
    """The model's reply in words, with the thinking before it."""
    message: JsonDict = {"role": "assistant", "content": text}
    if thought is not None:
        message["reasoning"] = thought
    return message


def calls(*named: tuple[str, JsonDict]) -> JsonDict:
    """The model's reply as tool calls."""
    functions = [
        {"type": "function", "id": f"call_{i}", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(named)
    ]
    return {"role": "assistant", "content": "", "tool_calls": functions}


def result(name: str, value: str, call: int = 0) -> JsonDict:
    """What a tool answered."""
    return {"role": "tool", "name": name, "tool_call_id": f"call_{call}", "content": value}
