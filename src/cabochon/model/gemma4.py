"""The whole model. Attribute names are the checkpoint's without the leading `model.`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config import AudioConfig, ModelConfig, UnifiedVisionConfig, VisionConfig
from ..media.image import Patches
from ..ops import cpu
from .audio import AudioTower
from .batch import Batch
from .layers import Projector
from .text import Text
from .unified import VisionEmbedder
from .vision import VisionTower

MediaItem = Patches | NDArray[np.float32]
"""What is encoded: a picture's patches, or a sound's mel frames [frames, 128] (12B: raw frames [frames, 640])."""

PATCHES_AT_ONCE = 10_080
"""Patches of equal pictures that go through a tower together: one picture of the largest budget, 16 video frames."""


class Gemma4(nn.Module):
    """Text in every size; towers where the config has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = Text(config.text)
        width, vision, audio = config.text.hidden_size, config.vision, config.audio
        if isinstance(vision, VisionConfig):
            self.vision_tower = VisionTower(vision)
            self.embed_vision = Projector(vision.hidden_size, width, vision.rms_norm_eps)
        elif vision is not None:
            self.vision_embedder = VisionEmbedder(vision)
            self.embed_vision = Projector(vision.mm_embed_dim, width, vision.rms_norm_eps)
        if isinstance(audio, AudioConfig):
            self.audio_tower = AudioTower(audio)
            self.embed_audio = Projector(audio.output_proj_dims, width, audio.rms_norm_eps)
        elif audio is not None:
            self.embed_audio = Projector(audio.audio_embed_dim, width, audio.rms_norm_eps)

    def forward(self, batch: Batch) -> Tensor:
        """The logits [L, V] float32 of the rows that `batch` wants."""
        return self.step(batch)[0]

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits of the rows that `batch` wants, and their normed hidden states [L, D], which a drafter reads."""
        with cpu.alone(self.language_model.norm.weight):
            hidden = self.language_model.hidden(batch)
            return self.language_model.logits(hidden), hidden

    def encode(self, items: Sequence[MediaItem]) -> list[Tensor]:
        """The soft tokens [n, D] of every item, in order. On a GPU, pictures of one size go through together."""
        features: dict[int, Tensor] = {}
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, item in enumerate(items):
            if isinstance(item, Patches):
                alike[item.rows, item.columns].append(i)
            else:
                features[i] = self._hear(item)
        for (rows, columns), group in alike.items():
            alone = self.language_model.norm.weight.device.type == "cpu"  # nothing to gain, and the planner counts one
            most = 1 if alone else max(1, PATCHES_AT_ONCE // (rows * columns))
            for first in range(0, len(group), most):
                some = group[first : first + most]
                pixels = torch.from_numpy(np.stack([items[i].values for i in some]))  # type: ignore[union-attr]  # one kind
                features |= zip(some, self._see(pixels, rows, columns), strict=True)
        return [features[i] for i in range(len(items))]

    def _see(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """[B, rows * columns, pixels] uint8 -> [B, n, D]."""
        tower = self.vision_embedder if isinstance(self.config.vision, UnifiedVisionConfig) else self.vision_tower
        out: Tensor = self.embed_vision(tower(pixels.to(self.language_model.norm.weight.device), rows, columns))
        return out

    def _hear(self, frames: NDArray[np.float32]) -> Tensor:
        """[frames, width] -> [n, D]."""
        x = torch.from_numpy(frames).to(self.language_model.norm.weight)
        out: Tensor = self.embed_audio(self.audio_tower(x) if isinstance(self.config.audio, AudioConfig) else x)
        return out
