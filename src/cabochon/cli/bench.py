"""`cabochon bench`: what the engine does per second, on any model name including `random:...`.

Prompts are random ids and replies end at their length, so that every run does the same work. A table first, then one
JSON line on stdout.
"""

from __future__ import annotations

import json
import random
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .bench_cpu import cpu
from .bench_gpu import gpu
from .bench_serve import serve, step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine.engine import Engine
    from ..llm import LLM
    from .baseline import Transformers

app = typer.Typer(name="bench", help="Measure: tables, then one JSON line.", no_args_is_help=True)
app.command("cpu")(cpu)
app.command("gpu")(gpu)
app.command("serve")(serve)

Model = Annotated[str | None, typer.Argument(help="As for chat; also random:E2B?layers=10. None: the bundled model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or auto.")]
Batched = Annotated[int, typer.Option("--max-num-batched-tokens", min=1, help="Tokens per step.")]
Seqs = Annotated[int, typer.Option("--max-num-seqs", min=1, help="Replies at once.")]
Drafter = Annotated[str | None, typer.Option(help="Guess tokens ahead with this checkpoint; auto, ngram.")]
Quantization = Annotated[str | None, typer.Option(help="int8 or int4: round matrices while loading.")]
Cache = Annotated[str, typer.Option("--kv-cache-dtype", help="auto, fp8 or int8.")]


def _known(baseline: str | None) -> str | None:
    if baseline not in (None, "transformers"):
        raise InputError(f"--baseline is {baseline!r}, but the only one is transformers.")
    return baseline


Baseline = Annotated[str | None, typer.Option(help="transformers: time it as well, in the same run.", callback=_known)]


@app.command()
def latency(
    model: Model = None,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of the reply.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; the median counts.")] = 3,
    baseline: Baseline = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_num_batched_tokens: Batched = 2048,
    kv_cache_dtype: Cache = "auto",
    quantization: Quantization = None,
    drafter: Drafter = None,
) -> None:
    """How long a prompt takes, and each token after it."""
    engine = {"max_num_batched_tokens": max_num_batched_tokens, "kv_cache_dtype": kv_cache_dtype}
    speed = {"quantization": quantization, "drafter": drafter}
    llm = _load(model, device, dtype, input_len + output_len, batch, **engine, **speed)
    every = [_timed(llm.front.engine, _prompts(llm, batch, input_len, seed), output_len) for seed in range(repeats + 1)]
    runs = sorted(every[1:], key=lambda run: run["total"])  # the first one touched everything
    middle = runs[len(runs) // 2]
    result = {
        "bench": "latency",
        "model": llm.front.name,
        "input_len": input_len,
        "output_len": output_len,
        "batch": batch,
        "prefill_s": middle["first"],
        "prefill_tokens_per_s": batch * input_len / middle["first"],
        "per_token_s": (middle["total"] - middle["first"]) / max(1, output_len - 1),
        "decode_tokens_per_s": batch * (output_len - 1) / max(1e-9, middle["total"] - middle["first"]),
        "total_s": middle["total"],
        **_shares(llm.front.engine),
    }
    if baseline:
        theirs = _transformers(model, llm).together(_prompts(llm, batch, input_len, 1), output_len)
        result |= {"baseline_total_s": theirs, "times_baseline": theirs / middle["total"]}
    _print(result)


@app.command()
def throughput(
    model: Model = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests, all there from the beginning.")] = 32,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of each reply.")] = 64,
    baseline: Baseline = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_num_seqs: Seqs = 32,
    max_num_batched_tokens: Batched = 2048,
    kv_cache_dtype: Cache = "auto",
    quantization: Quantization = None,
    drafter: Drafter = None,
) -> None:
    """Tokens per second of a batch that is there as a whole."""
    engine = {"max_num_batched_tokens": max_num_batched_tokens, "kv_cache_dtype": kv_cache_dtype}
    speed = {"quantization": quantization, "drafter": drafter}
    llm = _load(model, device, dtype, input_len + output_len, max_num_seqs, **engine, **speed)
    _timed(llm.front.engine, _prompts(llm, 1, 8, 0), 2)
    run = _timed(llm.front.engine, _prompts(llm, num_prompts, input_len, 1), output_len)
    result = {
        "bench": "throughput",
        "model": llm.front.name,
        "num_prompts": num_prompts,
        "input_len": input_len,
        "output_len": output_len,
        "total_s": run["total"],
        "requests_per_s": num_prompts / run["total"],
        "output_tokens_per_s": num_prompts * output_len / run["total"],
        "total_tokens_per_s": num_prompts * (input_len + output_len) / run["total"],
        **_shares(llm.front.engine),
    }
    if baseline:
        theirs = _transformers(model, llm).together(_prompts(llm, num_prompts, input_len, 1), output_len)
        result |= {"baseline_total_s": theirs, "times_baseline": theirs / run["total"]}
    _print(result)


