"""`cabochon verify`: a checkpoint's numbers beside those of `transformers`, layer by layer.

The two networks run one after the other, so that only one is in memory. Both are watched at the same places, the inputs
of the layers' first norms and of the last norm, and every difference is told in logits: what the hidden state after a
layer would give if the network ended there. So layers of different scale can be compared, and a wrong layer shows where
it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .. import hub
from ..errors import InputError
from .tables import console

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..llm.loading import Loaded

TOLERANCE = 1e-3
"""Largest difference of logits that float32 explains, at the depth and width of the real models."""


def verify(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a repository or a short name; none: the bundled one.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Length of the text; unset: a window and a half.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Compare a checkpoint with the transformers library.

    In float32, on the CPU.
    """
    try:
        import transformers
        from transformers.utils import logging as chatter
    except ImportError:
        raise InputError("verify compares with transformers, which isn't installed: pip install transformers") from None
    import torch

    from ..llm.loading import load

    folder = hub.locate(model)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; transformers reads checkpoint folders only.")
    waiting = Console(stderr=True)
    with torch.no_grad():
        with waiting.status("Running ours ..."):
            loaded = load(folder, "cpu", "float32")
            ids = _sample(loaded, tokens)
            ours, logits = _run_ours(loaded, ids)
        kinds = [spec.kind for spec in loaded.config.text.layers]
        lens = loaded.model.language_model
        with waiting.status("Running transformers ..."):
            chatter.disable_progress_bar()  # type: ignore[no-untyped-call]  # its bar would fall into our line
            kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
            reference = kind.from_pretrained(folder, dtype=torch.float32).eval()
            theirs, expected = _run_theirs(reference, ids)
        worst: dict[str, float] = {}
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            place = "embedding" if i == 0 else f"{kinds[i - 1]} layers"
            difference = lens.logits(lens.norm(a)) - lens.logits(lens.norm(b))
            worst[place] = max(worst.get(place, 0.0), float(difference.abs().max()))
    worst["logits"] = float((logits - expected).abs().max())
    same = float((logits.argmax(-1) == expected.argmax(-1)).double().mean())
    _report(folder, len(ids), worst, same, as_json)
    if max(worst.values()) > TOLERANCE:
        raise typer.Exit(1)


def _sample(loaded: Loaded, tokens: int | None) -> list[int]:
    """The same token ids in every run: all over the vocabulary, and more than a window of them."""
    config = loaded.config.text
    windows = [spec.window for spec in config.layers if spec.window]
    length = tokens or 3 * max(windows, default=64) // 2
    length = min(length, config.max_position_embeddings - 1)
    # The network replaces placeholders of media, so they are no text.
    placeholders = {loaded.config.tokens.image, loaded.config.tokens.audio, loaded.config.tokens.video}
    words = [i for i in range(107, config.vocab_size) if i not in placeholders]
    step = 7919  # a prime: the walk through the vocabulary meets everything before it repeats
    return [loaded.config.tokens.bos or 2, *(words[i * step % len(words)] for i in range(length - 1))]


def _run_ours(loaded: Loaded, ids: list[int]) -> tuple[list[Tensor], Tensor]:
    import torch

    from ..llm import LLM

    llm = LLM.of(loaded, max_model_len=len(ids) + 1)
    logits = llm.logits(ids)  # before the watch, which has the layers run op by op
    seen = _watch(loaded.model.language_model)
    llm.logits(ids)
    return [torch.cat(rows) for rows in seen], logits


def _run_theirs(reference: nn.Module, ids: list[int]) -> tuple[list[Tensor], Tensor]:
    import torch

    seen = _watch(reference.get_submodule("model.language_model"))
    logits: Tensor = reference(torch.tensor([ids])).logits[0].float()
    return [torch.cat(rows) for rows in seen], logits


def _watch(text: Any) -> list[list[Tensor]]:
    """Lists that will hold what goes into every layer's first norm and into the last norm.

    The layers' norms are put into boxes: a layer that runs as one call of the kernels would pass a hook by, but takes
    care not to know such modules.
    """
    from torch import nn

    for layer in text.layers:
        layer.input_layernorm = nn.Sequential(layer.input_layernorm)
    seen: list[list[Tensor]] = []
    for norm in (*(layer.input_layernorm for layer in text.layers), text.norm):
        rows: list[Tensor] = []
        seen.append(rows)
        norm.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0].flatten(0, -2).float()))
    return seen


def _report(folder: Path, tokens: int, worst: dict[str, float], same: float, as_json: bool) -> None:
    equal = max(worst.values()) <= TOLERANCE
    if as_json:
        figures = {"tokens": tokens, "largest_difference": worst, "same_best_token": same, "equal": equal}
        print(json.dumps(figures))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("after")
    table.add_column("largest difference, in logits", justify="right")
    for place, difference in worst.items():
        table.add_row(place, f"{difference:.2e}")
    screen = console()
    screen.print(table)
    verdict = "equal within float32's noise" if equal else f"DIFFERENT (more than {TOLERANCE:g})"
    screen.print(f"{folder.name}: {verdict}; the best next token is the same at {same:.1%} of {tokens} places.")
