"""How the 12B sees and hears: no encoders, a few norms and matrices from raw pixels and samples to embeddings.

The parameter names follow the checkpoint: the picture's own layers are `vision_embedder`, its last matrix is
`embed_vision`, and sound has only `embed_audio` (a `layers.Projector` over frames of 640 samples).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import UnifiedVisionConfig

LAYER_NORM_EPS = 1e-5
"""The reference leaves these three norms at torch's default."""


class VisionEmbedder(nn.Module):
    """One matrix over tiles of 48 x 48 pixels, with a learned vector for the column and one for the row."""

    def __init__(self, config: UnifiedVisionConfig) -> None:
        super().__init__()
        pixels, width = 3 * config.model_patch_size**2, config.mm_embed_dim
        self.patch_ln1 = nn.LayerNorm(pixels, LAYER_NORM_EPS)
        self.patch_dense = nn.Linear(pixels, width)
        self.patch_ln2 = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.pos_embedding = nn.Parameter(torch.empty(config.mm_posemb_size, 2, width))
        self.pos_norm = nn.LayerNorm(width, LAYER_NORM_EPS)

    def forward(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """`pixels` [B, rows * columns, 3 * side^2] uint8 -> [B, rows * columns, width]."""
        weight = self.patch_dense.weight
        scaled = pixels.to(torch.promote_types(weight.dtype, torch.float32)) / 255.0
        x = self.patch_ln2(self.patch_dense(self.patch_ln1(scaled.to(weight.dtype))))
        at = torch.arange(rows * columns, device=pixels.device)
        place = self.pos_embedding[at % columns, 0] + self.pos_embedding[at // columns, 1]
        out: Tensor = self.pos_norm(x + place)
        return out
