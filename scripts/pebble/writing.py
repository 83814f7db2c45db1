"""Exercises about print: numbers of three to eight digits in many typefaces, and bar charts."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
from case import Case, Spot, look, says
from pictures import COLOURS, SIDE
from PIL import Image, ImageDraw, ImageFont
from shown import Shown
from sources import package

ALPHABET = "0123456789"
"""Letters too would take several times the training; an eye of this size learns ten signs in a few minutes."""
WIDE = (96, 384)
"""Height and width of a line of print: two rows of eight tiles."""
FACES = ("lato", "open-sans", "merriweather", "noto-serif", "pt-serif", "roboto", "source-code-pro", "oswald")
UNSEEN_FACES = ("arimo", "tinos", "inconsolata")


@functools.cache
def _files(face: str) -> tuple[Path, ...]:
    folder = package(f"@fontsource/{face}") / "files"
    return tuple(sorted(folder.glob(f"{face}-latin-[47]00-normal.woff")))


@functools.cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _read(rng: random.Random, faces: tuple[str, ...]) -> Case:
    word = "".join(rng.choices(ALPHABET, k=rng.randint(3, 8)))
    path = rng.choice(_files(rng.choice(faces)))
    height, width = WIDE
    size = rng.randrange(50, 80, 2)
    left, top, right, bottom = _font(path, size).getbbox(word)
    while right - left > width - 8 or bottom - top > height - 6:
        size -= 2
        left, top, right, bottom = _font(path, size).getbbox(word)
    font = _font(path, size)
    x, y = rng.uniform(4, width - 4 - (right - left)) - left, rng.uniform(3, height - 3 - (bottom - top)) - top
    paper = tuple(rng.randint(215, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    picture = Image.new("RGB", (width, height), paper)
    ImageDraw.Draw(picture).text((x, y), word, font=font, fill=ink)
    middle = (y + (top + bottom) / 2) / height
    spots = [
        Spot((x + font.getlength(word[:i]) + font.getlength(character) / 2) / width, middle, (character,))
        for i, character in enumerate(word)
    ]
    shown = Shown("image", np.asarray(picture))
    question = rng.choice(("What does it say?", "Read the number.", "What is written here?"))
    return Case("read", word, [look(shown, question)], says(word), score="characters", shown=[shown], spots=spots)


def read(rng: random.Random) -> Case:
    """A line of print, in the typefaces for training."""
    return _read(rng, FACES)


def read_unseen(rng: random.Random) -> Case:
    """The same in typefaces that training never uses."""
    return _read(rng, UNSEEN_FACES)


def bars(rng: random.Random) -> tuple[dict[str, int], Shown, list[Spot]]:
    """Three to five bars: colour to height, left to right; lines mark every unit up to nine."""
    number = rng.randint(3, 5)
    values, colours = [rng.randint(1, 9) for _ in range(number)], rng.sample(list(COLOURS), number)
    picture = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    floor, unit, pitch = 182, 19, 180 / number
    for line in range(10):
        pen.line(
            (6, floor - unit * line, 186, floor - unit * line), fill=(60, 60, 60) if line == 0 else (205, 205, 205)
        )
    spots = []
    for i, (value, colour) in enumerate(zip(values, colours, strict=True)):
        x = 6 + pitch * (i + 0.5)
        pen.rectangle((x - pitch * 0.3, floor - unit * value, x + pitch * 0.3, floor), fill=COLOURS[colour])
        edges = (floor - unit * value, x - pitch * 0.3, floor, x + pitch * 0.3)
        spots.append(Spot(x / SIDE, edges[0] / SIDE, (colour,), tuple(edge / SIDE for edge in edges)))
    return dict(zip(colours, values, strict=True)), Shown("image", np.asarray(picture)), spots


def highest(heights: dict[str, int]) -> str | None:
    """The colour of the highest bar, if there is one."""
    first, second = sorted(heights, key=lambda colour: -heights[colour])[:2]
    return first if heights[first] > heights[second] else None


def chart(rng: random.Random) -> Case:
    """The height of one bar, or the highest bar."""
    heights, shown, spots = bars(rng)
    top = highest(heights)
    if top is not None and rng.random() < 0.4:
        question, answer, choices = "Which bar is the highest?", top.capitalize(), len(heights)
    else:
        colour = list(heights)[rng.randrange(len(heights))]
        question, answer, choices = f"How high is the {colour} bar?", str(heights[colour]), 9
    content = repr((list(heights.values()), list(heights)))
    return Case(
        "chart", content, [look(shown, question)], says(f"{answer}."), choices=choices, shown=[shown], spots=spots
    )
