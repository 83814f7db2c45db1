"""What every format costs the bundled model: its card in each, and the divergence of next-token distributions.

    python benchmarks/quantised_quality.py [--exercises N] [--formats int4,calibrated:int4] [--write]

Each format is written as `cabochon quantize` writes it, loaded as anybody would load it and scored on the first N
exercises of every task. `--write` puts the table into docs/numerics.md. Divergence is KL(bfloat16 || format) in nats
per token, over prompts and answers of the exercises.

The formats `calibrated:...` are rounded with other exercises: the last hundred of every task that has five hundred,
answered by the model itself. So N is at most 400.

Two formats meet the same exercises, so what counts is which of them each got right: the interval beside a task is that
of the difference of two shares in pairs, (won - lost) / n with variance (won + lost - (won - lost)^2 / n) / n^2.
`float32` has the same weights and finer arithmetic: by what it differs, no format is to blame.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import tempfile
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from cabochon import evaluate
from cabochon.calibrate import TOKENS
from cabochon.calibrate.texts import Sample, sequences
from cabochon.calibrate.walk import calibrated
from cabochon.hub import BUNDLED
from cabochon.llm import LLM, AsyncLLM
from cabochon.llm.loading import Loaded, load
from cabochon.model.batch import Batch, whole_sequences
from cabochon.weights import convert
from cabochon.weights.checkpoint import open_checkpoint

DOC = Path(__file__).parent.parent / "docs" / "numerics.md"
MARKS = ("<!-- quality per format -->", "<!-- end of quality per format -->")
CALIBRATED = "calibrated:"
PLAIN = ("bfloat16", "float32")
FORMATS = (*PLAIN, "int8", "calibrated:int8", "int4", "calibrated:int4", *convert.FORMATS[2:], "nf4")
APART = 400
"""Exercises of a task that may be scored; those behind them calibrate."""


@dataclass(frozen=True)
class Result:
    """One format. Shares are between 0 and 1."""

    format: str
    size: int
    kl: float
    right: int
    n: int
    paired: dict[str, tuple[int, int, int]]
    """Task -> exercises that bfloat16 alone got right, that this format alone got right, exercises."""

    def row(self) -> str:
        low, high = evaluate.wilson(self.right, self.n)
        share = f"{self.right / self.n:.1%} ({low:.1%} to {high:.1%})"
        task, (lost, won, n) = max(self.paired.items(), key=lambda item: item[1][0] - item[1][1])
        middle, reach = (won - lost) / n, 1.96 * math.sqrt(lost + won - (won - lost) ** 2 / n) / n
        points = f"{100 * middle:+.1f} points ({100 * (middle - reach):+.1f} to {100 * (middle + reach):+.1f})"
        worst = f"{task}: {lost} lost, {won} won of {n}, {points}" if lost > won else "none"
        return f"| `{self.format}` | {self.size / 1e6:.1f} | {self.kl:.1e} | {share} | {worst} |"


def make(format: str, place: Path, exercises: list[evaluate.Exercise]) -> Path:
    """The bundled checkpoint in `format`; `exercises` are those that calibrate."""
    if format in PLAIN:
        return BUNDLED
    out = place / (f"{format[5:]}.gguf" if format.startswith("gguf:") else format.replace(":", "-"))
    if format == "nf4":
        _nf4(out)
        return out
    found, rounded, plain = open_checkpoint(BUNDLED), None, format.removeprefix(CALIBRATED)
    if format != plain:
        samples = [Sample(None, e.messages, list(e.tools), e.thinking) for e in exercises]
        ids = sequences(found, "pebble", samples, TOKENS, lambda: LLM(BUNDLED, device="cpu"))
        rounded = calibrated(found, ids, plain)
    convert.write(found, out, plain, "pebble", rounded=rounded)
    return out


def _nf4(out: Path) -> None:
    """As `transformers` and bitsandbytes save it; the rest of the folder is ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

        wish = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        made = AutoModelForImageTextToText.from_pretrained(BUNDLED, quantization_config=wish, device_map="cpu")
        made.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (out / name).write_bytes((BUNDLED / name).read_bytes())


def log_probabilities(loaded: Loaded, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(batch).float().log_softmax(-1)


def credits(loaded: Loaded, exercises: list[evaluate.Exercise]) -> list[float]:
    llm = AsyncLLM.of(loaded)
    try:
        return evaluate.credits(llm, exercises)
    finally:
        llm.close()


def measure(limit: int, formats: list[str]) -> list[Result]:
    every = evaluate.read_tasks(evaluate.BUNDLED_TASKS)
    exercises, scorable = evaluate.thin(every, limit), set(map(id, evaluate.thin(every, APART)))
    calibrating = [e for e in every if id(e) not in scorable]
    whole = load(BUNDLED, "cpu", "bfloat16")
    assert whole.tokenizer is not None
    texts = [f"{e.messages[-1]['content']} {e.expect}" for e in exercises[:: max(1, len(exercises) // 200)]]
    batch = whole_sequences([torch.tensor(whole.tokenizer.encode(text)) for text in texts])
    exact, plain = log_probabilities(whole, batch), credits(whole, exercises)
    results = []
    with tempfile.TemporaryDirectory() as place:
        for format in formats:
            path = make(format, Path(place), calibrating)
            loaded = load(path, "cpu", format if format in PLAIN else "bfloat16")
            other = log_probabilities(loaded, batch)
            earned = plain if format == "bfloat16" else credits(loaded, exercises)
            weights = [path] if path.is_file() else path.glob("*.safetensors")
            results.append(
                Result(
                    format,
                    size=sum(file.stat().st_size for file in weights),
                    kl=max(
                        0.0, float((exact.exp() * (exact - other)).sum(-1).mean())
                    ),  # a sum of rounding may be below
                    right=int(sum(earned)),
                    n=len(exercises),
                    paired=_paired(exercises, plain, earned),
                )
            )
            print(results[-1].row(), flush=True)
    return results


def _paired(
    exercises: list[evaluate.Exercise], before: list[float], after: list[float]
) -> dict[str, tuple[int, int, int]]:
    pairs = defaultdict(list)
    for exercise, *pair in zip(exercises, before, after, strict=True):
        pairs[exercise.task].append(pair)
    return {task: (sum(b > a for b, a in each), sum(b < a for b, a in each), len(each)) for task, each in pairs.items()}


def table(results: list[Result], limit: int) -> str:
    weights = hashlib.sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest()[:12]
    head = (
        f"Bundled weights {weights}, at most {limit} exercises of each task, greedy; 95 % intervals (Wilson):\n\n"
        "| format | MB | KL per token | right | task that lost most beside bfloat16 |\n|---|---:|---:|---|---|\n"
    )
    return head + "\n".join(result.row() for result in results)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--exercises", type=int, default=100)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    if wanted.exercises > APART:
        parser.error(f"--exercises is {wanted.exercises}, but only {APART} of a task are kept apart from calibration")
    results = measure(wanted.exercises, wanted.formats.split(","))
    made = table(results, wanted.exercises)
    if wanted.write:
        begin, end = MARKS
        between = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
        DOC.write_text(
            between.sub(lambda _: f"{begin}\n{made}\n{end}", DOC.read_text(encoding="utf-8")), encoding="utf-8"
        )
    print(json.dumps({"exercises_per_task": wanted.exercises, "results": [vars(result) for result in results]}))


if __name__ == "__main__":
    main()
