"""The boxes that a model names in its answer, drawn into the picture it was asked about.

Coordinates are as Google publishes them for the family (ai.google.dev/gemma/docs/capabilities/vision/image): `box_2d`
holds [y0, x0, y1, x1], y first, on a grid of 1000 x 1000 whatever the picture's shape.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

GRID = 1000
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")


@dataclass(frozen=True, slots=True)
class Box:
    """A named rectangle on the grid, its corners in order."""

    top: float
    left: float
    bottom: float
    right: float
    label: str = ""


def boxes(text: str) -> list[Box]:
    """Every box in an answer: objects with `box_2d` in whatever JSON it holds, fenced or bare, at any depth."""
    found: list[Box] = []
    decoder, at = json.JSONDecoder(), 0
    while (start := min((i for i in (text.find("[", at), text.find("{", at)) if i >= 0), default=-1)) >= 0:
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
            continue
        _collect(value, found)
    return found


def _collect(value: Any, found: list[Box]) -> None:
    if isinstance(value, list):
        for part in value:
            _collect(part, found)
    elif isinstance(value, dict):
        corners = value.get("box_2d")
        if isinstance(corners, list) and len(corners) == 4 and all(_number(corner) for corner in corners):
            top, left, bottom, right = (min(max(float(corner), 0.0), GRID) for corner in corners)
            label = next((str(value[key]) for key in ("label", "name", "text") if value.get(key)), "")
            found.append(Box(min(top, bottom), min(left, right), max(top, bottom), max(left, right), label))
        else:
            for part in value.values():
                _collect(part, found)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def draw(picture: Image, found: list[Box]) -> Image:
    """A copy of the picture with every box and its label."""
    from PIL import ImageDraw, ImageFont

    drawn = picture.convert("RGB")
    pen, (width, height) = ImageDraw.Draw(drawn), picture.size
    thick = max(2, min(width, height) // 200)
    font = ImageFont.load_default(size=max(12, min(width, height) // 40))
    for number, box in enumerate(found):
        colour = COLOURS[number % len(COLOURS)]
        corners = (
            box.left * width / GRID,
            box.top * height / GRID,
            box.right * width / GRID,
            box.bottom * height / GRID,
        )
        pen.rectangle(corners, outline=colour, width=thick)
        if box.label:
            place = (corners[0] + thick, corners[1] + thick)
            pen.rectangle(pen.textbbox(place, box.label, font=font), fill=colour)
            pen.text(place, box.label, fill="white", font=font)
    return drawn


def check_target(out: Path) -> None:
    """Raise `InputError` where no picture could be saved: said before the model runs."""
    import PIL.Image

    if out.suffix.lower() not in PIL.Image.registered_extensions():
        raise InputError(f"--draw {out}: the ending must be one of a picture, such as .png or .jpg.")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise InputError(f"--draw {out}: nothing can be written there; name a file in a folder of yours that exists.")


def draw_answer(source: str | bytes, text: str, out: Path) -> int:
    """Draw the boxes of an answer into the picture that `source` names and save it; how many there were."""
    import PIL.Image

    from ..media.image import open_image
    from ..media.source import Policy, fetch

    policy = Policy.for_owner()
    picture = PIL.Image.fromarray(open_image(fetch(source, policy), policy.max_pixels))
    found = boxes(text)
    try:
        draw(picture, found).save(out)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"The drawing can't be written to {out} ({reason}); try a name that ends in .png.") from None
    return len(found)
