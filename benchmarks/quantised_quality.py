"""What every format costs the bundled model: its card in each, and the divergence of next-token distributions.

    python benchmarks/quantised_quality.py [--exercises N] [--write]

Each format is written as `cabochon quantize` writes it, loaded as anybody would load it and scored on the first N
exercises of every task. `--write` puts the table into docs/numerics.md. Divergence is KL(bfloat16 || format) in nats
per token, over prompts and answers of the exercises.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from cabochon import evaluate
from cabochon.hub import BUNDLED
from cabochon.llm import AsyncLLM
from cabochon.llm.loading import Loaded, load
from cabochon.model.batch import Batch, whole_sequences
from cabochon.weights import convert
from cabochon.weights.checkpoint import open_checkpoint

DOC = Path(__file__).parent.parent / "docs" / "numerics.md"
MARKS = ("<!-- quality per format -->", "<!-- end of quality per format -->")
FORMATS = ("bfloat16", *convert.FORMATS, "nf4")


@dataclass(frozen=True)
class Result:
    """One format. Shares are between 0 and 1."""

    format: str
    size: int
    kl: float
    right: int
    n: int
    worst: tuple[str, int, int]
    """The task that lost most beside bfloat16: its name, exercises lost, exercises."""

    def row(self) -> str:
        low, high = evaluate.wilson(self.right, self.n)
        share = f"{self.right / self.n:.1%} ({low:.1%} to {high:.1%})"
        task, lost, n = self.worst
        worst = f"{task}: {lost} of {n}" if lost > 0 else "none"
        return f"| `{self.format}` | {self.size / 1e6:.1f} | {self.kl:.1e} | {share} | {worst} |"


def make(format: str, place: Path) -> Path:
    """The bundled checkpoint in `format`."""
    if format == "bfloat16":
        return BUNDLED
    out = place / (f"{format[5:]}.gguf" if format.startswith("gguf:") else format.replace(":", "-"))
    if format == "nf4":
        _nf4(out)
    else:
        convert.write(open_checkpoint(BUNDLED), out, format, "pebble")
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


def card(loaded: Loaded, exercises: list[evaluate.Exercise]) -> dict[str, evaluate.Line]:
    llm = AsyncLLM.of(loaded)
    try:
        return {line.task: line for line in evaluate.evaluate(llm, exercises, withhold=False)}
    finally:
        llm.close()


def measure(limit: int) -> list[Result]:
    exercises = evaluate.thin(evaluate.read_tasks(evaluate.BUNDLED_TASKS), limit)
    whole = load(BUNDLED, "cpu", "bfloat16")
    assert whole.tokenizer is not None
    texts = [f"{e.messages[-1]['content']} {e.expect}" for e in exercises[:: max(1, len(exercises) // 200)]]
    batch = whole_sequences([torch.tensor(whole.tokenizer.encode(text)) for text in texts])
    exact, plain = log_probabilities(whole, batch), card(whole, exercises)
    results = []
    with tempfile.TemporaryDirectory() as place:
        for format in FORMATS:
            path = make(format, Path(place))
            loaded = load(path, "cpu", "bfloat16")
            other = log_probabilities(loaded, batch)
            lines = plain if format == "bfloat16" else card(loaded, exercises)
            lost = max(lines, key=lambda task: plain[task].right - lines[task].right)
            weights = [path] if path.is_file() else path.glob("*.safetensors")
            results.append(
                Result(
                    format,
                    size=sum(file.stat().st_size for file in weights),
                    kl=max(
                        0.0, float((exact.exp() * (exact - other)).sum(-1).mean())
                    ),  # a sum of rounding may be below
                    right=int(sum(line.right for line in lines.values())),
                    n=len(exercises),
                    worst=(lost, int(plain[lost].right - lines[lost].right), lines[lost].n),
                )
            )
            print(results[-1].row(), flush=True)
    return results


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
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    results = measure(wanted.exercises)
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
