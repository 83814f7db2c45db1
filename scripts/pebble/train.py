"""Train the bundled checkpoint from nothing: `python scripts/pebble/train.py`.

The network is the package's own, fed with packed whole sequences. Unusual: on a CPU it runs as several processes of one
thread each, which add up their gradients once a step, because matrices this small leave a second thread idle; and
matrix products round their factors to bfloat16 (2.4 times the speed on AVX-512) while all else stays float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from case import Spot
from mixture import Document, document, documents
from torch import Tensor, nn

import cabochon.ops
from cabochon.chat.template import Template
from cabochon.chat.tokenizer import Tokenizer
from cabochon.config import ModelConfig, read_config
from cabochon.engine.request import SoftSpan
from cabochon.media.image import Patches
from cabochon.model.batch import Batch, SoftTokens, whole_sequences
from cabochon.model.gemma4 import Gemma4
from cabochon.ops import Rows
from cabochon.weights.params import parameters
from cabochon.weights.random import calm_tensor

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "src" / "cabochon" / "pebble"
RUN = HERE.parents[1] / "build" / "pebble" / "seed0"

TOKENS_AT_ONCE = 2048
"""Of one forward pass; documents of like length go together."""
POOL = 768
"""Documents sorted by length at a time."""
MATRIX_RATE, VECTOR_RATE = 0.01, 0.004
SHOWN_WEIGHT = 4.0
"""Of a token in the answer to something shown: such answers are a word or two, others are long."""
WARM_UP, DECAY = 0.02, 0.35
"""Parts of the run in which the rate rises, and falls to nothing at the end."""


class Rounded(torch.autograd.Function):
    """`x @ weight.T` with both rounded to bfloat16, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        low_x, low_weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(low_x, low_weight)
        return nn.functional.linear(low_x, low_weight).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        low_x, low_weight = ctx.saved_tensors
        low = grad.bfloat16()
        return (low @ low_weight).float(), (low.flatten(0, -2).t() @ low_x.flatten(0, -2)).float()


