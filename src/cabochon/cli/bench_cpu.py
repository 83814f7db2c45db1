"""`cabochon bench cpu`: how near to this machine's limits the network runs, by format, batch and context.

Weights are random codes in the true shapes (they cost as much as real ones, and drawing calm numbers for a whole model
would take longer than timing it), and the past is random rows in shuffled pages: so a context of 32k needs no prefill.
What is timed is the network's step alone; scheduler and sampler are `bench latency`'s business.

Limits are measured first, in the same run and by the same clock. On a machine with other work only `--cpu-time` means
anything: one thread, and the time that it ran.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..sizing import Workload, hardware
from ..sizing.speed import prefill_seconds, step_seconds

if TYPE_CHECKING:
    from ..model.batch import Batch
    from ..model.gemma4 import Gemma4


def cpu(
    model: Annotated[str, typer.Option(help="random:SIZE[?layers=N&media=no]; only the shapes count.")] = (
        "random:E2B?media=no"
    ),
    formats: Annotated[str, typer.Option(help="Formats, separated by commas: bfloat16, int8, int4.")] = "int8,int4",
    prefill: Annotated[str, typer.Option(help="Prompt lengths.")] = "512",
    batches: Annotated[str, typer.Option(help="Decode batches.")] = "1,8",
    contexts: Annotated[str, typer.Option(help="Contexts of the decode steps.")] = "512",
    isa: Annotated[str, typer.Option(help="Pretend that this is the best instruction set.")] = "",
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 3,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Time one thread by what it computes, not by the clock on the wall.")
    ] = False,
) -> None:
    """Tokens per second of prefill and decode, beside what the planner predicts from this machine's measured rates."""
    import torch

    from ..ops import cpu as kernels
    from ..weights.random import open_random
    from .bench_shapes import decode_batch, prefill_batch, random_codes
    from .measure import measure

    if isa:
        kernels.use(isa)
    clock = time.thread_time if cpu_time else time.perf_counter
    if cpu_time:
        torch.set_num_threads(1)
    config, _ = open_random(model)
    limits = measure(clock=clock)
    machine = hardware.as_hardware(limits)
    rows = []
    for format in formats.split(","):
        network = random_codes(config, format)
        work = Workload(quantization=None if format == "bfloat16" else format)
        for length in _numbers(prefill):
            seconds = _median(network, prefill_batch(network, length), repeats, clock)
            predicted = prefill_seconds(config, work, machine, 1, length)
            rows.append(_row(format, f"prefill {length}", length / seconds, length / predicted))
        for context in _numbers(contexts):
            for requests in _numbers(batches):
                seconds = _median(network, decode_batch(network, requests, context), repeats, clock)
                predicted = step_seconds(config, replace(work, context=context), machine, requests, 1)
                rows.append(_row(format, f"decode {requests} at {context}", requests / seconds, requests / predicted))
        del network
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    table = Table("format", "what", "tokens/s", "predicted", "reached", title=f"{model}, {kernels.active()}")
    for row in rows:
        rates = (f"{row[key]:.1f}" for key in ("tokens_per_second", "predicted"))
        table.add_row(row["format"], row["what"], *rates, f"{row['reached']:.0%}")
    Console().print(table)
    speeds = f"memory {limits.bandwidth / 1e9:.1f} GB/s, int8 {limits.int8 / 1e9:.0f} GOP/s"
    print(f"{speeds}, {torch.get_num_threads()} threads{', by their own time' if cpu_time else ''}")
    result = {"model": model, "isa": kernels.active(), "bandwidth": limits.bandwidth, "int8": limits.int8}
    result |= {"threads": torch.get_num_threads(), "cpu_time": cpu_time}
    print(json.dumps(result | {"peak_rss": peak, "rows": rows}))


def _row(format: str, what: str, rate: float, predicted: float) -> dict[str, Any]:
    reached = rate / predicted
    return {"format": format, "what": what, "tokens_per_second": rate, "predicted": predicted, "reached": reached}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _median(network: Gemma4, batch: Batch, repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of the median step; the first one, which touches everything once, does not count."""
    import torch

    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            begin = clock()
            network(batch)
            times.append(clock() - begin)
    return sorted(times[1:])[repeats // 2]
