"""Score a model on task files: one JSON object a line, exact answers, and an interval beside every score.

    {"task": "add", "messages": [...], "expect": "632", "score": "text", "thinking": true}

`expect` is what the reply must be. `score` says how the two are compared:

    text      the reply's words, but for space around them
    contains  the words occur in the reply as whole words (for models that answer in sentences)
    json      the reply parses to the same JSON value
    calls     the tool calls, as [{"name": ..., "arguments": {...}}, ...]

`tools`, `thinking` and `choices` (among how many answers a guesser would draw) may be left out. What a guess would
score stands beside the result: one of the choices, or else always the commonest answer of the file.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .chat.messages import Reply
from .engine.request import SamplingParams
from .errors import ContextError, InputError
from .hub import BUNDLED
from .llm import AsyncLLM

BUNDLED_TASKS = BUNDLED / "tasks.jsonl.gz"
AT_ONCE = 64
"""Conversations that run side by side."""
LONGEST_REPLY = 512

_FIELDS = {"task", "messages", "expect", "score", "tools", "thinking", "choices"}


@dataclass(frozen=True, slots=True)
class Exercise:
    """One line of a task file."""

    task: str
    messages: Sequence[Mapping[str, Any]]
    expect: Any
    score: str = "text"
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool = False
    choices: int | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the card. Shares are between 0 and 1."""

    task: str
    n: int
    right: int
    low: float
    high: float
    """The 95 % interval (Wilson)."""
    chance: float
    withheld: float | None
    """The share right on the same exercises with thinking switched off; None where there was none to withhold."""

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
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = text.decode().splitlines()
    except (OSError, EOFError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise InputError(f"The task file {path} can't be read ({error}).") from None
    found = [_read_line(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"The task file {path} has no exercises; each line must be a JSON object.")
    return found


def _read_line(line: str, where: str) -> Exercise:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}).") from None
    if not isinstance(value, dict) or not {"task", "messages", "expect"} <= set(value):
        raise InputError(f"{where} must be a JSON object with task, messages and expect.")
    if strange := sorted(set(value) - _FIELDS):
        raise InputError(f"{where} has the unknown field {strange[0]!r}; known are {', '.join(sorted(_FIELDS))}.")
    if value.get("score", "text") not in COMPARE:
        raise InputError(f"{where} has score {value['score']!r}, but must have one of {', '.join(COMPARE)}.")
    return Exercise(**value)


# Comparing --------------------------------------------------------------------------------------------------------


def _same_text(reply: Reply, expect: Any) -> bool:
    return not reply.tool_calls and reply.text.strip() == str(expect).strip()


def _contains(reply: Reply, expect: Any) -> bool:
    return re.search(rf"(?<!\w){re.escape(str(expect))}(?!\w)", reply.text) is not None


def _same_json(reply: Reply, expect: Any) -> bool:
    try:
        return bool(json.loads(reply.text) == expect)
    except ValueError:
        return False


def _same_calls(reply: Reply, expect: Any) -> bool:
    return bool([{"name": call.name, "arguments": dict(call.arguments)} for call in reply.tool_calls] == expect)


COMPARE: Mapping[str, Callable[[Reply, Any], bool]] = {
    "text": _same_text,
    "contains": _contains,
    "json": _same_json,
    "calls": _same_calls,
}


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share that holds the true one 95 times in 100 (E. B. Wilson, 1927)."""
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    reach = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - reach), min(1.0, middle + reach)


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

    With `withhold`, exercises with thinking run a second time without.
    """
    thinking = [e for e in exercises if e.thinking and withhold]
    right = asyncio.run(_run(llm, [*((e, e.thinking) for e in exercises), *((e, False) for e in thinking)]))
    plain = dict(zip(map(id, thinking), right[len(exercises) :], strict=True))
    tasks: dict[str, list[int]] = {}
    for i, exercise in enumerate(exercises):
        tasks.setdefault(exercise.task, []).append(i)
    return [
        _line(task, [exercises[i] for i in members], [right[i] for i in members], plain)
        for task, members in tasks.items()
    ]


def _line(task: str, exercises: list[Exercise], right: list[bool], plain: Mapping[int, bool]) -> Line:
    withheld = [plain[id(e)] for e in exercises if id(e) in plain]
    return Line(
        task,
        len(exercises),
        sum(right),
        *wilson(sum(right), len(exercises)),
        guess(exercises),
        sum(withheld) / len(withheld) if withheld else None,
    )


async def _run(llm: AsyncLLM, jobs: Iterable[tuple[Exercise, bool]]) -> list[bool]:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(exercise: Exercise, thinking: bool) -> bool:
        async with room:
            return await _is_right(llm, exercise, thinking)

    return list(await asyncio.gather(*(one(exercise, thinking) for exercise, thinking in jobs)))


async def _is_right(llm: AsyncLLM, exercise: Exercise, thinking: bool) -> bool:
    try:
        reply = await llm.chat(
            list(exercise.messages),
            tools=list(exercise.tools) or None,
            thinking=thinking,
            params=SamplingParams(temperature=0.0, max_tokens=LONGEST_REPLY),
        )
    except ContextError:
        return False  # a model whose context is too short for the exercise does not solve it
    return reply.finish_reason != "length" and COMPARE[exercise.score](reply, exercise.expect)


def thin(exercises: Sequence[Exercise], most: int) -> list[Exercise]:
    """The first `most` exercises of every task."""
    seen: Counter[str] = Counter()
    kept = []
    for exercise in exercises:
        seen[exercise.task] += 1
        if seen[exercise.task] <= most:
            kept.append(exercise)
    return kept
