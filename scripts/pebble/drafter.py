"""Train the drafter of a checkpoint: `python scripts/pebble/drafter.py [FOLDER]` writes FOLDER/drafter.

Every position of a reply asks for a burst at once: the target reads whole conversations in one pass, and a query at
position t sees only the rows stored before t. Its guesses learn the target's own distributions. Afterwards the drafter
is measured on held-out exercises, along the replies that the target gives by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import train
from heldout import SENSES, SUITE, Entry, cases
from mixture import Document, Exhibits, document, documents
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cabochon.chat.template import Template
from cabochon.chat.tokenizer import Tokenizer
from cabochon.config import Kind, ModelConfig, read_config
from cabochon.engine.request import SamplingParams
from cabochon.llm import LLM
from cabochon.model.drafter import Drafter, Stored
from cabochon.model.gemma4 import Gemma4
from cabochon.ops import Rows
from cabochon.variants import find
from cabochon.weights.params import parameters
from cabochon.weights.random import calm_tensor

BURST = 4
"""Guesses a step, in training and in the measurement."""
CLUSTERS, NEAREST = 64, 8
RATE = 0.006


def config_for(target: ModelConfig) -> ModelConfig:
    """E2B's assistant around the geometry of `target`."""
    raw, text = find("E2B-assistant").config(), target.raw["text_config"]
    same = ("head_dim", "global_head_dim", "sliding_window", "vocab_size", "max_position_embeddings")
    raw["text_config"].update({key: text[key] for key in same}, hidden_size=64, intermediate_size=256)
    raw.update({key: target.raw[key] for key in raw if key.endswith("_token_id") and key in target.raw})
    raw.update(backbone_hidden_size=text["hidden_size"], num_centroids=CLUSTERS, centroid_intermediate_top_k=NEAREST)
    return read_config(raw)


def clusters(table: Tensor, count: int) -> Tensor:
    """The rows of `table` [V, D] in `count` groups of equal size, alike ones together: indices, group by group."""
    points = nn.functional.normalize(table - table.mean(0), dim=1)
    size = len(points) // count
    centres = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]]
    for _ in range(10):
        room, mine = [size] * count, [0] * len(points)
        nearness = points @ centres.T
        for point in nearness.amax(1).argsort(descending=True).tolist():
            mine[point] = next(c for c in nearness[point].argsort(descending=True).tolist() if room[c])
            room[mine[point]] -= 1
        order = torch.tensor(mine).argsort(stable=True)
        centres = nn.functional.normalize(points[order].view(count, size, -1).mean(1), dim=1)
    return order


def new_drafter(target: Gemma4, seed: int) -> Drafter:
    drafter = Drafter(config_for(target.config))
    state = {p.name: calm_tensor(p.name, p.shape, seed=seed) for p in parameters(drafter.config)}
    state |= {name: torch.ones(1) for name in state if name.endswith("layer_scalar")}
    state["masked_embedding.token_ordering"] = clusters(target.language_model.embed_tokens.weight.detach(), CLUSTERS)
    drafter.load_state_dict(state)
    return drafter


def load_target(folder: Path) -> Gemma4:
    model = Gemma4(read_config(folder))
    held = load_file(folder / "model.safetensors")
    model.load_state_dict({p.name: held[p.hf].float() for p in parameters(model.config)})
    return model.requires_grad_(False).eval()


@dataclass
class Seen:
    """A pass of the target over a group of conversations of one padded length, and where bursts are asked for."""

    ids: Tensor
    """[T]."""
    hidden: Tensor
    """[T, B], after the final norm."""
    likely: Tensor
    """[T, V] log-probabilities of the next token."""
    stored: Stored
    asked: Tensor
    """[Q] index of the newest token of every burst."""


