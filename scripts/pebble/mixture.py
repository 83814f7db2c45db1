"""What training reads: tasks by their shares, rendered by the chat template, the tokens to predict marked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import arithmetic
import knowledge
import reasoning
import scenes
import sounds
import tools
import writing
from case import Case, Generator, JsonDict, Spot, draw
from prose import passage
from shown import Shown

from cabochon.chat.messages import Media
from cabochon.chat.template import Template
from cabochon.config import ModelConfig
from cabochon.engine.request import SoftSpan
from cabochon.media import audio
from cabochon.media.source import Policy
from cabochon.senses import Piece, Senses


@dataclass(frozen=True)
class Task:
    generator: Generator
    share: float
    """Of all conversations."""
    split: bool = True
    """False where training and scoring differ by phrasing instead of content."""


TASKS = (
    Task(arithmetic.add, 0.24),
    Task(arithmetic.subtract, 0.12),
    Task(arithmetic.multiply, 0.04),
    Task(arithmetic.add_at_once, 0.03),
    Task(arithmetic.subtract_at_once, 0.02),
    Task(reasoning.sort_numbers, 0.03),
    Task(reasoning.letters, 0.05),
    Task(reasoning.weekday, 0.04),
    Task(reasoning.where_is, 0.05),
    Task(tools.known_tool, 0.12),
    Task(tools.tool_answer, 0.04),
    Task(tools.new_tool, 0.14),
    Task(knowledge.facts, 0.06, split=False),
    Task(knowledge.extract, 0.05),
    Task(knowledge.memory, 0.06),
    Task(knowledge.obey, 0.04),
    Task(knowledge.needle, 0.03),
    Task(knowledge.beyond, 0.04),
    Task(knowledge.greet, 0.015, split=False),
)
SENSED = (
    Task(scenes.lone, 0.2),
    Task(scenes.several, 0.22),
    Task(scenes.patchwork, 0.1),
    Task(scenes.moving, 0.06),
    Task(scenes.chart, 0.1),
    Task(writing.read, 0.18),
    Task(sounds.hear, 0.18, split=False),
)
"""Shares of the exercises that show something; the sounds' split was made when they were."""
PROSE = 0.02
"""Pieces of prose for each conversation."""
AFTER_ANOTHER = 0.45
"""How often a case without tools follows another one in the same conversation, and that one yet another."""
IDLE_TOOLS = 0.06
"""How often tools are declared that the case does not need."""
UNNEEDED_THOUGHT = 0.25
"""How often a task that needs no thinking is asked with thinking on."""


def conversation(rng: random.Random) -> Case:
    """A case to train on; often after unrelated exchanges, now and then with tools at hand that it does not need."""
    case = _single(rng)
    if case.tools or case.messages[0]["role"] == "system":
        return case
    earlier: list[JsonDict] = []
    while rng.random() < AFTER_ANOTHER and len(earlier) < 16:
        before = _single(rng)
        if not before.tools and before.messages[0]["role"] == "user" and before.task != "needle":
            answered = {key: value for key, value in before.reply.items() if key != "reasoning"}
            earlier += [*before.messages, answered]
    case = replace(case, messages=[*earlier, *case.messages], after_another=bool(earlier))
    if rng.random() < IDLE_TOOLS:
        case = replace(case, tools=rng.sample(tools.KNOWN, rng.randrange(1, 3)))
    return case


def _single(rng: random.Random) -> Case:
    task = rng.choices(TASKS, weights=[task.share for task in TASKS])[0]
    return draw(task.generator, rng, test=False) if task.split else task.generator(rng)


def plain_text(rng: random.Random, generator: Generator) -> str:
    """Roughly what the template makes of a case, without control tokens, for the tokenizer to learn from."""
    case = generator(rng)
    parts = ["system\n"] if case.tools or case.thinking else []
    for tool in case.tools:
        spec = tool["function"]
        keys = ",".join(
            f"{key}:{{description:{what.get('description', '')},type:{what['type'].upper()}"
            for key, what in spec["parameters"]["properties"].items()
        )
        parts.append(
            f"declaration:{spec['name']}{{description:{spec['description']},parameters:{{properties:{{{keys}}},"
            f"required:[{','.join(spec['parameters']['required'])}],type:OBJECT}}}}"
        )
    for message in [*case.messages, case.reply]:
        role = {"assistant": "model", "tool": "response:value:"}.get(message["role"], message["role"])
        parts.append(f"{role}\n{message['content']}")
        if "reasoning" in message:
            parts.append(f"thought\n{message['reasoning']}\n")
        for call in message.get("tool_calls", ()):
            arguments = ",".join(f"{k}:{v}" for k, v in call["function"]["arguments"].items())
            parts.append(f"call:{call['function']['name']}{{{arguments}}}")
    return "\n".join(parts)


