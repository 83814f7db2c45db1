"""Score a model on task files: one JSON object a line, exact answers, and an interval beside every score.

    {"task": "add", "messages": [...], "expect": "632", "score": "text", "thinking": true}

`expect` is what the reply must be. `score` says how the two are compared:

    text      the reply's words, but for space around them
    contains  the words occur in the reply as whole words (for models that answer in sentences)
    characters  one less the share of letters that are wrong, missing or too many (what is read or heard)
    box       [{"box_2d": [top, left, bottom, right], "label": ...}]: the boxes overlap by at least half of their union
    json      the reply parses to the same JSON value
    calls     the tool calls, as [{"name": ..., "arguments": {...}}, ...]

Messages may show pictures, clips and sounds, as data URLs or paths. `tools`, `thinking` and `choices` (among how many
answers a guesser would draw) may be left out. What a guess would score stands beside the result: one of the choices,
or else always the commonest answer of the file. So does what the question alone is worth: the same exercises without
what they show, or without thinking.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .chat.events import Reply
from .chat.messages import Media, Message, read_messages
from .engine.request import SamplingParams
from .errors import ContextError, InputError, RequestError
from .hub import BUNDLED
from .lines import objects, read_text
from .llm import AsyncLLM

BUNDLED_TASKS = BUNDLED / "tasks.jsonl.gz"
SHOWING_TASKS = BUNDLED / "senses.jsonl.gz"
"""Exercises with pictures, clips and sounds, for models that can see and hear."""
AT_ONCE = 64
"""Conversations that run side by side."""
LONGEST_REPLY = 512

_SHAPE = "task, messages and expect"
_FIELDS = {"task", "messages", "expect", "score", "tools", "thinking", "choices"}


@dataclass(frozen=True, slots=True)
class Exercise:
    """One line of a task file."""

    task: str
    messages: Sequence[Mapping[str, Any] | Message]
    expect: Any
    score: str = "text"
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool = False
    choices: int | None = None

    @property
    def shows(self) -> str | None:
        """ "image", "video" or "audio" if the messages show one."""
        return next(
            (part.kind for m in read_messages(self.messages) for part in m.content if isinstance(part, Media)), None
        )

    def without(self) -> Exercise | None:
        """The same without what it shows, or else without thinking; None if it has neither."""
        if self.shows:
            blind = [
                replace(message, content=tuple(part for part in message.content if not isinstance(part, Media)))
                for message in read_messages(self.messages)
            ]
            return replace(self, messages=blind)
        return replace(self, thinking=False) if self.thinking else None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the card. Shares are between 0 and 1."""

    task: str
    n: int
    right: float
    """A sum of credits from 0 to 1; most scores give nothing in between."""
    low: float
    high: float
    """The 95 % interval (Wilson)."""
    chance: float
    withheld: float | None
    """The share right on the same exercises without `what`; None where there was nothing to withhold."""
    what: str | None
    """"image", "video", "audio" or "thinking"."""

    @property
    def score(self) -> float:
        return self.right / self.n

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "score": self.score}


def read_tasks(path: Path) -> list[Exercise]:
    """The exercises of a .jsonl or .jsonl.gz file.

    Raises:
        InputError: the file can't be read, or a line is no exercise; the message names the line.
    """
    text = read_text(path, "task file")
    found = [_exercise(value, where) for where, value in objects(text, path, _FIELDS, _SHAPE)]
    if not found:
        raise InputError(f"The task file {path} has no exercises; each line must be a JSON object.")
    return found


def bundled() -> list[Exercise]:
    """What `--suite pebble` asks."""
    return [*read_tasks(BUNDLED_TASKS), *read_tasks(SHOWING_TASKS)]


def _exercise(value: dict[str, Any], where: str) -> Exercise:
    if not {"task", "messages", "expect"} <= set(value):
        raise InputError(f"{where} must be a JSON object with {_SHAPE}.")
    if value.get("score", "text") not in COMPARE:
        raise InputError(f"{where} has score {value['score']!r}, but must have one of {', '.join(COMPARE)}.")
    exercise = Exercise(**value)
    if exercise.score == "box" and not _boxes(json.dumps(exercise.expect)):
        raise InputError(f'{where} expects no box; score "box" takes [{{"box_2d": [top, left, bottom, right]}}, ...].')
    try:
        read_messages(exercise.messages)
    except RequestError as error:
        raise InputError(f"{where}: {error}") from None
    return exercise


# Comparing --------------------------------------------------------------------------------------------------------


def _same_text(reply: Reply, expect: Any) -> float:
    return not reply.tool_calls and reply.text.strip() == str(expect).strip()


def _contains(reply: Reply, expect: Any) -> float:
    return re.search(rf"(?<!\w){re.escape(str(expect))}(?!\w)", reply.text) is not None


def _characters(reply: Reply, expect: Any) -> float:
    return max(0.0, 1 - edits(reply.text.strip(), str(expect)) / len(str(expect)))


def _same_box(reply: Reply, expect: Any) -> float:
    found, wanted = _boxes(reply.text), [entry["box_2d"] for entry in expect]
    return len(found) == len(wanted) and all(overlap(a, b) >= 0.5 for a, b in zip(found, wanted, strict=True))