@app.command("serve-sim")
def serve_sim(
    model: Model = None,
    rate: Annotated[float, typer.Option(min=1e-3, help="Requests per second, arriving at random (Poisson).")] = 4.0,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 32,
    input_len: Annotated[
        int, typer.Option(min=1, help="Mean tokens of a prompt (half to one and a half of it).")
    ] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Mean tokens of a reply.")] = 64,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    baseline: Baseline = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_num_seqs: Seqs = 64,
    max_num_batched_tokens: Batched = 2048,
    kv_cache_dtype: Cache = "auto",
) -> None:
    """How requests that arrive over time are served.

    Time to the first token, time between tokens, and what gets through.
    """
    options = {"max_num_batched_tokens": max_num_batched_tokens, "kv_cache_dtype": kv_cache_dtype}
    llm = _load(model, device, dtype, 2 * (input_len + output_len), max_num_seqs, **options)
    engine = llm.front.engine
    _timed(engine, _prompts(llm, 1, 8, 0), 2)
    draw = random.Random(seed)
    arrivals, now = [], 0.0
    for i in range(num_prompts):
        now += draw.expovariate(rate)
        (prompt,) = _prompts(llm, 1, draw.randint(input_len // 2 or 1, input_len * 3 // 2), seed + i)
        arrivals.append((now, prompt, draw.randint(output_len // 2 or 1, output_len * 3 // 2)))
    first, gaps, seconds = _simulate(engine, arrivals)
    result = {
        "bench": "serve-sim",
        "model": llm.front.name,
        "rate": rate,
        "num_prompts": num_prompts,
        "total_s": seconds,
        "output_tokens_per_s": sum(length for _, _, length in arrivals) / seconds,
        **{f"first_token_p{q}_s": _percentile(first, q) for q in (50, 90, 99)},
        **{f"between_tokens_p{q}_s": _percentile(gaps, q) for q in (50, 90, 99)},
        "preemptions": engine.stats.preemptions,
        **_shares(engine),
    }
    if baseline:
        first, theirs = _transformers(model, llm).in_turn(arrivals)
        result |= {"baseline_total_s": theirs, "times_baseline": theirs / seconds}
        result |= {f"baseline_first_token_p{q}_s": _percentile(first, q) for q in (50, 90, 99)}
    _print(result)


# Work -----------------------------------------------------------------------------------------------------------------


def _load(model: str | None, device: str, dtype: str, context: int, seqs: int, **options: Any) -> LLM:
    from ..llm import LLM

    return LLM(
        model,
        device=device,
        dtype=dtype,
        max_model_len=context,
        max_num_seqs=seqs,
        enable_prefix_caching=False,
        **options,
    )


def _prompts(llm: LLM, count: int, length: int, seed: int) -> list[list[int]]:
    """Random ids, control tokens (all below 256 in this family) left out."""
    draw, vocab = random.Random(seed), llm.front.config.text.vocab_size
    return [[draw.randrange(min(256, vocab // 2), vocab) for _ in range(length)] for _ in range(count)]


def _add(engine: Engine, name: str, prompt: Sequence[int], length: int) -> None:
    from ..engine.request import Request, SamplingParams

    params = SamplingParams(temperature=1.0, top_k=64, top_p=0.95, max_tokens=length, seed=1, ignore_eos=True)
    engine.add(Request(name, prompt, params))


def _timed(engine: Engine, prompts: list[list[int]], length: int) -> dict[str, float]:
    """Seconds until every request had its first token, and in all."""
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        _add(engine, str(i), prompt, length)
    waiting, first = set(map(str, range(len(prompts)))), 0.0
    while engine.busy:
        for output in step(engine):
            waiting.discard(output.request_id)
        if not waiting and not first:
            first = time.perf_counter() - begin
    return {"first": first, "total": time.perf_counter() - begin}


def _simulate(engine: Engine, arrivals: list[tuple[float, list[int], int]]) -> tuple[list[float], list[float], float]:
    """Play arrivals (second, prompt, reply length) in real time: times to the first token, between tokens, in all."""
    begin, sent = time.perf_counter(), 0
    last: dict[str, float] = {}
    first, gaps = [], []
    while engine.busy or sent < len(arrivals):
        now = time.perf_counter() - begin
        while sent < len(arrivals) and arrivals[sent][0] <= now:
            _add(engine, str(sent), arrivals[sent][1], arrivals[sent][2])
            sent += 1
        if not engine.busy:
            time.sleep(max(0.0, arrivals[sent][0] - now))
            continue
        for output in step(engine):
            now = time.perf_counter() - begin
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
            else:
                first.append(now - arrivals[int(output.request_id)][0])
            last[output.request_id] = now
    return first, gaps, time.perf_counter() - begin


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0


def _shares(engine: Engine) -> dict[str, float]:
    """Milliseconds per step in scheduling and batching, in the network, in sampling and bookkeeping, in guessing."""
    stats = engine.stats
    steps = max(1, stats.steps)
    guessing = {
        "drafter_ms_per_step": 1e3 * stats.draft_seconds / steps,
        "guesses_per_step": stats.drafted / steps,
        "accepted_per_step": stats.accepted / steps,
    }
    return {
        "host_ms_per_step": 1e3 * stats.host_seconds / steps,
        "model_ms_per_step": 1e3 * stats.model_seconds / steps,
        "sampler_ms_per_step": 1e3 * stats.sampler_seconds / steps,
        **(guessing if engine.speculator is not None else {}),
    }


def _transformers(model: str | None, llm: LLM) -> Transformers:
    from .baseline import Transformers

    return Transformers(model, llm)


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    from .tables import console

    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console(stderr=True).print(table)
    print(json.dumps(result))