@torch.no_grad()
def look(target: Gemma4, group: list[Document]) -> Seen:
    """Bursts are asked for at every token of a reply but its last."""
    step = train.pack(group)
    batch = step.batch
    batch.tail, text = batch.rows, target.language_model
    if step.spans:
        batch.soft = train.soft_tokens(target, step.spans)
    rows: dict[Kind, Tensor] = {}
    hidden = text.hidden(batch, rows)
    longest = len(batch.token_ids) // len(group)
    marks = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, doc in enumerate(group):
        marks[row, : len(doc.marks)] = torch.tensor(doc.marks)
    marks[:, :-1] &= marks[:, 1:].clone()  # something must come after
    marks[:, -1] = False
    asked = marks.flatten().nonzero().flatten()
    start = torch.zeros(len(group) + 1, dtype=torch.int32)
    start[1:] = marks.sum(1).cumsum(0)
    last = (asked % longest - 1).int()
    asks = Rows(asked, start, last, last, int(marks.sum(1).max()))
    stored = Stored(asks, batch.start, torch.zeros(len(group), dtype=torch.int32), rows)
    return Seen(batch.token_ids, hidden, text.logits(hidden).log_softmax(-1), stored, asked)


def loss(drafter: Drafter, target: Gemma4, seen: Seen, ends: Tensor) -> tuple[Tensor, int]:
    """How far the guesses and their clusters are from the target's own; `ends` [T]: last of a reply."""
    text, head = target.language_model, drafter.masked_embedding
    assert head is not None
    home = torch.empty(len(head.token_ordering), dtype=torch.long)
    home[head.token_ordering] = torch.arange(len(home)) // (len(home) // CLUSTERS)
    hidden, at, alive = seen.hidden[seen.asked - 1], seen.asked, torch.ones(len(seen.asked), dtype=torch.bool)
    lost, count = torch.zeros(()), 0
    for _ in range(BURST):
        embedded = text.embed_tokens(seen.ids[at], math.sqrt(text.config.hidden_size))
        x, hidden = drafter(embedded, hidden, seen.stored)
        guess = nn.functional.linear(x, drafter.embed_tokens.weight).log_softmax(-1)
        wanted = seen.likely[at]
        apart = -(wanted.exp() * guess).sum(-1)
        cluster = nn.functional.cross_entropy(head.centroids(x), home[wanted.argmax(-1)], reduction="none")
        lost, count = lost + ((apart + 0.5 * cluster) * alive).sum(), count + int(alive.sum())
        alive = alive & ~ends[at]
        at = torch.where(alive, at + 1, at)
        alive = alive & ~ends[at]
    return lost, count


def reply_ends(group: list[Document], longest: int) -> Tensor:
    """[T]: true for the last token of a reply and all that is none."""
    ends = torch.ones(len(group), longest, dtype=torch.bool)
    for row, doc in enumerate(group):
        marks = torch.tensor(doc.marks)
        ends[row, : len(marks) - 1] = ~(marks[:-1] & marks[1:])
    return ends.flatten()


def groups(stream: Iterator[Document], rng: random.Random) -> Iterator[list[Document]]:
    """Documents of like length, about train.TOKENS_AT_ONCE tokens together."""
    while True:
        pool = sorted((next(stream) for _ in range(128)), key=lambda doc: len(doc.ids))
        cut: list[list[Document]] = [[]]
        for doc in pool:
            if cut[-1] and len(doc.ids) * (len(cut[-1]) + 1) > train.TOKENS_AT_ONCE:
                cut.append([])
            cut[-1].append(doc)
        rng.shuffle(cut)
        yield from cut


