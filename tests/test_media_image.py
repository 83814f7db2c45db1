"""Pictures: sizes, counts, patches and positions as the published processor makes them, and every kind of file."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    convert_image_to_patches,
    get_aspect_ratio_preserving_size,
)

from cabochon.errors import MediaError
from cabochon.media import image

LIMIT = 64_000_000


def sizes(count: int) -> list[tuple[int, int]]:
    """Height and width from 1 to 6,000, spread over all scales, extreme ratios included."""
    draw = np.random.default_rng(20260402)
    return [tuple(int(x) for x in np.exp(draw.uniform(0, np.log(6000), 2))) for _ in range(count)]


def file(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_sizes_and_counts_equal_reference():
    for height, width in sizes(500):
        for budget in image.BUDGETS:
            expected = get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
            assert image.target_size(height, width, budget) == expected, (height, width, budget)
            assert image.soft_tokens(height, width, budget) == expected[0] * expected[1] // 2304 <= budget


@pytest.mark.parametrize("size", [(224, 224), (480, 640), (100, 3000), (37, 51), (1, 1), (1, 700), (767, 768)])
@pytest.mark.parametrize("budget", [70, 280])
def test_patches_and_positions_equal_reference(size, budget):
    pixels = noise(*size)
    theirs = Gemma4ImageProcessorPil()([Image.fromarray(pixels)], max_soft_tokens=budget, return_tensors="np")
    patches = image.cut(image.resize(pixels, budget), 16)
    count = len(patches.values)
    assert count // 9 == theirs["num_soft_tokens_per_image"][0] == image.soft_tokens(*size, budget)
    np.testing.assert_allclose(patches.values / 255, theirs["pixel_values"][0][:count], atol=1e-6)
    np.testing.assert_array_equal(patches.positions, theirs["image_position_ids"][0][:count])
    assert (theirs["image_position_ids"][0][count:] == -1).all()


def test_tiles_of_48_are_their_nine_patches():
    """The encoder-free model's tile holds the same pixels in plain row order."""
    pixels = noise(96, 144)
    tiles = image.cut(pixels, 48)
    assert (tiles.rows, tiles.columns) == (2, 3)
    np.testing.assert_array_equal(tiles.values[4].reshape(48, 48, 3), pixels[48:96, 48:96])
    np.testing.assert_array_equal(tiles.values, convert_image_to_patches(pixels.transpose(2, 0, 1), 48))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16", "I", "CMYK", "PA"])
def test_every_mode_becomes_rgb(mode):
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    base = Image.fromarray(grey)
    if mode == "I;16":
        base = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        base = Image.fromarray((grey.astype(np.int32) * 257), "I")
    else:
        colour = base.convert("RGB")
        palette = colour.quantize(64)
        base = {"P": palette, "PA": palette.convert("PA")}.get(mode) or colour.convert(mode)
    data = file(base, "TIFF" if mode in ("CMYK", "PA", "I") else "PNG")
    pixels = image.open_image(data, LIMIT)
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    if mode != "1":
        assert np.abs(pixels[:, :, 0].astype(int) - grey).max() <= 8


def test_transparency_lies_over_white():
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (image.open_image(file(picture), LIMIT) == 255).all()


def test_exif_orientation_turns_the_picture():
    picture = Image.fromarray(noise(20, 30))
    exif = picture.getexif()
    exif[0x0112] = 6
    assert image.open_image(file(picture, exif=exif), LIMIT).shape == (30, 20, 3)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pixels = image.open_image(file(frames[0], "GIF", save_all=True, append_images=frames[1:]), LIMIT)
    assert tuple(pixels[0, 0]) == (255, 0, 0)


def test_bombs_are_refused_before_they_are_decoded():
    data = file(Image.new("1", (9000, 9000)))
    assert len(data) < 20_000
    with pytest.raises(MediaError, match=r"9000 x 9000 = 81,000,000 pixels, but at most 64,000,000"):
        image.open_image(data, LIMIT)
    with pytest.raises(MediaError, match="more than the 1,000 pixels allowed"):
        image.open_image(file(Image.new("1", (40000, 40000))), 1000)


@pytest.mark.parametrize(
    ("size", "options", "budget"),
    [
        ((480, 640), {}, 280),
        ((480, 640), {"detail": "low"}, 70),
        ((480, 640), {"detail": "high"}, 1120),
        ((96, 96), {"detail": "auto"}, 70),
        ((480, 480), {"detail": "auto"}, 140),
        ((480, 640), {"detail": "auto"}, 280),
        ((4000, 3000), {"detail": "auto"}, 280),
        ((480, 640), {"max_soft_tokens": 560}, 560),
        ((480, 640), {"max_soft_tokens": 560, "detail": "low"}, 560),
    ],
)
def test_budget_follows_the_content_part(size, options, budget):
    assert image.choose_budget(*size, options, 1120) == budget


def test_budget_and_the_cap():
    assert image.choose_budget(480, 640, {"detail": "high"}, 300) == 280
    assert image.choose_budget(480, 640, {}, 140) == 140
    with pytest.raises(MediaError, match="max_soft_tokens is 1120, but this server allows at most 280"):
        image.choose_budget(480, 640, {"max_soft_tokens": 1120}, 280)
    with pytest.raises(MediaError, match="must be one of 70, 140, 280, 560, 1120"):
        image.choose_budget(480, 640, {"max_soft_tokens": 100}, 1120)
    with pytest.raises(MediaError, match="low, high or auto"):
        image.choose_budget(480, 640, {"detail": "ultra"}, 1120)


def test_a_checkpoint_with_a_budget_of_its_own_knows_no_other():
    for options in ({}, {"detail": "low"}, {"detail": "high"}, {"detail": "auto"}, {"max_soft_tokens": 16}):
        assert image.choose_budget(480, 640, options, 1120, usual=16) == 16
    with pytest.raises(MediaError, match="max_soft_tokens is 70, but must be one of 16"):
        image.choose_budget(480, 640, {"max_soft_tokens": 70}, 1120, usual=16)
    assert image.choose_budget(480, 640, {}, 1120, usual=70) == 70
    assert image.choose_budget(480, 640, {"max_soft_tokens": 560}, 1120, usual=70) == 560
