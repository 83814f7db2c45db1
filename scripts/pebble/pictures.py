"""Exercises about drawn shapes: what, how many, where, which way."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field

import numpy as np
from case import Case, Spot, look, says
from PIL import Image, ImageDraw
from shown import Shown

SIDE = 192
"""Pixels of a square picture: exactly the sixteen tiles that this checkpoint gives it, so that none is resized."""
COLOURS = {
    "red": (215, 40, 40), "green": (40, 150, 60), "blue": (45, 80, 205), "yellow": (235, 205, 45),
    "purple": (130, 50, 160), "orange": (240, 130, 30), "pink": (240, 140, 185), "brown": (115, 70, 35),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "hexagon")
UNSEEN = {
    ("red", "star"), ("green", "cross"), ("blue", "triangle"), ("yellow", "ring"), ("purple", "square"),
    ("orange", "circle"), ("pink", "hexagon"), ("brown", "diamond"),
}  # fmt: skip
"""Pairs that no training picture has; each colour and each shape occurs in the seven other pairs."""
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in UNSEEN)
ASKED = {
    "shape": ("What shape is this?", "Which shape do you see?"),
    "colour": ("What colour is it?", "Which colour does the shape have?"),
    "both": ("What is in the picture?", "What do you see?", "Describe the picture."),
}
"""Ways to ask for what a lone thing is."""
RGB = tuple[int, int, int]
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Thing:
    """A shape within a circle of radius `r` around (x, y), in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    r: float
    tint: RGB | None = field(default=None, repr=False)
    """What it is filled with instead of a tone of its colour."""

    @property
    def edges(self) -> tuple[float, ...]:
        """Top, left, bottom, right in parts of the sides."""
        corners = _outline(self.shape, self.x, self.y, self.r)
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        return tuple(v / SIDE for v in (min(ys), min(xs), max(ys), max(xs)))

    @property
    def box(self) -> list[int]:
        """[top, left, bottom, right] in thousandths of the sides, as the family writes boxes."""
        return [round(1000 * v) for v in self.edges]

    @property
    def spot(self) -> Spot:
        """With its colour if that has a name, else its shape: the eye's head never hears of both together."""
        return Spot(self.x / SIDE, self.y / SIDE, (self.shape if self.tint else self.colour,), self.edges)


def _ring(count: int, x: float, y: float, radii: tuple[float, ...], turn: float) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * i / count for i in range(count)]
    return [
        (x + radii[i % len(radii)] * math.cos(a), y + radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)
    ]


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners; those of the bounding square for round shapes."""
    up = -math.pi / 2
    if shape in ("circle", "ring"):
        return [(x - r, y - r), (x + r, y + r)]
    if shape == "cross":
        a = r * 0.33
        cross = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a)]
        return [(x + dx, y + dy) for dx, dy in [*cross, (-a, -a)]]
    if shape == "star":
        return _ring(10, x, y, (r, 0.42 * r), up)
    corners, turn = {"square": (4, math.pi / 4), "triangle": (3, up), "diamond": (4, up), "hexagon": (6, 0.0)}[shape]
    return [(x + (dx - x) * (0.72 if shape == "diamond" else 1), dy) for dx, dy in _ring(corners, x, y, (r,), turn)]


def fill(rng: random.Random, thing: Thing) -> RGB:
    """A tone of the thing's colour, or its tint."""
    r, g, b = (max(0, min(255, v + rng.randint(-14, 14))) for v in COLOURS[thing.colour])
    return thing.tint or (r, g, b)


def draw_things(rng: random.Random, things: list[Thing], ground: RGB) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), ground)
    pen = ImageDraw.Draw(picture)
    for thing in things:
        tone = fill(rng, thing)
        outline = _outline(thing.shape, thing.x, thing.y, thing.r)
        if thing.shape == "circle":
            pen.ellipse(outline, fill=tone)
        elif thing.shape == "ring":
            pen.ellipse(outline, outline=tone, width=max(3, round(thing.r * 0.34)))
        else:
            pen.polygon(outline, fill=tone)
    return picture


def ground(rng: random.Random) -> RGB:
    """A pale or a dark background."""
    grey = rng.choice((rng.randint(225, 255), rng.randint(5, 35)))
    r, g, b = (max(0, min(255, grey + rng.randint(-8, 8))) for _ in range(3))
    return r, g, b


def show(rng: random.Random, things: list[Thing]) -> tuple[Shown, list[Spot]]:
    pixels = np.asarray(draw_things(rng, things, ground(rng)))
    return Shown("image", pixels), [thing.spot for thing in things]


def place(rng: random.Random, colour: str, shape: str, small: float = 22, large: float = 70) -> Thing:
    r = rng.uniform(small, large)
    return Thing(colour, shape, rng.uniform(r + 2, SIDE - r - 2), rng.uniform(r + 2, SIDE - r - 2), r)


def article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def named(thing: Thing, kind: str) -> str:
    """The answer to a question of ASKED."""
    answer = {"shape": thing.shape, "colour": thing.colour, "both": f"{article(thing.colour)} {thing.shape}"}[kind]
    return f"{answer[0].upper()}{answer[1:]}."


