"""A prompt of text, two images, a video and a sound, for us and for the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cabochon.config import ModelConfig, UnifiedVisionConfig
from cabochon.engine.request import SoftSpan
from cabochon.media import audio, image
from support.toys import IDS, random_ids

IMAGES = ((240, 192), (48, 96))
"""20 and 2 soft tokens: one image is wider than the toys' window."""
FRAMES = ((96, 96),) * 3
SAMPLES = 2500


@dataclass
class Mixed:
    """Ids with placeholders, the spans of their soft tokens, and what the reference's `forward` takes besides."""

    ids: list[int]
    spans: tuple[SoftSpan, ...]
    reference: dict[str, Tensor]


def mixed(config: ModelConfig, *, seed: int = 0, text: int = 7) -> Mixed:
    """Text, image, text, sound, text, three frames with text between, an image, text."""
    hears, side = config.audio is not None, 48 if isinstance(config.vision, UnifiedVisionConfig) else 16
    draw = np.random.default_rng(seed)
    ids: list[int] = []
    spans: list[SoftSpan] = []

    def words(count: int) -> None:
        ids.extend(random_ids(count, seed=seed * 100 + len(ids)))

    def soft(kind: str, item: Any, count: int) -> None:
        sound = kind == "audio"
        ids.append(IDS["boa_token_id" if sound else "boi_token_id"])
        two_way = config.text.two_way_spans and not sound
        spans.append(SoftSpan(len(ids), count, bytes([seed, len(spans)]), item, two_way))
        ids.extend([IDS[f"{kind}_token_id"]] * count)
        ids.append(IDS["eoa_token_index" if sound else "eoi_token_id"])

    def picture(size: tuple[int, int]) -> tuple[image.Patches, int]:
        pixels = draw.integers(0, 256, (*size, 3)).astype(np.uint8)
        return image.cut(pixels, side), size[0] * size[1] // 2304

    pictures = [picture(size) for size in IMAGES]
    frames = [picture(size) for size in FRAMES]
    wave = (draw.standard_normal(SAMPLES) * 0.1).astype(np.float32)
    words(text)
    soft("image", *pictures[0])
    words(3)
    tower = side == 16
    heard = audio.log_mel(wave) if tower else audio.raw_frames(wave)
    if hears:
        soft("audio", heard, audio.soft_tokens(SAMPLES, tower=tower))
        words(2)
    for frame in frames:
        words(1)
        soft("video", *frame)
    soft("image", *pictures[1])
    words(text)
    return Mixed(ids, tuple(spans), _reference(ids, pictures, frames, heard if hears else None))


def _reference(ids: list[int], pictures: list[Any], frames: list[Any], heard: Any) -> dict[str, Tensor]:
    pixels, positions = _filled([patches for patches, _ in pictures])
    video, video_positions = _filled([patches for patches, _ in frames])
    kinds = {IDS["image_token_id"]: 1, IDS["video_token_id"]: 2, IDS["audio_token_id"]: 3}
    out = {
        "pixel_values": pixels,
        "image_position_ids": positions,
        "pixel_values_videos": video,
        "video_position_ids": video_positions,
        "num_frames_per_video": torch.tensor([len(frames)]),
        "mm_token_type_ids": torch.tensor([[kinds.get(i, 0) for i in ids]]),
    }
    if heard is not None:
        out["input_features"] = torch.from_numpy(heard)[None]
        out["input_features_mask"] = torch.ones(1, len(heard), dtype=torch.bool)
    return out


def _filled(pictures: list[image.Patches]) -> tuple[Tensor, Tensor]:
    """Values in 0..1 and positions, all filled up to the largest picture as the published processor does."""
    most = max(len(p.values) for p in pictures)
    values = [np.pad(p.values / np.float32(255), ((0, most - len(p.values)), (0, 0))) for p in pictures]
    places = [np.pad(p.positions, ((0, most - len(p.values)), (0, 0)), constant_values=-1) for p in pictures]
    return torch.from_numpy(np.stack(values)), torch.from_numpy(np.stack(places))