def learn(target: Gemma4, options: argparse.Namespace) -> Drafter:
    drafter = load(options.folder / "drafter") if options.resume else new_drafter(target, options.seed)
    template, rng = Template(Tokenizer.from_file(options.folder)), random.Random(options.seed)
    sees = target.config.vision is not None
    stream = documents(
        template, rng.getrandbits(60), Exhibits(target.config, template) if sees else None, 0.3 if sees else 0.0
    )
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    start, losses = time.process_time(), []
    for count, group in enumerate(groups(stream, rng), 1):
        progress = (time.process_time() - start) / 60 / options.minutes
        if progress >= 1:
            break
        seen = look(target, group)
        lost, asked = loss(drafter, target, seen, reply_ends(group, len(seen.ids) // len(group)))
        (lost / asked).backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, count / 50, 2 * (1 - progress))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(lost.item() / asked)
        if count % 50 == 0:
            print({"step": count, "progress": round(progress, 3), "loss": sum(losses[-50:]) / 50}, flush=True)
    return drafter


@torch.no_grad()
def measure(target: Gemma4, drafter: Drafter, folder: Path, suite: Sequence[Entry], count: int) -> list[dict[str, Any]]:
    """Per task: the guesses that the target would have said itself, and the tokens gained, per step of the target."""
    llm = LLM(folder, dtype="float32")
    template = Template(llm.tokenizer)
    table = []
    for entry in suite:
        accepted = steps = 0
        for case in cases(entry, count):
            doc = said(llm, target, template, case)
            if sum(doc.marks) < 2:
                continue
            seen = look(target, [doc])
            guesses = drafter.burst(
                target.language_model, seen.ids[seen.asked], seen.hidden[seen.asked - 1], seen.stored, BURST
            )
            right = {int(at): guess for at, guess in zip(seen.asked, guesses.tolist(), strict=True)}
            at, end = int(seen.asked[0]), len(doc.ids) - 1
            while at < end:
                kept = 0
                while kept < BURST and at + kept < end and right[at][kept] == int(seen.ids[at + 1 + kept]):
                    kept += 1
                accepted, steps, at = accepted + kept, steps + 1, at + kept + 1
        table.append({"task": entry.name, "steps": steps, "accepted": accepted / max(1, steps)})
        print(table[-1], flush=True)
    return table


def summary(table: list[dict[str, Any]]) -> dict[str, float]:
    """Over all steps: guesses accepted, and tokens gained with the target's own."""
    steps = sum(line["steps"] for line in table)
    mean = sum(line["accepted"] * line["steps"] for line in table) / steps
    return {"accepted": round(mean, 2), "tokens a step": round(1 + mean, 2), "steps": steps}


def said(llm: LLM, target: Gemma4, template: Template, case: Any) -> Document:
    """The case with the reply that the target gives, its tokens marked."""
    exhibits = Exhibits(target.config, template) if case.shown else None
    asked = document(case, template, exhibits=exhibits)
    first = next(i for i in range(len(asked.marks)) if all(asked.marks[i:]))
    if exhibits is not None:
        reply = greedy(target, asked._replace(ids=asked.ids[:first], marks=[False] * first))
    else:
        reply = list(llm.generate([asked.ids[:first]], SamplingParams(temperature=0.0, max_tokens=256))[0].token_ids)
    return Document(asked.ids[:first] + reply, [False] * first + [True] * len(reply), asked.spans)


def greedy(target: Gemma4, doc: Document) -> list[int]:
    """The reply to what is shown, without a cache: such replies are short."""
    reply: list[int] = []
    while len(reply) < 64 and (not reply or reply[-1] not in target.config.tokens.eos):
        step = train.pack([Document(doc.ids + reply + [0], [False] * (len(doc.ids) + len(reply)) + [True], doc.spans)])
        reply.append(int(train.logits(target, step).argmax(-1)))
    return reply


def save(drafter: Drafter, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(drafter.config.raw, indent=2, sort_keys=True) + "\n")
    state = drafter.state_dict()
    tensors = {
        p.hf: state[p.name] if p.integer else state[p.name].to(torch.bfloat16).contiguous()
        for p in parameters(drafter.config)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> Drafter:
    drafter = Drafter(read_config(folder))
    held = load_file(folder / "model.safetensors")
    drafter.load_state_dict(
        {p.name: held[p.hf] if p.integer else held[p.hf].float() for p in parameters(drafter.config)}
    )
    return drafter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=train.SHIPPED, help="the target")
    parser.add_argument("--minutes", type=float, default=4, help="of processor time")
    parser.add_argument("--resume", action="store_true", help="begin with the one that is there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=8, help="per task, in the measurement")
    parser.add_argument("--measure", action="store_true", help="only measure the one that is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = load_target(options.folder)
    if not options.measure:
        train.round_products()
        save(learn(target, options), options.folder / "drafter")
    suite = [*SUITE, *(SENSES if target.config.vision else ())]
    table = measure(target, load(options.folder / "drafter"), options.folder, suite, options.cases)
    print(json.dumps({"burst": BURST, **summary(table)}))


if __name__ == "__main__":
    main()
