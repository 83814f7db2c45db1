"""How far two trainings lie apart: `python scripts/pebble/spread.py FOLDER OTHER` scores both on the card's tasks.

The table goes to standard output and, as `spread`, into the notes from which the bundled checkpoint's card is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from score import note

from cabochon.evaluate import Line, bundled, evaluate
from cabochon.llm import AsyncLLM


def card(folder: Path) -> list[Line]:
    llm = AsyncLLM(folder)
    try:
        return evaluate(llm, bundled(), withhold=False)
    finally:
        llm.close()


def agree(one: Line, other: Line) -> bool:
    """Each score lies in the other's interval."""
    return one.low <= other.score <= one.high and other.low <= one.score <= other.high


def table(names: tuple[str, str], cards: tuple[list[Line], list[Line]]) -> str:
    """Both scores with their intervals, task by task, in Markdown."""
    lines = [f"| task | {names[0]} | {names[1]} | each in the other's interval |", "|---|--:|--:|:--|"]
    for one, other in zip(*cards, strict=True):
        shown = [f"{line.score:.1%} ({line.low:.1%} to {line.high:.1%})" for line in (one, other)]
        lines.append(f"| {one.task} | {shown[0]} | {shown[1]} | {'yes' if agree(one, other) else 'no'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs=2)
    parser.add_argument("--names", nargs=2, default=("seed 0", "seed 1"), help="heads of the columns")
    options = parser.parse_args()
    one, other = options.folders
    text = table(tuple(options.names), (card(one), card(other)))
    print(text)
    note(spread=text)


if __name__ == "__main__":
    main()