def _name(rng: random.Random, colour: str, shape: str, task: str, kind: str) -> Case:
    thing = place(rng, colour, shape)
    asked = {each: rng.choice(ASKED[each]) for each in ASKED}
    choices = {"shape": len(SHAPES), "colour": len(COLOURS), "both": len(COLOURS) * len(SHAPES)}[kind]
    shown, spots = show(rng, [thing])
    messages, reply = [look(shown, asked[kind])], says(named(thing, kind))
    return Case(task, repr(thing), messages, reply, choices=choices, shown=[shown], spots=spots)


def name_it(rng: random.Random) -> Case:
    """Shape, colour or both of one thing."""
    return _name(rng, *rng.choice(PAIRS), "shapes and colours", rng.choice(("shape", "colour", "both")))


def unseen_pair(rng: random.Random) -> Case:
    """Both, of a pair that training never shows."""
    return _name(rng, *rng.choice(sorted(UNSEEN)), "unseen pairs", "both")


def apart(rng: random.Random, pairs: list[tuple[str, str]], small: float = 17, large: float = 30) -> list[Thing]:
    """Things that don't touch."""
    things: list[Thing] = []
    while len(things) < len(pairs):
        thing = place(rng, *pairs[len(things)], small, large)
        if all(math.hypot(thing.x - o.x, thing.y - o.y) > thing.r + o.r + 3 for o in things):
            things.append(thing)
    return things


def crowd(rng: random.Random) -> tuple[int, str, list[Thing]]:
    """One to six of a shape, first in the list, and up to three others."""
    number, (_, shape) = rng.randint(1, 6), rng.choice(PAIRS)
    wanted = [pair for pair in PAIRS if pair[1] == shape]
    others = [pair for pair in PAIRS if pair[1] != shape]
    pairs = [rng.choice(wanted) for _ in range(number)] + [rng.choice(others) for _ in range(rng.randint(0, 3))]
    return number, shape, apart(rng, pairs)


def ask_number(rng: random.Random, shape: str) -> str:
    plural = {"cross": "crosses"}.get(shape, f"{shape}s")
    return rng.choice((f"How many {plural} are there?", f"Count the {plural}."))


def count(rng: random.Random) -> Case:
    """How many of one shape, up to three others among them."""
    number, shape, things = crowd(rng)
    shown, spots = show(rng, things)
    question = ask_number(rng, shape)
    return Case(
        "count", repr(things), [look(shown, question)], says(f"{number}."), choices=6, shown=[shown], spots=spots
    )


def two(rng: random.Random) -> list[Thing]:
    """Things that differ in colour or shape."""
    pairs = [rng.choice(PAIRS) for _ in range(2)]
    while pairs[0] == pairs[1]:
        pairs[1] = rng.choice(PAIRS)
    return apart(rng, pairs, 20, 46)


def box(rng: random.Random) -> Case:
    """The box around one of two things."""
    things = two(rng)
    wanted = things[0]
    shown, spots = show(rng, rng.sample(things, 2))
    label = f"{wanted.colour} {wanted.shape}"
    reply = says(json.dumps([{"box_2d": wanted.box, "label": label}], separators=(",", ":")))
    messages = [look(shown, f"Give the box of the {label}.")]
    return Case("box", repr(things), messages, reply, score="box", shown=[shown], spots=spots)


def moving(rng: random.Random, frames: int) -> tuple[str, list[Thing], Shown]:
    """A clip of one thing that goes the same way in as many frames, and which way."""
    way = rng.choice(list(WAYS))
    dx, dy = WAYS[way]
    colour, shape = rng.choice(PAIRS)
    r, stride, paper = rng.uniform(18, 34), rng.uniform(22, 36), ground(rng)
    reach = 1.5 * stride
    middle = [rng.uniform(r + 2 + reach * abs(d), SIDE - r - 2 - reach * abs(d)) for d in (dx, dy)]
    offsets = [stride * (i - (frames - 1) / 2) * (3 / (frames - 1)) for i in range(frames)]
    steps = [Thing(colour, shape, middle[0] + dx * offset, middle[1] + dy * offset, r) for offset in offsets]
    state = rng.getstate()
    pixels = []
    for step in steps:  # the same tone in every frame
        rng.setstate(state)
        pixels.append(np.asarray(draw_things(rng, [step], paper)))
    return way, steps, Shown("video", np.stack(pixels))


def ask_way(rng: random.Random, thing: Thing) -> str:
    return rng.choice((f"Which way does the {thing.shape} move?", f"Where does the {thing.colour} {thing.shape} go?"))


def motion(rng: random.Random) -> Case:
    """Which way a thing goes, in four frames."""
    way, steps, shown = moving(rng, 4)
    messages = [look(shown, ask_way(rng, steps[0]))]
    return Case("motion", repr(steps), messages, says(f"{way.capitalize()}."), choices=4, shown=[shown])
