"""Write the task file that `cabochon eval` scores: `python scripts/pebble/heldout.py`.

Every case lies on the test side of the split (see `case.held_out`), is different from all others, and is drawn with a
fixed seed, so the file only changes when a generator does.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import arithmetic
import knowledge
import reasoning
import tools
from case import Case, Generator, draw

TARGET = Path(__file__).parents[2] / "src" / "cabochon" / "pebble" / "tasks.jsonl.gz"


@dataclass(frozen=True)
class Entry:
    """One line of the card."""

    name: str
    generator: Generator
    count: int = 500
    split: bool = True


SUITE = (
    Entry("add 3 digits", arithmetic.add_three_digits),
    Entry("add", arithmetic.add),
    Entry("subtract", arithmetic.subtract),
    Entry("multiply", arithmetic.multiply),
    Entry("sort", reasoning.sort_numbers),
    Entry("letters", reasoning.letters),
    Entry("weekday", reasoning.weekday),
    Entry("where is it", reasoning.where_is),
    Entry("known tools", tools.known_tool),
    Entry("answer from a tool", tools.tool_answer),
    Entry("unseen schema", tools.new_tool),
    Entry("facts", knowledge.facts_unseen_phrasing, split=False),
    Entry("extract JSON", knowledge.extract),
    Entry("memory", knowledge.memory),
    Entry("system prompt", knowledge.obey),
    Entry("needle", knowledge.needle),
    Entry("needle 2k", knowledge.needle_2k, count=100),
    Entry("outside", knowledge.beyond),
)


def cases(entry: Entry, count: int | None = None) -> list[Case]:
    """Different held-out cases of one task, as many as asked for or as there are."""
    rng = random.Random(f"held out: {entry.name}")
    found: dict[str, Case] = {}
    for _ in range(50 * (count or entry.count)):
        case = draw(entry.generator, rng, test=True) if entry.split else entry.generator(rng)
        found.setdefault(case.content + json.dumps(case.messages) * (entry.name == "facts"), case)
        if len(found) == (count or entry.count):
            break
    return list(found.values())


def main() -> None:
    lines = []
    for entry in SUITE:
        drawn = cases(entry)
        print(f"{entry.name}: {len(drawn)}")
        lines += [json.dumps({**case.record(), "task": entry.name}, ensure_ascii=False) for case in drawn]
    with gzip.GzipFile(TARGET, "wb", mtime=0) as file:
        file.write(("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
