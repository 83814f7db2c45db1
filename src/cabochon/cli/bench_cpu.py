"""`cabochon bench cpu`: how near to this machine's limits the network runs, by format, batch and context.

Weights are random codes in the true shapes (they cost as much as real ones, and drawing calm numbers for a whole model
would take longer than timing it), and the past is random rows in shuffled pages: so a context of 32k needs no prefill.
What is timed is the network's step alone; scheduler and sampler are `bench latency`'s business.

Limits are measured anew beside every step, by the same clock, and peers take turns with us: a share or a ratio holds
on a machine with other work, too. Seconds do so only with `--cpu-time`: one thread, and the time that it ran.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import InputError
from ..formats import QUANTIZED
from ..kv.layout import CacheDtype
from ..sizing import Workload, hardware
from ..sizing.hardware import Hardware, Measured
from ..sizing.speed import prefill_seconds, step_seconds
from .flag_values import numbers
from .tables import console

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..model.batch import Batch
    from ..model.gemma4 import Gemma4
    from .measure import Meter
    from .peers import Peer


def cpu(
    model: Annotated[str, typer.Option(help="random:SIZE[?layers=N&media=no]; only the shapes count.")] = (
        "random:E2B?media=no"
    ),
    formats: Annotated[str, typer.Option(help="Formats, separated by commas: bfloat16, int8, int4.")] = "int8,int4",
    prefill: Annotated[str, typer.Option(help="Prompt lengths.")] = "512",
    batches: Annotated[str, typer.Option(help="Decode batches.")] = "1,8",
    contexts: Annotated[str, typer.Option(help="Contexts of the decode steps.")] = "512",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Stored keys and values of global layers: auto or int8.")
    ] = "auto",
    isa: Annotated[str, typer.Option(help="Pretend that this is the best instruction set.")] = "",
    versus: Annotated[
        list[str], typer.Option(help="A peer to time in turns: llama.cpp=PATH/TO/llama-bench, or transformers.")
    ] = [],  # noqa: B006  # typer copies it
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 3,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Time one thread by what it computes, not by the clock on the wall.")
    ] = False,
) -> None:
    """How near to its limits this CPU comes.

    Tokens per second of prefill and decode, beside what the planner predicts from rates measured along with them.
    """
    import torch

    from ..ops import cpu as kernels
    from ..weights.random import open_random
    from .bench_shapes import random_codes
    from .measure import Meter
    from .peers import KINDS, known_peers

    programs = known_peers(versus)
    if unknown := [format for format in formats.split(",") if format not in KINDS]:
        raise InputError(f"--formats has {unknown[0]!r}, but the formats are {', '.join(KINDS)}.")
    stored: dict[str, CacheDtype] = {"auto": "auto", "int8": "int8"}
    if kv_cache_dtype not in stored:
        raise InputError(f"--kv-cache-dtype is {kv_cache_dtype!r}, but must be auto or int8.")
    if isa:
        kernels.use(isa)
    clock = time.thread_time if cpu_time else time.perf_counter
    if cpu_time:
        torch.set_num_threads(1)
    lengths, seats = numbers(prefill, "--prefill"), numbers(batches, "--batches")
    pasts = numbers(contexts, "--contexts")
    config, _ = open_random(model)
    meter = Meter(clock=clock)
    timings = []
    for format in formats.split(","):
        quantization = None if format == "bfloat16" else format
        work = Workload(quantization=quantization, kv_cache_dtype=stored[kv_cache_dtype])
        with tempfile.TemporaryDirectory() as folder:
            peers = list(_peers(programs, config, format, Path(folder), cpu_time))
            network = random_codes(config, format)
            runs = _runs(network, work, lengths, seats, pasts)
            timings += [_timed(run, network, format, repeats, meter, peers) for run in runs]
            del network, peers, runs
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = [timing.row() for timing in timings]
    _show(f"{model}, {kernels.active()}", rows)
    limits = [limit for timing in timings for limit in timing.limits]
    rates = {rate: _middle([getattr(limit, rate) for limit in limits]) for rate in ("bandwidth", "bf16", *QUANTIZED)}
    products = ", ".join(f"{rate} {rates[rate] / 1e9:.0f}" for rate in ("bf16", *QUANTIZED))
    speeds = f"memory {rates['bandwidth'] / 1e9:.1f} GB/s, {products} GOP/s"
    print(f"{speeds}, {torch.get_num_threads()} threads{', by their own time' if cpu_time else ''}")
    result = {"model": model, "isa": kernels.active(), **rates}
    result |= {"threads": torch.get_num_threads(), "cpu_time": cpu_time, "kv_cache_dtype": kv_cache_dtype}
    print(json.dumps(result | {"peak_rss": peak, "rows": rows}))


@dataclass(slots=True)
class Run:
    """A step to be timed: `tokens` are what it is worth."""

    what: str
    tokens: int
    batch: Callable[[], Batch]
    predict: Callable[[Hardware], float]
    """Seconds, by a device's rates."""
    of_peer: Callable[[Peer], float | None]


