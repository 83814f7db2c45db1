"""`cabochon doctor`: is everything here as it should be, and what to do where it isn't."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from . import checks

_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Also look at this model; `pebble` is the one that ships.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time memory and matrix products, for the planner.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Don't ask whether the Hub answers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine (and a model).

    One line each: ok, warning or error. An error makes the exit code 1.
    """
    if measure:
        from ..sizing import hardware
        from .measure import Meter

        hardware.remember(Meter(seconds=1.0).now())
    found = list(checks.machine(offline))
    if model is not None:
        found += checks.model(model)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        _print(found)
    if any(finding.status == "error" for finding in found):
        raise typer.Exit(1)


def _print(found: list[checks.Finding]) -> None:
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    for finding in found:
        console.print(f"{finding.status:8}", style=_STYLES[finding.status], end="")
        console.print(f"{finding.topic:10} {finding.text}")
    console.print("\nThe usual troubles:", style="bold")
    for trouble, remedy in checks.TROUBLES:
        console.print(f"  {trouble:22} {remedy}")
