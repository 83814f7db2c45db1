"""`cabochon plan`: which model, in which format, on what you have, and how fast it could be."""

from __future__ import annotations

import html
import json
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table as RichTable

from .. import hub, variants
from ..config import ModelConfig, read_config
from ..errors import InputError
from ..formats import QUANTIZED
from ..kv.layout import CacheDtype
from ..sizing import Hardware, MemoryPlan, Workload, hardware, ranking, units
from ..sizing import plan as size
from ..sizing.plan import READABLE
from ..sizing.report import Table, comparison, tables
from ..weights.params import own_format
from .tables import console

Quantization = Literal["none", "int8", "int4"]


def plan(
    model: Annotated[str | None, typer.Argument(help="A size (E4B), a folder or a repository; none: rank all.")] = None,
    memory: Annotated[str | None, typer.Option(help="What there is, such as 24GiB.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A device by name, such as h200; none: this machine.")] = None,
    context: Annotated[str, typer.Option(help="Tokens per conversation, such as 32k.")] = "8k",
    users: Annotated[int, typer.Option(min=1, max=100_000, help="Conversations at once.")] = 1,
    images: Annotated[int, typer.Option(min=0, max=10_000, help="Images in each conversation.")] = 0,
    quantization: Annotated[Quantization, typer.Option(help="Format of the matrices.")] = "none",
    kv_cache_dtype: Annotated[CacheDtype, typer.Option(help="Format of the global layers' cache.")] = "auto",
    drafter: Annotated[bool, typer.Option("--drafter", help="With the size's own drafter.")] = False,
    acceptance: Annotated[float, typer.Option(min=0, max=1, help="Share of its drafts that is accepted.")] = 0.6,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Devices that split the model, as other engines can.")] = 1,
    compare: Annotated[bool, typer.Option("--compare", help="Every format of the model side by side.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw memory against context into this PNG file.")] = None,
    to_html: Annotated[Path | None, typer.Option("--html", help="Write the plan as a page.")] = None,
) -> None:
    """Size a model to the byte.

    What it takes, what fits, how fast it could be, and what would help.
    """
    device = hardware.this_machine() if gpu is None else hardware.find(gpu)
    available = None if memory is None else units.parse_bytes(memory)
    work = Workload(
        context=units.parse_tokens(context),
        users=users,
        images=images,
        quantization=None if quantization == "none" else quantization,
        kv_cache_dtype=kv_cache_dtype,
        drafter=drafter,
        acceptance=acceptance,
        ranks=ranks,
    )
    if model is None:
        if plot or to_html:
            raise InputError("--plot and --html draw one model's plan; name the model.")
        _rank(device, work, available, as_json)
        return
    name, asked, kept = _resolve(model)
    stored = own_format(asked) if isinstance(asked, ModelConfig) else None
    work = replace(work, kept=kept, quantization=stored or work.quantization)
    made = size(asked, device, work, available=available, name=name)
    _write(made, asked, plot, to_html)
    others = _formats(asked, name, device, work, available) if compare else []
    if as_json:
        print(json.dumps([p.to_json() for p in others] if compare else made.to_json(), indent=2))
    elif compare:
        _print([comparison(others, f"{name} on {device.name}")])
    else:
        _print(list(tables(made)), f"{made.verdict}\nwhat would help most: {made.advice}\nrates: {device.source}")


def _resolve(model: str) -> tuple[str, str | ModelConfig, frozenset[str]]:
    """(name to print, what the planner takes, matrices that stay int4 as in the file).

    Files, folders and cached repositories are read; nothing is downloaded.
    """
    if (variant := variants.lookup(model)) is not None:
        return variant.name, model, frozenset()
    if model.startswith("random:"):
        from ..weights.random import open_random

        return model, open_random(model)[0], frozenset()
    path = hub.locate(model)
    if (path / "config.json").exists() or not (path.is_file() or any(path.glob("*.gguf"))):
        return model, read_config(path), frozenset()
    from ..weights.checkpoint import open_checkpoint

    opened = open_checkpoint(path)
    return model, opened.config, opened.kept


def _rank(device: Hardware, work: Workload, available: int | None, as_json: bool) -> None:
    ranked = ranking(device, work, available=available)
    if as_json:
        print(json.dumps([made.to_json() for made in ranked], indent=2))
        return
    room = units.gib(available or device.memory)
    if not ranked:
        print(
            f"Nothing fits {work.users} x {units.kilo(work.context)} into {room}; ask for less context or fewer users."
        )
        return
    best = ranked[0]
    why = "the largest that fits" + (
        "" if best.speeds[0].decode < READABLE else f" and writes at {READABLE:.0f} tokens/s or more"
    )
    pick = f"pick: {best.model} in {best.work.quantization or best.work.dtype}, {why}\nrates: {device.source}"
    _print([comparison(ranked, f"What fits into {room} on {device.name}, best first")], pick)


def _formats(
    asked: str | ModelConfig, name: str, device: Hardware, work: Workload, available: int | None
) -> list[MemoryPlan]:
    every = [replace(work, quantization=format) for format in (None, *QUANTIZED)]
    return [size(asked, device, each, available=available, name=name) for each in every]


def _print(parts: list[Table], last: str = "") -> None:
    screen = console()
    for part in parts:
        shown = RichTable(title=part.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for i, heading in enumerate(part.headings):
            shown.add_column(heading, no_wrap=True, justify="left" if i == 0 else "right")
        for row in part.rows:
            shown.add_row(*row)
        screen.print(shown)
        screen.print()
    if last:
        screen.print(last)


def _write(made: MemoryPlan, asked: str | ModelConfig, plot: Path | None, to_html: Path | None) -> None:
    if plot is None and to_html is None:
        return
    from .chart import memory_chart

    picture = memory_chart(made, asked)
    if plot is not None:
        _save(plot, picture)
    if to_html is not None:
        _save(to_html, _page(made, picture).encode())


def _save(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}); name a file in a folder that exists.") from error


def _page(made: MemoryPlan, picture: bytes) -> str:
    """One file without outside references."""
    title = html.escape(f"{made.model} on {made.hardware.name}")
    body = "".join(
        f"<h2>{html.escape(part.title)}</h2><table><tr>"
        + "".join(f"<th>{html.escape(cell)}</th>" for cell in part.headings)
        + "</tr>"
        + "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in part.rows)
        + "</table>"
        for part in tables(made)
    )
    style = "body{font:16px sans-serif;margin:2em auto;max-width:60em}th,td{padding:.2em 1em .2em 0;text-align:left}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{style}</style>"
        f"<h1>{title}</h1><p>{html.escape(made.verdict)}</p><p>What would help most: {html.escape(made.advice)}</p>"
        f'<img alt="Memory against context" src="data:image/png;base64,{b64encode(picture).decode()}">{body}</html>'
    )
