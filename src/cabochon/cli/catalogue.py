"""`cabochon models`, `pull`, `list`, `show` and `rm`: which models there are, and which are here."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from .. import hub, modelfile, variants
from ..errors import InputError
from . import inputs
from .tables import console

Name = Annotated[
    str, typer.Argument(help="A short name (E2B), owner/name, owner/name@revision or owner/name/file.gguf.")
]


def models() -> None:
    """The models of the family, and the short names for them."""
    table = _table("name", "repository", "stored", "active", "context", "reads")
    for variant in variants.VARIANTS:
        if variant.role == "it":
            size = variant.size
            counts = (f"{count / 1e9:.1f}B" for count in (size.stored, size.active))
            table.add_row(size.name, variant.name, *counts, f"{size.context // 1024}k", " ".join(size.modalities))
    screen = console()
    screen.print(table)
    screen.print(
        f"\nRepositories are {variants.OWNER}'s. Base models and drafters: E2B-base, E2B-assistant, and so on.\n"
        "random:E2B makes a model of true shape with random weights. No name at all, or pebble: the bundled model."
    )


def pull(model: Name) -> None:
    """Fetch a model into the Hugging Face cache.

    It goes on where an earlier pull stopped.
    """
    err = Console(stderr=True)
    described = TextColumn("{task.description}")
    columns = (described, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    hub.parse(model)  # a wrong name is told before there is a bar
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        bar = progress.add_task(model, total=None)
        path = hub.pull(model, lambda done, total: progress.update(bar, completed=done, total=total))
    print(path)


def list_models() -> None:
    """The models on this machine."""
    table = _table("repository", "revision", "size", "state")
    for found in hub.cached():
        state = "complete" if found.complete else "partial: pull again"
        table.add_row(found.repo, found.revision[:8], _gigabytes(found.size), state)
    for name in modelfile.names():
        recipe = modelfile.made(name)
        table.add_row(name, "", "", f"made from {recipe.base}" if recipe else "gone")
    table.add_row("pebble (bundled)", "", _gigabytes(sum(f.stat().st_size for f in hub.BUNDLED.iterdir())), "complete")
    console().print(table)


def show(
    model: Annotated[str | None, typer.Argument(help="As for pull, or a folder; none: the bundled one.")] = None,
) -> None:
    """What a model on this machine is made of."""
    from ..chat.jinja import describe_template
    from ..config import read_config

    if model is not None and (recipe := modelfile.made(model)) is not None:
        _show_recipe(recipe)
        return
    folder = hub.locate(model)
    if not folder.is_dir():
        raise InputError(f"{folder} is a single file; show reads checkpoint folders.")
    config = read_config(folder)
    text = config.text
    reads = ["text", *(name for name, part in (("image video", config.vision), ("audio", config.audio)) if part)]
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = {
        "folder": folder,
        "kind": config.model_type,
        "layers": f"{len(text.layers)} of width {text.hidden_size}",
        "vocabulary": f"{text.vocab_size:,}",
        "context": f"{text.max_position_embeddings:,}",
        "reads": " ".join(reads),
        "stored": f"{_gigabytes(sum(path.stat().st_size for path in files))}, {config.dtype}",
        "files": " ".join(path.name for path in files),
        "template": describe_template(folder),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console().print(table)


def _show_recipe(recipe: modelfile.Recipe) -> None:
    """What `create` was told; LICENSE texts by their first lines."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("made from", recipe.base)
    rows = [("system", recipe.system)] if recipe.system else []
    rows += [(name, f"{value:g}") for name, value in recipe.parameters.items()]
    rows += [("stop", text) for text in recipe.stop] + list(recipe.messages)
    rows += [("license", text.strip().partition("\n")[0]) for text in recipe.licenses]
    for name, value in rows:
        table.add_row(name, value)
    console().print(table)


def rm(
    model: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Delete a model from the cache, or what `create` made."""
    if not yes:
        if inputs.piped():
            raise InputError(f"rm would delete {model}; confirm with --yes.")
        typer.confirm(f"Delete {model}?", abort=True)
    if modelfile.made(model) is not None:
        modelfile.forget(model)
        print(f"{model} is forgotten; its base stays")
        return
    print(f"{_gigabytes(hub.remove(model))} freed")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table
