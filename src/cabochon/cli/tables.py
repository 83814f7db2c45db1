"""Where tables are printed: plain text, in which no figure is ever cut off."""

from __future__ import annotations

from rich.console import Console

LEAST = 130
"""Columns that a table may take on a narrower terminal too: a line that wraps says more than one that is cut."""


def console(*, stderr: bool = False) -> Console:
    """A console for tables and lines, without colours for numbers and without markup."""
    made = Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False, emoji=False)
    made.width = max(made.width, LEAST)
    return made
