"""Teach a text checkpoint to see and hear: `python scripts/pebble/senses.py`, resumable like train.py.

First the towers alone, each under a head: the eye must name what lies under every soft token and where its edges are
(which the drawing program knows), the ear must spell the words (connectionist temporal classification). That costs no
pass through the text network. Then everything together, with text exercises among the others so that nothing is lost;
the text network moves slowly, and the eye's head stays by its side until training ends.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import scenes
import sounds
import torch
import train
import writing
from case import Case, Spot, draw
from mixture import Document, Exhibits, document, documents
from safetensors.torch import load_file
from torch import Tensor, nn

from cabochon import ops
from cabochon.config import read_config
from cabochon.media.audio import FLOOR
from cabochon.media.image import TILE, cut
from cabochon.model.gemma4 import Gemma4
from cabochon.model.layers import ClippedLinear
from cabochon.weights.params import parameters
from cabochon.weights.random import calm_tensor

OUT = train.RUN / "senses"
TEXT_RATE = 0.15
"""Of the text network's parameters, in parts of the towers'."""
SIGHTS = (*pictures.COLOURS, *pictures.SHAPES, *writing.ALPHABET)
SPOKEN = sorted({*sounds.WORDS} | {word for i in range(4000) for word in sounds.command(random.Random(i)).split()})
EDGE_BINS = 40
"""Parts of a side among which the eye's head places each edge of a thing."""
SIGHT_WEIGHT = 0.3
"""Of the head's loss on a picture in the joint part, where a token of an answer counts `train.SHOWN_WEIGHT`."""
TILE_GENERATORS = ((scenes.lone, 0.2), (scenes.patchwork, 0.4), (scenes.chart, 0.15), (writing.read, 0.25))
PICTURES_AT_ONCE, SOUNDS_AT_ONCE = 24, 12


def new_model(text: Path, seed: int) -> Gemma4:
    """The checkpoint `text`, with fresh towers if it has none."""
    raw = json.loads((text / "config.json").read_text())
    model = Gemma4(read_config(raw | json.loads((train.HERE / "towers.json").read_text())))
    held = load_file(text / "model.safetensors")
    state = model.state_dict()
    for p in parameters(model.config):
        state[p.name] = held[p.hf].float() if p.hf in held else calm_tensor(p.name, p.shape, seed=seed)
        if "_min" in p.name or "_max" in p.name:
            state[p.name] = torch.tensor(math.inf if p.name.endswith("max") else -math.inf)
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, ClippedLinear):
            module.clipped = False  # bounds come last, from what occurs
    return model


def length(model: Gemma4) -> float:
    """Root mean square of an element of the scaled embeddings."""
    return model.language_model.embed_tokens.weight.square().mean().sqrt().item() * math.sqrt(
        model.config.text.hidden_size
    )


def sight_head(model: Gemma4) -> nn.Linear:
    """Soft token -> logits of SIGHTS, then of the bins of four edges."""
    return nn.Linear(model.config.text.hidden_size, len(SIGHTS) + 4 * EDGE_BINS)


def sight_loss(head: nn.Module, features: Tensor, rows: int, spots: Sequence[Spot]) -> Tensor:
    """How wrong `head` is about the soft tokens [I, W] of one picture: names summed over all, edges over the things."""
    guesses = head(ops.reference.rms_norm(features, None, 1e-6))
    wanted, counts = torch.zeros(len(features), len(SIGHTS)), torch.ones(len(features), len(SIGHTS))
    columns, lost = len(features) // rows, features.new_zeros(())
    for x, y, names, box in spots:
        at = min(rows - 1, int(y * rows)) * columns + min(columns - 1, int(x * columns))
        wanted[at, [SIGHTS.index(name) for name in names]] = 1
        if box:  # a thing is told by its colour or by its shape, and may be called anything of the other kind
            other = pictures.COLOURS if names[0] in pictures.SHAPES else pictures.SHAPES
            counts[at, [SIGHTS.index(name) for name in other]] = 0
        if box:
            edges = torch.tensor([min(EDGE_BINS - 1, int(v * EDGE_BINS)) for v in box])
            lost = lost + nn.functional.cross_entropy(
                guesses[at, len(SIGHTS) :].view(4, EDGE_BINS), edges, reduction="sum"
            )
    return lost + nn.functional.binary_cross_entropy_with_logits(
        guesses[:, : len(SIGHTS)], wanted, counts, reduction="sum"
    )


