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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mixture import Document, document, documents
from torch import Tensor, nn

import cabochon.ops
from cabochon.chat.template import Template
from cabochon.chat.tokenizer import Tokenizer
from cabochon.config import read_config
from cabochon.model.batch import Batch, whole_sequences
from cabochon.model.gemma4 import Gemma4
from cabochon.ops import Rows
from cabochon.weights.params import parameters
from cabochon.weights.random import calm_tensor

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "src" / "cabochon" / "pebble"
RUN = HERE.parents[1] / "build" / "pebble" / "run"

TOKENS_AT_ONCE = 2048
"""Of one forward pass; documents of like length go together."""
POOL = 768
"""Documents sorted by length at a time."""
MATRIX_RATE, VECTOR_RATE = 0.01, 0.004
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

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return Rounded.apply(x, weight)

    cabochon.ops.linear = cabochon.ops.reference.linear = linear  # type: ignore[assignment]


@dataclass
class Step:
    """What one forward pass reads."""

    batch: Batch
    targets: Tensor


def pack(group: list[Document], device: str = "cpu") -> Step:
    """Documents padded to the longest (padding is id 0 at the end, and nothing is predicted there)."""
    longest = max(len(ids) for ids, _ in group)
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    marks = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, (document_ids, document_marks) in enumerate(group):
        ids[row, : len(document_ids)] = torch.tensor(document_ids)
        marks[row, : len(document_marks)] = torch.tensor(document_marks)
    batch = whole_sequences(list(ids), device)
    predicts = marks.flatten().nonzero().flatten() - 1  # the row before a marked token predicts it
    batch.tail = tail(predicts, len(group), longest, device)
    return Step(batch, ids.flatten()[predicts + 1].to(device))


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
        pool = sorted(itertools.islice(stream, POOL), key=lambda d: len(d[0]))
        groups: list[list[Document]] = [[]]
        for doc in pool:
            if groups[-1] and len(doc[0]) * (len(groups[-1]) + 1) > TOKENS_AT_ONCE:
                groups.append([])
            groups[-1].append(doc)
        rng.shuffle(groups)
        yield from (pack(group, device) for group in groups)


def new_model(seed: int, device: str) -> Gemma4:
    model = Gemma4(read_config(SHIPPED))
    state = {p.name: calm_tensor(p.name, p.shape, seed=seed) for p in parameters(model.config)}
    state |= {name: torch.ones(1) for name in state if name.endswith("layer_scalar")}
    model.load_state_dict(state)
    return model.to(device)


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
            right += bool((model(step.batch).argmax(-1) == step.targets).all())
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
        table[entry.name] = [(ids, last_reply(marks)) for ids, marks in docs]
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
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / file, folder)
    state = model.state_dict()
    tensors = {p.hf: state[p.name].to("cpu", torch.bfloat16).contiguous() for p in parameters(model.config)}
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "model.safetensors.part").rename(folder / "model.safetensors")


class Run:
    """One worker's share of a training run. Rank 0 also measures, logs and saves."""

    def __init__(self, options: argparse.Namespace, rank: int, add_up: Callable[[Tensor], Any]) -> None:
        self.options, self.rank, self.add_up = options, rank, add_up
        torch.manual_seed(options.seed)
        self.model = new_model(options.seed, options.device)
        self.optimizers = optimizers(self.model)
        self.rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.done = 0
        """Tokens seen by all workers together."""
        self.count = 0
        self.spent = 0.0
        if options.resume:
            self._resume()
        self.template = Template(Tokenizer.from_file(SHIPPED))
        where = f"{options.seed}/{rank}/{self.done}"
        rng = random.Random(where)
        self.steps = steps(documents(self.template, rng.getrandbits(60)), rng, options.device)
        self.flat = torch.zeros(sum(p.numel() for p in self.model.parameters()) + 4, device=options.device)
        self.start = time.time()

    def go(self) -> None:
        tests = test_documents(self.template, self.options.tests) if self.rank == 0 else {}
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
        lost, marked = 0.0, 0
        for part in parts:
            loss = nn.functional.cross_entropy(self.model(part.batch), part.targets, reduction="sum")
            loss.backward()
            lost, marked = lost + loss.item(), marked + len(part.targets)
        seen = sum(part.batch.tokens for part in parts)
        clock = (self.spent + time.time() - self.start) / 60 / self.options.minutes if self.rank == 0 else 0.0
        parameters = list(self.model.parameters())
        torch.cat(
            [p.grad.flatten() for p in parameters] + [self.flat.new_tensor([lost, marked, seen, clock])], out=self.flat
        )
        self.add_up(self.flat)
        lost, marked, seen, clock = self.flat[-4:].tolist()
        grads = self.flat[:-4].div_(marked)
        grads.mul_(min(1.0, 1.0 / (grads.norm().item() + 1e-6)))
        for p, grad in zip(parameters, grads.split([p.numel() for p in parameters]), strict=True):
            assert p.grad is not None
            p.grad.copy_(grad.view_as(p))
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, full in zip(groups, self.rates, strict=True):
            group["lr"] = full * rate(progress)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.done += int(seen)
        self.count += 1
        return lost / marked, max(self.done / self.options.tokens, clock)

    def log(self, **what: Any) -> None:
        seconds = self.spent + time.time() - self.start
        line = {"step": self.count, "tokens": self.done, "minutes": round(seconds / 60, 2), **what}
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
            "spent": self.spent + time.time() - self.start,
        }
        torch.save(state, self.options.out / "state.part")
        (self.options.out / "state.part").rename(self.options.out / "state.pt")

    def _resume(self) -> None:
        state = torch.load(self.options.out / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.done, self.count, self.spent = state["done"], state["count"], state["spent"]


def work(rank: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if options.device == "cpu":
        round_products()
    if options.workers > 1:
        store = f"file://{options.out / 'meeting'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.workers)
    Run(options, rank, dist.all_reduce if options.workers > 1 else lambda flat: None).go()
    if options.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=19e6, help="how many to see")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end by then, on whatever tokens were seen")
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
    (options.out / "meeting").unlink(missing_ok=True)
    if options.workers == 1:
        work(0, options)
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.multiprocessing.spawn(work, (options,), options.workers)


if __name__ == "__main__":
    main()