@dataclass(slots=True)
class Timing:
    format: str
    run: Run
    seconds: list[float] = field(default_factory=list)
    limits: list[Measured] = field(default_factory=list)
    """One for each of our seconds, found just after them."""
    peers: dict[str, list[float]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        seconds = _middle(self.seconds)
        both = zip(self.seconds, self.limits, strict=True)
        reached = _middle([self.run.predict(hardware.as_hardware(limit)) / mine for mine, limit in both])
        rate = self.run.tokens / seconds
        row = {"format": self.format, "what": self.run.what, "tokens_per_second": rate}
        row |= {"predicted": rate / reached, "reached": reached}
        for name, theirs in self.peers.items():
            middle = _middle(theirs)
            row |= {name: self.run.tokens / middle, f"times_{name}": middle / seconds}
        return row


def _peers(
    programs: dict[str, Path | None], config: ModelConfig, format: str, folder: Path, cpu_time: bool
) -> Iterator[Peer]:
    from .peers import LlamaCpp, Transformers

    for program in programs.values():
        yield LlamaCpp(program, config, format, folder, cpu_time) if program else Transformers(config, cpu_time)


def _runs(
    network: Gemma4, work: Workload, lengths: list[int], batches: list[int], contexts: list[int]
) -> Iterator[Run]:
    for length in lengths:
        yield _prefill(network, work, length)
    for context in contexts:
        for requests in batches:
            yield _decode(network, replace(work, context=context), requests)


def _prefill(network: Gemma4, work: Workload, length: int) -> Run:
    from .bench_shapes import prefill_batch

    return Run(
        f"prefill {length}",
        length,
        partial(prefill_batch, network, length),
        lambda machine: prefill_seconds(network.config, work, machine, 1, length),
        lambda peer: peer.prefill(length),
    )


def _decode(network: Gemma4, work: Workload, requests: int) -> Run:
    from .bench_shapes import decode_batch

    return Run(
        f"decode {requests} at {work.context}",
        requests,
        partial(decode_batch, network, requests, work.context, work.kv_cache_dtype),
        lambda machine: step_seconds(network.config, work, machine, requests, 1),
        lambda peer: peer.decode(requests, work.context),
    )


def _timed(run: Run, network: Gemma4, format: str, repeats: int, meter: Meter, peers: list[Peer]) -> Timing:
    """All sides in turns; our first step, which touches everything once, does not count."""
    import torch

    timing, batch = Timing(format, run), run.batch()
    with torch.inference_mode():
        network(batch)
        for _ in range(repeats):
            begin = meter.clock()
            network(batch)
            timing.seconds.append(meter.clock() - begin)
            timing.limits.append(meter.now())
            for peer in peers:
                if (theirs := run.of_peer(peer)) is not None:
                    timing.peers.setdefault(peer.name, []).append(theirs)
    return timing


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(key.removeprefix("times_") for row in rows for key in row if key.startswith("times_")))
    table = Table("format", "what", "tokens/s", "predicted", "reached", *names, title=title)
    for row in rows:
        rates = (f"{row[key]:.1f}" for key in ("tokens_per_second", "predicted"))
        ratios = (f"{row[name]:.1f} ({row['times_' + name]:.2f}x)" if name in row else "" for name in names)
        table.add_row(row["format"], row["what"], *rates, f"{row['reached']:.0%}", *ratios)
    console().print(table)


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
