"""`cabochon models`, `pull`, `list`, `show` and `rm`: which models there are, and which are here."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .. import variants


def models() -> None:
    """The models of the family, and the short names for them."""
    table = _table("name", "repository", "stored", "active", "context", "reads")
    for variant in variants.VARIANTS:
        if variant.role == "it":
            size = variant.size
            counts = (f"{count / 1e9:.1f}B" for count in (size.stored, size.active))
            table.add_row(size.name, variant.name, *counts, f"{size.context // 1024}k", " ".join(size.modalities))
    console = _console()
    console.print(table)
    console.print(
        f"\nRepositories are {variants.OWNER}'s. Base models and drafters: E2B-base, E2B-assistant, and so on.\n"
        "random:E2B makes a model of true shape with random weights. No name at all: the bundled model."
    )


def _console() -> Console:
    return Console(soft_wrap=True, markup=False, highlight=False, emoji=False)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table
