"""What every format costs the bundled model: its card in each, and the divergence of next-token distributions.

    python benchmarks/quantised_quality.py [--exercises N] [--formats int4,calibrated:int4] [--write]

Each format is written as `cabochon quantize` writes it, loaded as anybody would load it and scored on the whole card,
what is seen and heard included, or on the first N exercises of every task. `--write` puts the table into
docs/numerics.md.
Divergence is KL(bfloat16 || format) in nats per token, over prompts and answers of some two hundred exercises in words.

The formats `calibrated:...` are rounded with conversations that the model could have been trained on and that no card
asks (`scripts/pebble/mixture.py`), answered by the model itself.

Two formats meet the same exercises, so what counts is what each earned on which: the interval beside a task is that of
the mean difference in pairs. `float32` has the same weights and finer arithmetic: by what it differs, no format is to
blame.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
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

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "pebble"))

from case import draw
from mixture import TASKS

DOC = Path(__file__).parent.parent / "docs" / "numerics.md"
MARKS = ("<!-- quality per format -->", "<!-- end of quality per format -->")
CALIBRATED = "calibrated:"
PLAIN = ("bfloat16", "float32")
FORMATS = (*PLAIN, "int8", "calibrated:int8", "int4", "calibrated:int4", *convert.FORMATS[2:], "nf4")
CALIBRATING = 100
"""Conversations of each kind that calibrate."""


@dataclass(frozen=True)
class Difference:
    """What a format earned beside bfloat16 on the same exercises of a task. Credits are between 0 and 1."""

    lost: int
    won: int
    n: int
    mean: float
    reach: float
    """The 95 % interval is the mean and so much on either side."""

    @staticmethod
    def of(before: list[float], after: list[float]) -> Difference:
        each = [b - a for a, b in zip(before, after, strict=True)]
        mean = sum(each) / len(each)
        reach = 1.96 * math.sqrt(sum((one - mean) ** 2 for one in each)) / len(each)
        return Difference(sum(one < 0 for one in each), sum(one > 0 for one in each), len(each), mean, reach)

    def __str__(self) -> str:
        low, high = (100 * (self.mean + side * self.reach) for side in (-1, 1))
        return (
            f"{self.lost} lost, {self.won} won of {self.n}, {100 * self.mean:+.1f} points ({low:+.1f} to {high:+.1f})"
        )


@dataclass(frozen=True)
class Result:
    """One format. Shares are between 0 and 1."""

    format: str
    size: int
    kl: float
    right: float
    n: int
    tasks: dict[str, Difference]

    def row(self) -> str:
        low, high = evaluate.wilson(self.right, self.n)
        share = f"{self.right / self.n:.1%} ({low:.1%} to {high:.1%})"
        task, worst = min(self.tasks.items(), key=lambda item: item[1].mean)
        lost = f"{task}: {worst}" if worst.mean < 0 else "none"
        return f"| `{self.format}` | {self.size / 1e6:.1f} | {self.kl:.1e} | {share} | {lost} |"


def conversations() -> list[Sample]:
    """What calibrates."""
    rng = random.Random("calibrating")
    tasks = [task for task in TASKS for _ in range(CALIBRATING)]
    cases = [draw(task.generator, rng, test=False) if task.split else task.generator(rng) for task in tasks]
    return [Sample(None, case.messages, case.tools, case.thinking) for case in cases]


def make(format: str, place: Path) -> Path:
    """The bundled checkpoint in `format`."""
    if format in PLAIN:
        return BUNDLED
    out = place / (f"{format[5:]}.gguf" if format.startswith("gguf:") else format.replace(":", "-"))
    if format == "nf4":
        _nf4(out)
        return out
    found, rounded, plain = open_checkpoint(BUNDLED), None, format.removeprefix(CALIBRATED)
    if format != plain:
        ids = sequences(found, "pebble", conversations(), TOKENS, lambda: LLM(BUNDLED, device="cpu"))
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


def credits(loaded: Loaded, exercises: list[evaluate.Exercise]) -> dict[int, float]:
    """What replies are worth, by the numbers of those exercises that the checkpoint has the senses for."""
    llm = AsyncLLM.of(loaded)
    try:
        able, _ = evaluate.possible(exercises, llm.front.senses.kinds if llm.front.senses else ())
        earned = dict(zip(map(id, able), evaluate.credits(llm, able), strict=True))
    finally:
        llm.close()
    return {i: earned[id(e)] for i, e in enumerate(exercises) if id(e) in earned}


def measure(exercises: list[evaluate.Exercise], formats: list[str]) -> list[Result]:
    whole = load(BUNDLED, "cpu", "bfloat16")
    assert whole.tokenizer is not None
    words = [e for e in exercises if not e.shows]
    texts = [f"{e.messages[-1]['content']} {e.expect}" for e in words[:: max(1, len(words) // 200)]]
    batch = whole_sequences([torch.tensor(whole.tokenizer.encode(text)) for text in texts])
    exact, plain = log_probabilities(whole, batch), credits(whole, exercises)
    results = []
    with tempfile.TemporaryDirectory() as place:
        for format in formats:
            path = make(format, Path(place))
            loaded = load(path, "cpu", format if format in PLAIN else "bfloat16")
            other = log_probabilities(loaded, batch)
            earned = plain if format == "bfloat16" else credits(loaded, exercises)
            weights = [path] if path.is_file() else path.glob("*.safetensors")
            divergence = float((exact.exp() * (exact - other)).sum(-1).mean())
            results.append(
                Result(
                    format,
                    size=sum(file.stat().st_size for file in weights),
                    kl=max(0.0, divergence),  # a sum of rounding may be below
                    right=sum(earned.values()),
                    n=len(earned),
                    tasks=_differences(exercises, plain, earned),
                )
            )
            print(results[-1].row(), flush=True)
    return results


def _differences(
    exercises: list[evaluate.Exercise], before: dict[int, float], after: dict[int, float]
) -> dict[str, Difference]:
    tasks = defaultdict(list)
    for i in after:
        tasks[exercises[i].task].append(i)
    return {task: Difference.of([before[i] for i in each], [after[i] for i in each]) for task, each in tasks.items()}


def table(results: list[Result], limit: int | None) -> str:
    weights = hashlib.sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest()[:12]
    asked = f"at most {limit} exercises of each task" if limit else "the whole card"
    head = (
        f"Bundled weights {weights}, {asked}, greedy; 95 % intervals:\n\n"
        "| format | MB | KL per token | right | task that lost most beside bfloat16 |\n|---|---:|---:|---|---|\n"
    )
    return head + "\n".join(result.row() for result in results)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--exercises", type=int, help="of each task; otherwise all")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    exercises = evaluate.bundled()
    exercises = evaluate.thin(exercises, wanted.exercises) if wanted.exercises else exercises
    results = measure(exercises, wanted.formats.split(","))
    made = table(results, wanted.exercises)
    if wanted.write:
        begin, end = MARKS
        between = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
        DOC.write_text(
            between.sub(lambda _: f"{begin}\n{made}\n{end}", DOC.read_text(encoding="utf-8")), encoding="utf-8"
        )
    print(json.dumps({"exercises_per_task": wanted.exercises, "results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
