"""`cabochon bench gpu`: how near to the GPU's memory limit the network's step runs, by format, batch and context.

The network has random weights in the true shapes, made on the GPU, and a past of random rows; what is timed is the step
alone, launched kernel by kernel and replayed from a CUDA graph, with the GPU's own clock. The limit is measured in the
same run. Every figure is printed when it is there, so a run that is cut short leaves what it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import InputError
from .flag_values import numbers
from .tables import console

if TYPE_CHECKING:
    import torch

    from ..config import ModelConfig

READ = 4 << 30
"""Bytes that are copied to measure the limit: far more than any cache."""
Timer = Callable[[Callable[[], object]], float]
"""Runs something a few times and returns the seconds of the median."""


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement; `moved` is the bytes that the step must read, None where arithmetic is the limit."""

    what: str
    tokens: int
    seconds: float
    moved: int | None

    def floor(self, bandwidth: float) -> float | None:
        """The part of the memory limit that was reached."""
        return None if self.moved is None else self.moved / bandwidth / self.seconds


def gpu(
    models: Annotated[str, typer.Option(help="random:SIZE[?layers=N&media=no], separated by commas.")] = (
        "random:E2B?media=no,random:E4B?media=no,random:26B-A4B?media=no,random:31B?media=no"
    ),
    formats: Annotated[str, typer.Option(help="Formats, separated by commas: bfloat16, int8, int4.")] = "bfloat16,int4",
    batches: Annotated[str, typer.Option(help="Decode batches.")] = "1,8,32,100",
    contexts: Annotated[str, typer.Option(help="Contexts of the decode steps.")] = "1024,32768,131071",
    prefill: Annotated[str, typer.Option(help="Prompt lengths.")] = "4096",
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 20,
) -> None:
    """How near to its limits this GPU comes.

    Tokens per second of prefill and decode, and the part of the measured bandwidth that decode reaches.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError("bench gpu needs a GPU that torch can use, and there is none; bench cpu times the CPU")
    from ..weights.random import open_random

    lengths, seats = numbers(prefill, "--prefill"), numbers(batches, "--batches")
    pasts = numbers(contexts, "--contexts")
    timer = on_the_gpu(repeats)
    limit = copy_bandwidth(timer)
    name, out, found = torch.cuda.get_device_name(), console(), []
    out.print(f"{name}, torch {torch.__version__}, memory {limit / 1e12:.2f} TB/s")
    table = Table("model", "format", "what", "tokens/s", "GB read", "of the floor")
    for model in models.split(","):
        config, _ = open_random(model)
        for format in formats.split(","):
            for step in steps(config, format, lengths, seats, pasts, timer, torch.device("cuda")):
                row = _cells(model, format, step, limit)
                out.print("  ".join(row))
                table.add_row(*row)
                found.append({"model": model, "format": format, "floor": step.floor(limit)} | asdict(step))
    out.print(table)
    print(json.dumps({"device": name, "torch": torch.__version__, "bandwidth": limit, "steps": found}))


def steps(
    config: ModelConfig,
    format: str,
    prefill: list[int],
    batches: list[int],
    contexts: list[int],
    timer: Timer,
    device: torch.device,
) -> Iterator[Step]:
    """Every measurement of one network on `device`, decode also as a recording where that has any."""
    import torch

    from ..engine.graphs import Recorder
    from .bench_shapes import decode_batch, past_bytes, prefill_batch, random_codes, weight_bytes

    with torch.device(device), torch.inference_mode():
        network = random_codes(config, format)
        weights = weight_bytes(network)
        for length in prefill:
            batch = prefill_batch(network, length)
            yield Step(f"prefill {length}", length, timer(partial(network, batch)), None)
        for context, requests in ((c, r) for c in contexts for r in batches):
            past = past_bytes(network, requests, context)
            room = torch.cuda.mem_get_info()[0] if device.type == "cuda" else past
            if context >= config.text.max_position_embeddings or past > room:
                continue
            batch = decode_batch(network, requests, context)
            what, moved = f"decode {requests} at {context}", weights + past
            yield Step(what, requests, timer(partial(network, batch)), moved)
            if device.type == "cuda":
                recorder = Recorder(network.step)
                yield Step(f"{what}, recorded", requests, timer(partial(recorder.run, batch)), moved)


def copy_bandwidth(timer: Timer) -> float:
    """Bytes per second of a copy on the GPU, read and written bytes counted."""
    import torch

    source = torch.empty(READ, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * READ / timer(lambda: target.copy_(source))


def on_the_gpu(repeats: int) -> Timer:
    """Medians of `repeats` runs between two events of the GPU, after three that do not count."""
    import torch

    def timer(run: Callable[[], object]) -> float:
        times: list[float] = []
        for _ in range(repeats + 3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times[3:])[repeats // 2]

    return timer


def _cells(model: str, format: str, step: Step, limit: float) -> list[str]:
    floor = step.floor(limit)
    moved = "" if step.moved is None else f"{step.moved / 1e9:.2f}"
    rate = f"{step.tokens / step.seconds:.1f}"
    return [model, format, step.what, rate, moved, "" if floor is None else f"{floor:.0%}"]