def _boxes(text: str) -> list[list[float]]:
    """Those of a reply; none if it is anything else."""
    try:
        boxes = [entry["box_2d"] for entry in json.loads(text)]
        return [[float(v) for v in box] for box in boxes if len(box) == 4]
    except (ValueError, TypeError, KeyError):
        return []


def _same_json(reply: Reply, expect: Any) -> float:
    try:
        return bool(json.loads(reply.text) == expect)
    except ValueError:
        return False


def _same_calls(reply: Reply, expect: Any) -> float:
    return bool([{"name": call.name, "arguments": dict(call.arguments)} for call in reply.tool_calls] == expect)


COMPARE: Mapping[str, Callable[[Reply, Any], float]] = {
    "text": _same_text,
    "contains": _contains,
    "characters": _characters,
    "box": _same_box,
    "json": _same_json,
    "calls": _same_calls,
}


def edits(a: str, b: str) -> int:
    """How many letters must be changed, added or taken away to make one of the other (V. Levenshtein, 1965)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The common area of two boxes [top, left, bottom, right] in parts of their union."""
    common = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - common
    return common / union if union > 0 else 0.0


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share that holds the true one 95 times in 100 (E. B. Wilson, 1927).

    For credits between 0 and 1 it is wider than it need be, as nothing spreads more than all or nothing.
    """
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    reach = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # All right is 1.0 exactly; rounding must not leave the share itself out.
    return min(share, max(0.0, middle - reach)), max(share, min(1.0, middle + reach))


def guess(exercises: Sequence[Exercise]) -> float:
    """What a reply that knows nothing would score."""
    if all(e.choices for e in exercises):
        return sum(1 / (e.choices or 1) for e in exercises) / len(exercises)
    answers = Counter(json.dumps(e.expect, sort_keys=True) for e in exercises)
    most = answers.most_common(1)[0][1]
    return most / len(exercises) if most > 1 else 0.0


# Running ----------------------------------------------------------------------------------------------------------


def evaluate(llm: AsyncLLM, exercises: Sequence[Exercise], *, withhold: bool = True) -> list[Line]:
    """The card, one line per task in order of appearance; greedy, with thinking where the exercise says so.

    With `withhold`, exercises that show something or ask for thinking run a second time without.
    """
    apart = {id(e): bare for e in exercises if withhold and (bare := e.without())}
    earned = credits(llm, [*exercises, *apart.values()])
    plain = dict(zip(apart, earned[len(exercises) :], strict=True))
    tasks: dict[str, list[int]] = {}
    for i, exercise in enumerate(exercises):
        tasks.setdefault(exercise.task, []).append(i)
    return [
        _line(task, [exercises[i] for i in members], [earned[i] for i in members], plain)
        for task, members in tasks.items()
    ]


def credits(llm: AsyncLLM, exercises: Sequence[Exercise]) -> list[float]:
    """What each reply is worth, from 0 to 1; greedy, with thinking where the exercise says so."""
    return asyncio.run(_run(llm, exercises))


def _line(task: str, exercises: list[Exercise], credits: list[float], plain: Mapping[int, float]) -> Line:
    withheld = [plain[id(e)] for e in exercises if id(e) in plain]
    return Line(
        task,
        len(exercises),
        sum(credits),
        *wilson(sum(credits), len(exercises)),
        guess(exercises),
        sum(withheld) / len(withheld) if withheld else None,
        (exercises[0].shows or "thinking") if withheld else None,
    )


async def _run(llm: AsyncLLM, jobs: Iterable[Exercise]) -> list[float]:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(exercise: Exercise) -> float:
        async with room:
            return await _credit(llm, exercise)

    return list(await asyncio.gather(*(one(exercise) for exercise in jobs)))


async def _credit(llm: AsyncLLM, exercise: Exercise) -> float:
    try:
        reply = await llm.chat(
            list(exercise.messages),
            tools=list(exercise.tools) or None,
            thinking=exercise.thinking,
            params=SamplingParams(temperature=0.0, max_tokens=LONGEST_REPLY),
        )
    except ContextError:
        return 0.0  # a model whose context is too short for the exercise does not solve it
    return 0.0 if reply.finish_reason == "length" else float(COMPARE[exercise.score](reply, exercise.expect))


def possible(exercises: Sequence[Exercise], kinds: Collection[str]) -> tuple[list[Exercise], list[str]]:
    """Those that a model can take which sees and hears `kinds` ("image", ...), and the tasks of the others."""
    able = [e for e in exercises if e.shows is None or e.shows in kinds]
    left = set(map(id, exercises)) - set(map(id, able))
    return able, list(dict.fromkeys(e.task for e in exercises if id(e) in left))


def thin(exercises: Sequence[Exercise], most: int) -> list[Exercise]:
    """The first `most` exercises of every task."""
    seen: Counter[str] = Counter()
    kept = []
    for exercise in exercises:
        seen[exercise.task] += 1
        if seen[exercise.task] <= most:
            kept.append(exercise)
    return kept
