"""`cabochon eval`: the card of a model, measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import InputError
from .tables import console

if TYPE_CHECKING:
    from ..evaluate import Line


def eval_models(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a repository or a short name; none: the bundled model.")
    ] = None,
    suite: Annotated[str, typer.Option(help="`pebble`, or a task file (.jsonl, .jsonl.gz).")] = "pebble",
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many exercises of each task.")] = None,
    withhold: Annotated[bool, typer.Option(help="Run the second time.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Score a model on exercises with exact answers.

    The share right with its 95 % interval, and what guessing scores. What exercises show (pictures, clips, sounds) or
    the thinking they ask for is withheld in a second run.
    """
    from .. import evaluate
    from ..llm import AsyncLLM

    exercises = evaluate.bundled() if suite == "pebble" else evaluate.read_tasks(Path(suite))
    if task:
        names = sorted({e.task for e in exercises})
        if strange := [name for name in task if name not in names]:
            raise InputError(f"{suite} has no task {strange[0]!r}; it has {', '.join(names)}.")
        exercises = [e for e in exercises if e.task in task]
    exercises = evaluate.thin(exercises, limit) if limit else exercises
    llm = AsyncLLM(model, device=device, dtype=dtype)
    try:
        exercises, left = evaluate.possible(exercises, llm.front.senses.kinds if llm.front.senses else ())
        if left:
            print(f"Left out, because {llm.name} can't see or hear what they show: {', '.join(left)}.", file=sys.stderr)
        if not exercises:
            raise InputError(f"No exercise of {suite} is left.")
        card = evaluate.evaluate(llm, exercises, withhold=withhold)
    finally:
        llm.close()
    if as_json:
        print(json.dumps({"model": llm.name, "suite": suite, "card": [line.as_dict() for line in card]}, indent=2))
    else:
        _print(card)


def _print(card: list[Line]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task", no_wrap=True)
    for heading in ("right", "95 % interval", "n", "guessing", "withheld"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in card:
        withheld = "" if line.withheld is None else f"{line.withheld:.1%} without {line.what}"
        interval = f"{line.low:.1%} to {line.high:.1%}"
        table.add_row(line.task, f"{line.score:.1%}", interval, str(line.n), f"{line.chance:.1%}", withheld)
    console().print(table)