class Document(NamedTuple):
    """Token ids, for each whether it should be predicted, the runs of soft tokens among them, and what they show."""

    ids: list[int]
    marks: list[bool]
    spans: tuple[SoftSpan, ...] = ()
    spots: tuple[Spot, ...] = ()
    """In the first of the spans."""


class Exhibits(Senses):
    """Takes what an exercise shows from its arrays, without files in between."""

    def __init__(self, config: ModelConfig, template: Template) -> None:
        super().__init__(config, template.tokenizer, Policy())
        self.shown: list[Shown] = []

    def perceive(self, media: Media, defaults: Any) -> list[Piece]:
        data = self.shown[int(media.source)].data
        if media.kind == "image":
            return [self._picture("image", data)]
        if media.kind == "video":
            return [self._picture("video", frame, f"00:{i:02}") for i, frame in enumerate(data)]
        frames = data if data.ndim == 2 else audio.log_mel(data)
        return [Piece("audio", -(-len(frames) // 4), frames)]


def documents(
    template: Template, seed: int, exhibits: Exhibits | None = None, sensed: float = 0.0
) -> Iterator[Document]:
    """An endless stream of conversations and prose; `sensed` of them show something."""
    rng = random.Random(seed)
    while True:
        if rng.random() < sensed:
            task = rng.choices(SENSED, weights=[task.share for task in SENSED])[0]
            case = draw(task.generator, rng, test=False) if task.split else task.generator(rng)
            yield document(case, template, exhibits=exhibits)
        elif rng.random() < PROSE:
            ids = [template.tokenizer.bos, *template.tokenizer.encode(passage(rng, 900))]
            yield Document(ids, [False] + [True] * (len(ids) - 1))
        else:
            yield document(conversation(rng), template, rng.random() < UNNEEDED_THOUGHT)


def document(case: Case, template: Template, idle_thought: bool = False, exhibits: Exhibits | None = None) -> Document:
    """A conversation with the model's own tokens marked: its turns without the tools' responses.

    With thinking on, only the last turn counts: the thoughts of earlier turns are gone from the history, and a turn
    without its thought would teach the model not to think. The same goes for exchanges that only come before.
    """
    thinking, reply = case.thinking, case.reply
    if idle_thought and not thinking and case.task not in ("add", "subtract"):
        thinking, reply = True, {**reply, "reasoning": "No steps needed."}
    prompt = template.render([*case.messages, reply], tools=case.tools, thinking=thinking, add_generation_prompt=False)
    spans: tuple[SoftSpan, ...] = ()
    if exhibits is not None and case.shown:
        exhibits.shown = case.shown
        prompt, spans = exhibits.expand(prompt)
    ids = list(prompt.token_ids)
    marks = _mark(ids, template, last_only=thinking or case.after_another)
    end = max(i for i, mark in enumerate(marks) if mark) + 1
    if case.given:
        start = max(i for i in range(end) if not marks[i]) + 1
        given = len(template.tokenizer.encode(case.given))
        marks[start : start + given] = [False] * given
    return Document(ids[:end], marks[:end], spans, tuple(case.spots))


def _mark(ids: list[int], template: Template, last_only: bool) -> list[bool]:
    t = template.tokenizer
    opening = [t.turn_open, *t.encode("model\n")]
    starts = [i + len(opening) for i in range(len(ids)) if ids[i : i + len(opening)] == opening]
    marks = [False] * len(ids)
    for start in starts[-1:] if last_only else starts:
        counts = True
        for i in range(start, len(ids)):
            marks[i] = counts
            if ids[i] == t.turn_close:
                break
            if ids[i] == t.tool_response_open:
                counts = False
            elif ids[i] == t.tool_response_close:
                counts = True
    return marks
