"""Write the task files that `cabochon eval` scores: `python scripts/pebble/heldout.py`.

Every case lies on the test side of the split (see `case.held_out`), is different from all others, and is drawn with a
fixed seed, so they only change when a generator does.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass

import arithmetic
import knowledge
import pictures
import reasoning
import sounds
import tools
import writing
from case import Case, Generator, draw

from cabochon.evaluate import BUNDLED_TASKS, SHOWING_TASKS


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
SENSES = (
    Entry("shapes and colours", pictures.name_it, 300),
    Entry("unseen pairs", pictures.unseen_pair, 200, split=False),
    Entry("count", pictures.count, 200),
    Entry("box", pictures.box, 200),
    Entry("motion", pictures.motion, 60),
    Entry("read", writing.read_unseen, 200),
    Entry("chart", writing.chart, 200),
    Entry("spoken digits", sounds.hear_unseen_digits, 200),
    Entry("commands", sounds.hear_unseen_command, 120),
    Entry("digits, another synthesiser", sounds.hear_flite, 100),
)
"""Exercises that show something; typefaces and voices are unseen as well."""


def cases(entry: Entry, count: int | None = None) -> list[Case]:
    """Different held-out cases of one task, as many as asked for or as there are."""
    rng = random.Random(f"held out: {entry.name}")
    found: dict[str, Case] = {}
    for _ in range(50 * (count or entry.count)):
        case = draw(entry.generator, rng, test=True) if entry.split else entry.generator(rng)
        found.setdefault(_identity(case, entry), case)
        if len(found) == (count or entry.count):
            break
    return list(found.values())


def _identity(case: Case, entry: Entry) -> str:
    """Facts differ by phrasing; the same words in another voice are another exercise."""
    heard = any(shown.kind == "audio" for shown in case.shown)
    more = repr(case.messages) if entry.name == "facts" else str(case.shown[0].data.sum()) if heard else ""
    return case.content + more


def main() -> None:
    for suite, path in ((SUITE, BUNDLED_TASKS), (SENSES, SHOWING_TASKS)):
        lines = []
        for entry in suite:
            drawn = cases(entry)
            print(f"{entry.name}: {len(drawn)}")
            lines += [json.dumps({**case.record(), "task": entry.name}, ensure_ascii=False) for case in drawn]
        with gzip.GzipFile(path, "wb", mtime=0) as file:
            file.write(("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
