"""`cabochon quantize` and `cabochon inspect`: checkpoints in another form, or looked at without reading them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import hub
from ..calibrate import TOKENS
from ..errors import EngineError, InputError
from .tables import console

if TYPE_CHECKING:
    from torch import Tensor

    from ..quant import QuantTensor
    from ..weights.checkpoint import Checkpoint
    from ..weights.params import Param

FURTHEST = {"int8": 0.05, "gguf:q8_0": 0.05, "ct:fp8": 0.2, "gguf:bf16": 0.01, "gguf:f16": 0.01}
"""Mean KL in nats per token beyond which a written file is taken for broken; 4-bit forms may cost more."""
_FURTHEST_4BIT = 1.0
_PROBES = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # prints",
    "Water boils at 100 degrees Celsius and freezes at",
)


def quantize(
    model: Annotated[str, typer.Argument(help="What to convert: a name, a folder or a .gguf file; a drafter too.")],
    out: Annotated[Path, typer.Argument(help="The new folder, or the new file for gguf:...")],
    format: Annotated[
        str, typer.Option(help="int8, int4; gguf:bf16, gguf:f16, gguf:q8_0, gguf:q4_0; ct:w4a16, ct:fp8.")
    ] = "int4",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTS",
            help="Round int8 or int4 while reading this: a .txt file, a .jsonl file of texts or conversations, or "
            "`pebble` for the exercises in the package.",
        ),
    ] = None,
    calibrate_tokens: Annotated[int, typer.Option(min=1, help="How many tokens of it are read.")] = TOKENS,
) -> None:
    """Write a model in another format.

    It is loaded again, and how far its predictions moved is said.
    """
    from ..formats import QUANTIZED
    from ..llm.loading import open_named
    from ..weights import convert
    from ..weights.params import as_kept, parameters

    found, name = open_named(model)
    err = Console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        kept = as_kept(found.config, format) if format in QUANTIZED else found.config
        bar = progress.add_task(f"writing {out}", total=len(parameters(kept)))

        def tick() -> None:
            progress.advance(bar)

        rounded = None
        if calibrate is not None:
            rounded = _calibrated(found, model, format, calibrate, calibrate_tokens, progress, tick)
        convert.write(found, out, format, Path(name).stem, lambda _: tick(), rounded)
    size = sum(f.stat().st_size for f in ([out] if out.is_file() else out.iterdir()))
    written = f"{out}: {size / 1e9:.3f} GB in {format};"
    if found.config.drafter is not None:
        print(f"{written} not compared: a drafter guesses only along with its model, and no guess changes a reply")
        return
    ids = _probe_ids(found)
    moved = _divergence(_predict(model, ids), _predict(out, ids))
    print(f"{written} mean KL to the original {moved:.2e} nats per token on probe prompts")
    if (towers := convert.towers_beside(out)).is_file() and out.is_file():
        print(f"{towers}: the towers, for images and sound; keep both files in one folder")
    if not moved < FURTHEST.get(format, _FURTHEST_4BIT):
        raise EngineError(
            f"{out} predicts something else than {model} (KL {moved:.2g}); don't use it, and report this."
        )


def _calibrated(
    found: Checkpoint, model: str, format: str, texts: str, tokens: int, progress: Progress, tick: Callable[[], None]
) -> Iterator[tuple[Param, Tensor | QuantTensor]]:
    """The parameters rounded for `texts`; what takes its time begins with the first of them."""
    from ..calibrate.texts import read_samples, sequences
    from ..calibrate.walk import calibrated
    from ..formats import QUANTIZED
    from ..llm import LLM

    if format not in QUANTIZED:
        raise InputError(f"--calibrate is for {' and '.join(QUANTIZED)}, not for {format}; leave one of them out.")
    if found.config.drafter is not None:
        raise InputError("--calibrate is for models; a drafter reads its model's state, and no texts.")
    samples = read_samples(hub.BUNDLED / "tasks.jsonl.gz" if texts == "pebble" else Path(texts))

    def rounded() -> Iterator[tuple[Param, Tensor | QuantTensor]]:
        bar = progress.add_task(f"reading {texts}", total=tokens)
        speaker, seen = lambda: LLM(model, device="cpu"), lambda count: progress.update(bar, completed=count)
        ids = sequences(found, model, samples, tokens, speaker, seen)
        progress.remove_task(bar)
        if (count := sum(map(len, ids))) < tokens:
            progress.console.print(f"{texts} gave {count:,} tokens of the {tokens:,} that calibration would read")
        for weight in calibrated(found, ids, format):
            tick()
            yield weight

    return rounded()


def inspect(
    model: Annotated[str, typer.Argument(help="A name, a folder or a .gguf file.")],
) -> None:
    """Say how a checkpoint is stored and what loading it would do."""
    from ..weights.checkpoint import open_checkpoint
    from ..weights.gguf_source import GGUFSource
    from ..weights.own import OwnSource
    from ..weights.params import own_format
    from ..weights.scheme_source import SchemeSource

    path = hub.locate(model)
    found = open_checkpoint(path)
    text, source = found.config.text, found.source
    towers = [name for name in ("vision", "audio") if getattr(found.config, name) is not None]
    shape = f"{len(text.layers)} layers of {text.hidden_size}, {text.vocab_size:,} tokens"
    reads = f"context {text.max_position_embeddings:,}; {', '.join(['text', *towers])}"
    print(f"{path}\n{found.config.model_type}: {shape}, {reads}")
    table = Table("part", "stored as", "tensors", "bytes", box=None)
    for (part, stored), (count, size) in sorted(_classes(found).items()):
        table.add_row(part, stored, str(count), f"{size:,}")
    console().print(table)
    match source:
        case GGUFSource():
            then = "Q4_0 matrices enter as int4, all others are expanded"
        case OwnSource():
            then = f"matrices enter as {own_format(found.config)}"
        case SchemeSource():
            then = f"{source.scheme.name} is expanded to {found.config.dtype}; --quantization rounds it anew"
        case _:
            then = f"weights enter as {found.config.dtype}"
    speaks = found.tokenizer is not None or (found.folder is not None and (found.folder / "tokenizer.json").is_file())
    print(f"on load: {then}; {'it has a tokenizer' if speaks else 'without a tokenizer it serves token ids only'}")


def _classes(found: Checkpoint) -> dict[tuple[str, str], tuple[int, int]]:
    """(part, stored format) -> tensors and bytes, from headers only."""
    from ..weights.gguf_source import GGUFSource
    from ..weights.own import OwnSource
    from ..weights.params import as_kept, parameters
    from ..weights.safetensors import SafetensorsSource
    from ..weights.scheme_source import SchemeSource

    source = found.source
    sums: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    shapes = source.shapes()
    named: dict[str, Param] = {}
    for param in parameters(as_kept(found.config, None), unused=True):
        if name := next((n for n in (param.hf, *param.also) if n in shapes), None):
            named.setdefault(name, param)
    for name, param in named.items():
        match source:
            case GGUFSource():
                stored = source.formats()[name]
            case OwnSource() if name in source.logical:
                stored = source.format(name)
            case SchemeSource() if name not in source.plain:
                stored = source.scheme.name
            case SafetensorsSource():
                stored = source.entries[name].dtype
            case OwnSource() | SchemeSource():
                stored = source.stored.entries[name].dtype
            case _:
                stored = "?"
        key = (param.part if param.used else "unused", stored)
        sums[key] = (sums[key][0] + 1, sums[key][1] + source.nbytes(name))
    return dict(sums)


def _probe_ids(found: Checkpoint) -> list[list[int]]:
    """Prompts in the checkpoint's own words; ids spread over the vocabulary where it has no tokenizer."""
    from ..llm.loading import tokenizer_of

    tokenizer = tokenizer_of(found, "the model")
    if tokenizer is None:
        return [[(7919 * i + 31 * k) % found.config.text.vocab_size for i in range(48)] for k in range(3)]
    return [[tokenizer.bos, *tokenizer.encode(text)] for text in _PROBES]


def _predict(model: str | Path, ids: list[list[int]]) -> Tensor:
    """Log-probabilities after every token of the probes, in float32."""
    import torch

    from ..llm.loading import load
    from ..model.batch import whole_sequences

    err = Console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task(f"comparing {model}", total=None)
        network = load(
            model, "cpu", "float32", lambda done, total: progress.update(bar, completed=done, total=total)
        ).model
    with torch.inference_mode():
        logits: Tensor = network(whole_sequences([torch.tensor(prompt) for prompt in ids]))
    return logits.log_softmax(-1)


def _divergence(before: Tensor, after: Tensor) -> float:
    return float((before.exp() * (before - after)).sum(-1).mean())