class Warmup(train.Run):
    """The towers alone: one process teaches the eye, one the ear, and they have nothing to tell each other."""

    def __init__(self, options: argparse.Namespace, rank: int, add_up: Any) -> None:
        self.sees = rank == 0
        super().__init__(options, rank, lambda flat: None)
        self.clocks = 1

    def new_model(self) -> Gemma4:
        model = new_model(self.options.text, self.options.seed)
        model.head = sight_head(model) if self.sees else nn.Linear(model.config.text.hidden_size, 1 + len(SPOKEN))
        return model

    def new_optimizers(self) -> list[torch.optim.Optimizer]:
        mine = ("vision", "head.") if self.sees else ("audio", "head.")
        return optimizers([(n, p) for n, p in self.model.named_parameters() if any(name in n for name in mine)])

    def new_steps(self, rng: random.Random) -> Iterator[Any]:
        generators, shares = zip(*TILE_GENERATORS, strict=True)
        while True:
            if self.sees:
                generator = rng.choices(generators, shares)[0]
                yield [draw(generator, rng, test=False) for _ in range(PICTURES_AT_ONCE)]
            else:
                yield [sounds.hear(rng) for _ in range(SOUNDS_AT_ONCE)]

    def loss(self, part: list[Case]) -> tuple[Tensor, float, int]:
        return (self.sight if self.sees else self.hearing)(part), len(part), len(part)

    def sight(self, part: list[Case]) -> Tensor:
        height, width = part[0].shown[0].data.shape[:2]
        pixels = torch.from_numpy(np.stack([cut(case.shown[0].data, 16).values for case in part]))
        seen = self.model.embed_vision(self.model.vision_tower(pixels, height // 16, width // 16))
        each = [sight_loss(self.model.head, x, height // TILE, c.spots) for x, c in zip(seen, part, strict=True)]
        return torch.stack(each).sum()

    def hearing(self, part: list[Case]) -> Tensor:
        """The sounds go through the tower as one, with silence between them that is longer than its memory."""
        gap = torch.full((4 * self.model.config.audio.attention_context_left, 128), math.log(FLOOR))
        mels = [torch.from_numpy(case.shown[0].data) for case in part]
        mels = [nn.functional.pad(mel, (0, 0, 0, -len(mel) % 4), value=math.log(FLOOR)) for mel in mels]
        heard = self.model.embed_audio(self.model.audio_tower(torch.cat([x for mel in mels for x in (mel, gap)])))
        guesses = self.model.head(ops.reference.rms_norm(heard, None, 1e-6)).log_softmax(-1)
        lost, start = heard.new_zeros(()), 0
        for case, mel in zip(part, mels, strict=True):
            text, end = case.reply["content"], start + len(mel) // 4
            words = [sounds.WORDS[int(d)] for d in text] if case.task == "spoken digits" else text.split()
            target = torch.tensor([1 + SPOKEN.index(word) for word in words])
            lost = lost + nn.functional.ctc_loss(
                guesses[start:end, None], target[None], torch.tensor([end - start]), torch.tensor([len(target)]),
                reduction="sum", zero_infinity=True,
            )  # fmt: skip
            start = end + len(gap) // 4
        return lost

    def go(self) -> None:
        progress, losses = 0.0, []
        while progress < 1:
            loss, progress = self.step(progress)
            losses.append(loss)
            if self.count % 50 == 0:
                self.log(part="eye" if self.sees else "ear", progress=progress, loss=sum(losses) / len(losses))
                losses = []
        self.save()

    def save(self) -> None:
        """Without the state of the optimisers: the part is short enough to be done again."""
        mine = "vision" if self.sees else "audio"
        state = {name: value for name, value in self.model.state_dict().items() if mine in name or "head." in name}
        torch.save(state, self.options.out / f"{mine}.pt")


class Together(train.Run):
    """Towers and text network, and the eye's head by their side."""

    def new_model(self) -> Gemma4:
        model = new_model(self.options.text, self.options.seed)
        model.head = sight_head(model)
        size = length(model)
        for tower in towers(self.options):
            state = torch.load(self.options.out / f"{tower}.pt", weights_only=True)
            if tower == "audio":  # its head is of no more use
                state = {name: value for name, value in state.items() if "head." not in name}
            matrix = state[f"embed_{tower}.embedding_projection.weight"]
            matrix.mul_(size / matrix.norm(dim=1).square().mean().sqrt())  # rows of unit length make unit elements
            model.load_state_dict(state, strict=False)
        return model

    def new_optimizers(self) -> list[torch.optim.Optimizer]:
        named = list(self.model.named_parameters())
        text = optimizers([(n, p) for n, p in named if "language_model" in n], TEXT_RATE)
        return text + optimizers([(n, p) for n, p in named if "language_model" not in n], 0.5)

    def new_steps(self, rng: random.Random) -> Iterator[Any]:
        exhibits = Exhibits(self.model.config, self.template)
        stream = documents(self.template, rng.getrandbits(60), exhibits, self.options.sensed)
        return train.steps(stream, rng, self.options.device)

    def loss(self, part: train.Step) -> tuple[Tensor, float, int]:
        lost, weight, seen = super().loss(part)
        if part.spots:
            assert part.batch.soft is not None
            features = part.batch.soft.features.split([span.length for span in part.spans])
            for at, spots in part.spots.items():
                rows = part.spans[at].item.rows * 16 // TILE
                lost = lost + SIGHT_WEIGHT * sight_loss(self.model.head, features[at], rows, spots)
        return lost, weight, seen

    def go(self) -> None:
        super().go()
        if self.rank == 0:
            self.bound()
            self.save()

    @torch.no_grad()
    def bound(self, parts: int = 20) -> None:
        """Set the ranges of clipped matrices to what occurs, a little wider."""

        def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            for side, value in (("input", inputs[0]), ("output", output)):
                for end, least in (("min", value.amin()), ("max", value.amax())):
                    pick = torch.minimum if end == "min" else torch.maximum
                    kept = getattr(module, f"{side}_{end}")
                    kept.copy_(least if kept.isinf() else pick(kept, least))

        clipped = [module for module in self.model.modules() if isinstance(module, ClippedLinear)]
        hooks = [module.register_forward_hook(watch) for module in clipped]
        for _ in range(parts):
            train.perceive(self.model, [span.item for span in next(self.steps).spans])
        for hook in hooks:
            hook.remove()
        for module in clipped:
            for name in ("input_min", "input_max", "output_min", "output_max"):
                getattr(module, name).mul_(1.1)

    def tests(self) -> dict[str, list[Document]]:
        from heldout import SENSES, cases

        exhibits = Exhibits(self.model.config, self.template)
        table = train.test_documents(self.template, self.options.tests)
        for entry in SENSES:
            drawn = cases(entry, 2 * self.options.tests)
            table[entry.name] = [document(case, self.template, exhibits=exhibits) for case in drawn]
        return table


def optimizers(named: list[tuple[str, nn.Parameter]], part: float = 1.0) -> list[torch.optim.Optimizer]:
    """As in train.py, at `part` of its rates."""
    matrices = [p for name, p in named if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(
            matrices, lr=part * train.MATRIX_RATE, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=part * train.VECTOR_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def towers(options: argparse.Namespace) -> tuple[str, ...]:
    """Those that are first trained alone: the eye in process 0, the ear in process 1."""
    return ("vision",) if options.eye_only else ("vision", "audio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=train.SHIPPED, help="the checkpoint to start from")
    parser.add_argument("--alone", type=float, default=18, help="minutes of processor time for the towers alone")
    parser.add_argument("--minutes", type=float, default=36, help="minutes of processor time for all together")
    parser.add_argument("--eye-only", action="store_true", help="leave the ear of --text as it is to begin with")
    parser.add_argument("--sensed", type=float, default=0.7, help="part of the conversations that show something")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--passes", type=int, default=1, help="forward passes per worker and step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--resume", action="store_true", help="go on from the last save of the joint part")
    parser.add_argument("--tests", type=int, default=10)
    parser.add_argument("--test-every", type=int, default=200)
    options = parser.parse_args()
    options.device, options.tokens = "cpu", math.inf
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    sounds.pool()
    if not all((options.out / f"{tower}.pt").exists() for tower in towers(options)):
        alone = {"minutes": options.alone, "resume": False, "passes": 1, "workers": len(towers(options))}
        train.start(argparse.Namespace(**{**vars(options), **alone}), Warmup)
    train.start(options, Together)


if __name__ == "__main__":
    main()
