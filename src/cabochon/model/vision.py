"""The vision tower of E2B, E4B, 26B-A4B and 31B: patches in, soft tokens out.

Pictures of one size go through together as [B, I, ...] and nothing is padded: the reference fills every picture up to
the budget and masks what it added, here a batch holds one grid only. As patches lie row by row, pooling is a mean over
two axes of a view.

Letters: B pictures, I patches of each, N heads, H head width, W tower width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..config import VisionConfig
from .layers import ClippedLinear, Linear, RMSNorm

Angles = tuple[Tensor, Tensor]


def axial_angles(x: Tensor, y: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Angles:
    """cos and sin [I, 1, 2, H / 4] for patches at column `x` and row `y`: the first half of a head turns by x."""
    exponent = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=x.device) / (head_dim // 2)
    angle = torch.stack([x, y], -1).float()[..., None] * (1.0 / theta**exponent)
    return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)


class PatchEmbedder(nn.Module):
    """A matrix over the patch's pixels, plus one learned vector for its column and one for its row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding_table = nn.Parameter(torch.empty(2, config.position_embedding_size, config.hidden_size))

    def forward(self, pixels: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """`pixels` [B, I, 3 * side^2] uint8, columns `x` and rows `y` [I] -> [B, I, W]."""
        table = self.position_embedding_table
        scaled = 2.0 * (pixels.to(torch.promote_types(table.dtype, torch.float32)) / 255.0 - 0.5)
        seen = ops.clipped_linear(scaled.to(table.dtype), self.input_proj.weight, None)
        return seen + (table[0][x] + table[1][y])


class Attention(nn.Module):
    """Every patch sees every patch of its picture; norms on q, k and (without weight) v, no scaling."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, clipped = config.num_attention_heads * config.head_dim, config.use_clipped_linears
        self.heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        self.q_proj = ClippedLinear(config.hidden_size, width, clipped)
        self.k_proj = ClippedLinear(config.hidden_size, width, clipped)
        self.v_proj = ClippedLinear(config.hidden_size, width, clipped)
        self.o_proj = ClippedLinear(width, config.hidden_size, clipped)
        self.q_norm = RMSNorm(config.head_dim, self.eps)
        self.k_norm = RMSNorm(config.head_dim, self.eps)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """[B, I, W] -> [B, I, W]."""
        shape = (self.heads, -1)
        q = ops.turn(self.q_proj(x).unflatten(-1, shape), self.q_norm.weight, self.eps, *angles)
        k = ops.turn(self.k_proj(x).unflatten(-1, shape), self.k_norm.weight, self.eps, *angles)
        v = ops.rms_norm(self.v_proj(x).unflatten(-1, shape), None, self.eps)
        out: Tensor = self.o_proj(ops.attend_all(q, k, v).flatten(-2))
        return out


class MLP(nn.Module):
    """Gated GELU with clipped matrices, some rows at a time: what lies between is four times as wide.

    Of a large picture so many that it takes the memory of one [I, W]: it fits where one has just been freed, while
    smaller pieces leave gaps that grow with every layer (406 against 300 MiB after six).
    """

    ROWS = 2560
    """At least, for the sake of the products: a picture of up to 280 soft tokens goes through in one piece."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, inner, clipped = config.hidden_size, config.intermediate_size, config.use_clipped_linears
        self.gate_proj = ClippedLinear(width, inner, clipped)
        self.up_proj = ClippedLinear(width, inner, clipped)
        self.down_proj = ClippedLinear(inner, width, clipped)

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, W] -> [B, I, W]."""
        first, second = self.gate_proj.linear.weight, self.up_proj.linear.weight
        clips = self.gate_proj.clip, self.up_proj.clip
        flat = x.flatten(0, 1)
        pieces = flat.split(max(self.ROWS, flat.numel() // first.shape[0]))
        out = [self.down_proj(ops.clipped_gate(rows, first, second, clips, "gelu")) for rows in pieces]
        return (out[0] if len(out) == 1 else torch.cat(out)).view_as(x)


class Layer(nn.Module):
    """Sandwich norms around attention and MLP, as in the text network, without a layer scalar."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(width, eps)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        x = self.post_attention_layernorm.settle(self.self_attn(self.input_layernorm(x), angles), onto=x)
        return self.post_feedforward_layernorm.settle(self.mlp(self.pre_feedforward_layernorm(x)), onto=x)


class Encoder(nn.Module):
    """The layers; a module of its own because the checkpoint's names say so."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class VisionTower(nn.Module):
    """Patches -> transformer -> mean of 3 x 3 -> soft tokens."""

    std_bias: Tensor
    std_scale: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Encoder(config)
        if config.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size))
            self.register_buffer("std_scale", torch.ones(config.hidden_size))

    def forward(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """`pixels` [B, rows * columns, 3 * side^2] uint8 -> [B, rows * columns / 9, W]."""
        at = torch.arange(rows * columns, device=pixels.device)
        x, y = at % columns, at // columns
        hidden = self.patch_embedder(pixels, x, y)
        angles = axial_angles(x, y, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        for layer in self.encoder.layers:
            hidden = layer(hidden, angles)
        return self._pool(hidden, rows, columns)

    def _pool(self, hidden: Tensor, rows: int, columns: int) -> Tensor:
        """Mean, scale, standardisation in float32; rounded to the model's type after the mean, as the reference is."""
        side = self.config.pooling_kernel_size
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tiles = hidden.unflatten(1, (rows // side, side, columns // side, side))
        pooled = tiles.to(wide).mean((2, 4)).flatten(1, 2).to(hidden.dtype).to(wide)
        pooled = pooled * math.sqrt(self.config.hidden_size)
        if self.config.standardize:
            pooled = (pooled - self.std_bias.to(wide)) * self.std_scale.to(wide)
        return pooled.to(hidden.dtype)