def round_products() -> None:
    """Let every matrix product of the network go through `Rounded`, in this process."""

    def linear(x: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
        return Rounded.apply(x, weight)

    cabochon.ops.linear = cabochon.ops.reference.linear = linear  # type: ignore[assignment]  # the op takes quantised weights too


@dataclass
class Step:
    """What one forward pass reads."""

    batch: Batch
    targets: Tensor
    weights: Tensor
    """Of the targets in the loss."""
    spans: list[SoftSpan]
    """Of the packed batch; their features are computed when the step is taken."""
    spots: dict[int, tuple[Spot, ...]]
    """What is where in a span, by its place in `spans`."""


def pack(group: list[Document], device: str = "cpu") -> Step:
    """Documents padded to the longest (padding is id 0 at the end, and nothing is predicted there)."""
    longest = max(len(doc.ids) for doc in group)
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    marks = torch.zeros(len(group), longest, dtype=torch.bool)
    spans: list[SoftSpan] = []
    spots: dict[int, tuple[Spot, ...]] = {}
    for row, doc in enumerate(group):
        ids[row, : len(doc.ids)] = torch.tensor(doc.ids)
        marks[row, : len(doc.marks)] = torch.tensor(doc.marks)
        if doc.spots:
            spots[len(spans)] = doc.spots
        spans += [replace(span, start=row * longest + span.start) for span in doc.spans]
    batch = whole_sequences(list(ids), device)
    predicts = marks.flatten().nonzero().flatten() - 1  # the row before a marked token predicts it
    batch.tail = tail(predicts, len(group), longest, device)
    heavy = torch.tensor([SHOWN_WEIGHT if doc.spans else 1.0 for doc in group])[predicts // longest]
    return Step(batch, ids.flatten()[predicts + 1].to(device), heavy.to(device), spans, spots)


def perceive(model: Gemma4, items: list[Any]) -> list[Tensor]:
    """The soft tokens of pictures and sounds; pictures of one size go through the tower together."""
    features: dict[int, Tensor] = {}
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        if isinstance(item, Patches):
            alike[item.rows, item.columns].append(i)
        else:
            features[i] = model.embed_audio(model.audio_tower(torch.from_numpy(item)))
    for (rows, columns), which in alike.items():
        pixels = torch.from_numpy(np.stack([items[i].values for i in which]))
        features |= zip(which, model.embed_vision(model.vision_tower(pixels, rows, columns)), strict=True)
    return [features[i] for i in range(len(items))]


def logits(model: Gemma4, step: Step) -> Tensor:
    """Of the rows whose next token is a target."""
    if step.spans:
        step.batch.soft = soft_tokens(model, step.spans)
    return model(step.batch)


def soft_tokens(model: Gemma4, spans: list[SoftSpan]) -> SoftTokens:
    index = torch.cat([torch.arange(span.start, span.start + span.length) for span in spans])
    return SoftTokens(index, torch.cat(perceive(model, [span.item for span in spans])))


def tail(rows: Tensor, sequences: int, longest: int, device: str) -> Rows:
    """The rows that need logits: layers that share keys and values run for these alone, as when serving."""
    counts = torch.bincount(rows // longest, minlength=sequences)
    start = torch.zeros(sequences + 1, dtype=torch.int32)
    start[1:] = counts.cumsum(0)
    position = (rows % longest).int().to(device)
    return Rows(rows.to(device), start.to(device), position, position, int(counts.max()))


def steps(stream: Iterator[Document], rng: random.Random, device: str) -> Iterator[Step]:
    """Groups of like length, about TOKENS_AT_ONCE each, in random order."""
    while True:
        pool = sorted(itertools.islice(stream, POOL), key=lambda doc: len(doc.ids))
        groups: list[list[Document]] = [[]]
        for doc in pool:
            if groups[-1] and len(doc.ids) * (len(groups[-1]) + 1) > TOKENS_AT_ONCE:
                groups.append([])
            groups[-1].append(doc)
        rng.shuffle(groups)
        yield from (pack(group, device) for group in groups)


def new_model(seed: int, device: str) -> Gemma4:
    model = Gemma4(text_config())
    state = {p.name: calm_tensor(p.name, p.shape, seed=seed) for p in parameters(model.config)}
    state |= {name: torch.ones(1) for name in state if name.endswith("layer_scalar")}
    model.load_state_dict(state)
    return model.to(device)


def text_config() -> ModelConfig:
    """That of the bundled checkpoint without its towers."""
    raw = json.loads((SHIPPED / "config.json").read_text())
    return read_config(raw | {"audio_config": None, "vision_config": None, "vision_soft_tokens_per_image": 280})


def optimizers(model: Gemma4) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for tables and gains."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=VECTOR_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(progress: float) -> float:
    """Part of the full learning rate."""
    return min(1.0, progress / WARM_UP + 0.01, max(0.0, (1 - progress) / DECAY))


@torch.no_grad()
def exactness(model: Gemma4, cases: dict[str, list[Document]], device: str) -> dict[str, float]:
    """Per task, how many held-out replies greedy decoding gets right to the last token.

    One pass tells: a reply is reproduced if, given its own beginning, each token is the likeliest.
    """
    scores = {}
    for task, docs in cases.items():
        right = 0
        for doc in docs:
            step = pack([doc], device)
            right += bool((logits(model, step).argmax(-1) == step.targets).all())
        scores[task] = right / len(docs)
    return scores


def test_documents(template: Template, count: int) -> dict[str, list[Document]]:
    """Held-out cases of every task, with only the last reply marked."""
    from heldout import SUITE, cases

    table = {}
    for entry in SUITE:
        if entry.name == "needle 2k":  # long, and so like "needle" that training need not wait for it
            continue
        docs = [document(case, template) for case in cases(entry, count)]
        table[entry.name] = [doc._replace(marks=last_reply(doc.marks)) for doc in docs]
    return table


def last_reply(marks: list[bool]) -> list[bool]:
    start = len(marks)
    while start and marks[start - 1]:
        start -= 1
    return [False] * start + marks[start:]


def save(model: Gemma4, folder: Path) -> None:
    """Write a whole checkpoint, in bfloat16 under the published names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / file, folder)
    (folder / "config.json").write_text(json.dumps(model.config.raw, indent=2, sort_keys=True) + "\n")
    state = model.state_dict()
    tensors = {p.hf: state[p.name].to("cpu", torch.bfloat16).contiguous() for p in parameters(model.config)}
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "model.safetensors.part").rename(folder / "model.safetensors")


class Run:
    """One worker's share of a training run. Rank 0 also measures, logs and saves."""

    def __init__(self, options: argparse.Namespace, rank: int, add_up: Callable[[Tensor], Any]) -> None:
        self.options, self.rank, self.add_up = options, rank, add_up
        self.clocks = options.workers
        """How many workers' clocks are added up."""
        torch.manual_seed(options.seed)
        self.model = self.new_model()
        self.optimizers = self.new_optimizers()
        self.trained = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        self.rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.done = 0
        """Tokens seen by all workers together."""
        self.count = 0
        self.spent = 0.0
        if options.resume:
            self._resume()
        self.template = Template(Tokenizer.from_file(SHIPPED))
        where = f"{options.seed}/{rank}/{self.done}"
        self.steps = self.new_steps(random.Random(where))
        self.flat = torch.zeros(sum(p.numel() for p in self.trained) + 4, device=options.device)
        self.start = time.process_time()

    def new_model(self) -> Gemma4:
        return new_model(self.options.seed, self.options.device)

    def new_optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers(self.model)

    def new_steps(self, rng: random.Random) -> Iterator[Any]:
        return steps(documents(self.template, rng.getrandbits(60)), rng, self.options.device)

    def tests(self) -> dict[str, list[Document]]:
        return test_documents(self.template, self.options.tests)

    def loss(self, part: Step) -> tuple[Tensor, float, int]:
        """The weighted sum over targets, the sum of the weights, the tokens seen."""
        each = nn.functional.cross_entropy(logits(self.model, part), part.targets, reduction="none")
        return (each * part.weights).sum(), part.weights.sum().item(), part.batch.tokens

    def go(self) -> None:
        tests = self.tests() if self.rank == 0 else {}
        progress, losses, last_save = 0.0, [], time.time()
        while progress < 1:
            loss, progress = self.step(progress)
            losses.append(loss)
            if self.rank:
                continue
            if self.count % 20 == 0:
                self.log(progress=progress, loss=sum(losses) / len(losses))
                losses = []
            if self.count % self.options.test_every == 0:
                self.log(exact=exactness(self.model, tests, self.options.device))
            if time.time() - last_save > 120:
                self.save()
                last_save = time.time()
        if self.rank == 0:
            self.log(exact=exactness(self.model, tests, self.options.device))
            self.save()

    def step(self, progress: float) -> tuple[float, float]:
        """One update from all workers' gradients; the mean loss per token and the new progress."""
        parts = [next(self.steps) for _ in range(self.options.passes)]
        lost, weight, seen = 0.0, 0.0, 0
        for part in parts:
            loss, weighed, tokens = self.loss(part)
            loss.backward()
            lost, weight, seen = lost + loss.item(), weight + weighed, seen + tokens
        clock = self.seconds() / 60 / self.options.minutes / self.clocks
        flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in self.trained]
        torch.cat([*flat, self.flat.new_tensor([lost, weight, seen, clock])], out=self.flat)
        self.add_up(self.flat)
        lost, weight, seen, clock = self.flat[-4:].tolist()
        grads = self.flat[:-4].div_(weight)
        grads.mul_(min(1.0, 1.0 / (grads.norm().item() + 1e-6)))
        for p, grad in zip(self.trained, grads.split([p.numel() for p in self.trained]), strict=True):
            p.grad = grad.view_as(p)
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, full in zip(groups, self.rates, strict=True):
            group["lr"] = full * rate(progress)
        for optimizer in self.optimizers:
            optimizer.step()
        for p in self.trained:
            p.grad = None
        self.done += int(seen)
        self.count += 1
        return lost / weight, max(self.done / self.options.tokens, clock)

    def seconds(self) -> float:
        """Processor time of this worker, all its runs together; the clock on the wall depends on the neighbours."""
        return self.spent + time.process_time() - self.start

    def log(self, **what: Any) -> None:
        line = {"step": self.count, "tokens": self.done, "minutes": round(self.seconds() / 60, 2), **what}
        with (self.options.out / "log.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        print(line, flush=True)

    def save(self) -> None:
        save(self.model, self.options.out)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "done": self.done,
            "count": self.count,
            "spent": self.seconds(),
        }
        torch.save(state, self.options.out / "state.part")
        (self.options.out / "state.part").rename(self.options.out / "state.pt")

    def _resume(self) -> None:
        state = torch.load(self.options.out / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.done, self.count, self.spent = state["done"], state["count"], state["spent"]


def work(rank: int, options: argparse.Namespace, run: type[Run] = Run) -> None:
    torch.set_num_threads(1)
    if options.device == "cpu":
        round_products()
    if options.workers > 1:
        store = f"file://{options.out / 'meeting'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.workers)
    run(options, rank, dist.all_reduce if options.workers > 1 else lambda flat: None).go()
    if options.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=19e6, help="how many to see")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of processor time, after which to end")
    parser.add_argument("--workers", type=int, default=2, help="processes, on a CPU")
    parser.add_argument("--passes", type=int, default=2, help="forward passes per worker and step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RUN)
    parser.add_argument("--resume", action="store_true", help="go on from the last save")
    parser.add_argument("--tests", type=int, default=16, help="held-out cases per task in the log")
    parser.add_argument("--test-every", type=int, default=300, help="steps between them")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    start(options)


def start(options: argparse.Namespace, run: type[Run] = Run) -> None:
    """Train with as many processes as `options.workers` says."""
    (options.out / "meeting").unlink(missing_ok=True)
    if options.workers == 1:
        work(0, options, run)
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.multiprocessing.spawn(work, (options, run), options.workers)


if __name__ == "__main__":
    main()
