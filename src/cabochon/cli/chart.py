"""The picture of a plan: memory against context, stacked, with the line of what there is."""

from __future__ import annotations

import io
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont

from ..config import ModelConfig
from ..sizing import MemoryPlan, units
from ..sizing.memory import measure
from ..sizing.plan import resolve

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 90, 230, 50, 60
LAYERS = (
    ("weights", (66, 103, 172)),
    ("runtime", (150, 150, 150)),
    ("activations", (222, 170, 60)),
    ("kept windows", (120, 170, 90)),
    ("cache pages", (190, 80, 80)),
)


def memory_chart(made: MemoryPlan, asked: str | ModelConfig) -> bytes:
    """A PNG: the x axis doubles from 1k to twice the plan's context, within the model's limit."""
    config, drafter, _ = resolve(asked)
    contexts = _contexts(made, config)
    stacks = [_stack(made, config, drafter, context) for context in contexts]
    top = 1.1 * max(made.available, *(sum(stack) for stack in stacks))
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(contexts) - 1)

    def at(i: int, size: float) -> tuple[float, float]:
        return LEFT + i * step, HEIGHT - BOTTOM - size / top * (HEIGHT - TOP - BOTTOM)

    below = [0.0] * len(contexts)
    for layer, (name, colour) in enumerate(LAYERS):
        above = [base + stack[layer] for base, stack in zip(below, stacks, strict=True)]
        upper = [at(i, size) for i, size in enumerate(above)]
        lower = [at(i, size) for i, size in enumerate(below)]
        draw.polygon([*upper, *reversed(lower)], fill=colour)
        y = TOP + 26 * (len(LAYERS) - layer)
        draw.rectangle((WIDTH - RIGHT + 20, y, WIDTH - RIGHT + 36, y + 16), fill=colour)
        draw.text((WIDTH - RIGHT + 44, y - 1), name, fill="black", font=font)
        below = above
    left, line = at(0, made.available)
    right, _ = at(len(contexts) - 1, 0)
    draw.line((left, line, right, line), fill="black", width=2)
    draw.text((right, line - 4), f"there is {units.gib(made.available)}", fill="black", font=font, anchor="rb")
    for i, context in enumerate(contexts):
        draw.text((at(i, 0)[0], HEIGHT - BOTTOM + 10), units.kilo(context), fill="black", font=font, anchor="mt")
    for part in range(5):
        size = top * part / 4
        draw.text((LEFT - 8, at(0, size)[1]), units.gib(size), fill="black", font=font, anchor="rm")
    title = f"{made.model}, {made.work.precision}, {made.work.users} users on {made.hardware.name}"
    draw.text((LEFT, 18), title, fill="black", font=font)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _contexts(made: MemoryPlan, config: ModelConfig) -> list[int]:
    most = min(config.text.max_position_embeddings, max(2048, 2 * made.work.context))
    doubling = [1024 << i for i in range(20) if 1024 << i < most]
    return [*doubling, most]


def _stack(made: MemoryPlan, config: ModelConfig, drafter: ModelConfig | None, context: int) -> tuple[int, ...]:
    took = measure(config, replace(made.work, context=context, images=0), made.hardware, drafter)
    return took.on_device, took.runtime, took.activations + took.encoder, took.snapshots, took.pool
