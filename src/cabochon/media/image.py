"""Pictures: the bytes of a file -> RGB pixels -> patches within a budget of soft tokens.

The resized picture is always a whole number of 48-pixel tiles (3 x 3 patches of 16), one soft token each; small
pictures are scaled up as well. So counts follow from height and width alone, before anything is resized or encoded.

Resizing is Pillow's bicubic filter on 8-bit values. torchvision, which the published processor uses where it is
installed, computes the same filter with wider intermediate values; the two differ by at most one step of 255.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import MediaError

Pixels = NDArray[np.uint8]

BUDGETS = (70, 140, 280, 560, 1120)
"""The soft-token budgets that the models were trained with."""
DEFAULT_BUDGET = 280
TILE = 48
"""Pixels of one soft token's side: 3 patches of 16."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "AVIF", "JPEG2000")
"""What is opened. Pillow knows more, but some of its readers start other programs or follow links (EPS, WMF)."""


@dataclass(frozen=True, slots=True)
class Patches:
    """A picture cut into square patches, row by row.

    `values` [I, side * side * 3] uint8 in (row, column, colour) order inside the patch; I = rows * columns.
    """

    values: Pixels
    rows: int
    columns: int

    @property
    def positions(self) -> NDArray[np.int64]:
        """[I, 2]: (x, y) = (column, row) of every patch."""
        y, x = np.divmod(np.arange(self.rows * self.columns), self.columns)
        return np.stack([x, y], -1)


def open_image(data: bytes, max_pixels: int) -> Pixels:
    """The first frame of a picture file as upright RGB [H, W, 3], transparency over white.

    16-bit greys are scaled to 8 bits (Pillow alone would clip them). Raises `MediaError` for anything that is not one
    of `FORMATS`, is damaged, or has more than `max_pixels`; the size is read before the pixels are.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs and odd metadata; our own limit decides
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
            if width * height > max_pixels:
                raise MediaError(
                    f"The image is {width} x {height} = {width * height:,} pixels, but at most {max_pixels:,} are "
                    "allowed; scale it down."
                )
            picture.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"The image has far more than the {max_pixels:,} pixels allowed; scale it down.") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"The data ({len(data):,} bytes) is not an image of a kind that can be read ({', '.join(FORMATS)})."
        ) from error
    except Exception as error:  # foreign bytes: Pillow's readers raise whatever struct, zlib and indexing raise
        raise MediaError(f"The image ({len(data):,} bytes) is damaged or cut short and can't be read.") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        grey = np.asarray(picture, np.float64)
        top = 65535 if picture.mode != "F" or grey.max(initial=0) > 255 else (255 if grey.max(initial=0) > 1 else 1)
        return Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def target_size(height: int, width: int, budget: int) -> tuple[int, int]:
    """Height and width after resizing to `budget` soft tokens: the aspect ratio kept, whole tiles, rounded down.

    The formula is that of the published image processor (fact sheet, 5.1). A picture so thin that one side would
    vanish gets one tile there and a whole-number aspect ratio.
    """
    factor = math.sqrt(budget * TILE * TILE / (height * width))
    rows, columns = math.floor(factor * height / TILE), math.floor(factor * width / TILE)
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    return rows * TILE, columns * TILE


def soft_tokens(height: int, width: int, budget: int) -> int:
    """How many soft tokens a picture of that size becomes; at most `budget`."""
    rows, columns = target_size(height, width, budget)
    return rows * columns // (TILE * TILE)


def choose_budget(height: int, width: int, options: dict[str, Any], cap: int, usual: int = DEFAULT_BUDGET) -> int:
    """The budget that a content part asks for: `max_soft_tokens`, or OpenAI's `detail`, or `usual`.

    A checkpoint whose usual budget is none of the family's was trained with that one alone, and takes no other.

    low is 70, high 1120, auto the smallest budget that does not shrink the picture, at most the usual one. low, high
    and auto give way to `cap` (the server's `--max-image-tokens`); an explicit number above it is refused.
    """
    budgets = BUDGETS if usual in BUDGETS else (usual,)
    allowed = [budget for budget in budgets if budget <= cap]
    if not allowed:
        raise MediaError(f"The cap on image tokens is {cap}, but the smallest budget is {budgets[0]}.")
    wanted = options.get("max_soft_tokens")
    if wanted is not None:
        if wanted not in budgets or isinstance(wanted, bool):
            raise MediaError(f"max_soft_tokens is {wanted!r}, but must be one of {', '.join(map(str, budgets))}.")
        if wanted > cap:
            raise MediaError(f"max_soft_tokens is {wanted}, but this server allows at most {cap} per image.")
        return int(wanted)
    detail = options.get("detail")
    if detail is None:
        return min(usual, allowed[-1])
    if detail == "low":
        return allowed[0]
    if detail == "high":
        return allowed[-1]
    if detail != "auto":
        raise MediaError(f"detail is {detail!r}, but must be low, high or auto.")
    for budget in allowed:
        rows, columns = target_size(height, width, budget)
        if budget >= usual or (rows >= height and columns >= width):
            return budget
    return allowed[-1]


def resize(pixels: Pixels, budget: int) -> Pixels:
    """[H, W, 3] -> [H', W', 3] with the sides of `target_size`; untouched where they already fit."""
    height, width = target_size(pixels.shape[0], pixels.shape[1], budget)
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def cut(pixels: Pixels, side: int) -> Patches:
    """[H, W, 3] -> its patches of `side` pixels: 16 for the models with a vision tower, 48 for those without."""
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    tiles = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return Patches(np.ascontiguousarray(tiles).reshape(rows * columns, side * side * 3), rows, columns)
