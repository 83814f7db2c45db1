"""The audio tower of E2B and E4B: log-mel frames in, soft tokens out, four frames to one.

One sound at a time and only its own frames, so nothing is padded or masked out.

Letters: A tokens of the sound (a quarter of its frames), W tower width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..config import AudioConfig
from ..errors import ConfigError
from .conformer import Layer
from .fused_conformer import run_layers
from .layers import Linear


class Halving(nn.Module):
    """A 3 x 3 convolution with stride 2 over time and frequency, and the norm over its channels."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(outputs, eps=eps, bias=False)

    @property
    def parts(self) -> ops.Halving:
        return ops.Halving(self.conv.weight, self.norm.weight)


class Subsampling(nn.Module):
    """Two halvings, then a matrix over (frequency, channel)."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        first, second = config.subsampling_conv_channels
        self.layer0 = Halving(1, first, config.rms_norm_eps)
        self.layer1 = Halving(first, second, config.rms_norm_eps)
        self.input_proj_linear = Linear(first // 4 * second, config.hidden_size)

    def forward(self, mel: Tensor) -> Tensor:
        """[frames, 128] -> [A, W]."""
        first, second = self.layer0.parts, self.layer1.parts
        x = ops.subsample(mel.to(first.kernel.dtype), first, second, self.layer0.norm.eps)
        return ops.clipped_linear(x.flatten(1), self.input_proj_linear.weight, None)


class AudioTower(nn.Module):
    """Subsampling, the conformer's layers, a last matrix with bias."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        if config.attention_context_right:
            raise ConfigError(
                f"audio_config.attention_context_right is {config.attention_context_right}, but only 0 is supported."
            )
        if config.attention_chunk_size < config.attention_context_left - 1:
            raise ConfigError(
                f"audio_config.attention_chunk_size is {config.attention_chunk_size}, but must be at least "
                f"attention_context_left - 1 = {config.attention_context_left - 1}."
            )
        self.config = config
        self.subsample_conv_projection = Subsampling(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.output_proj = nn.Linear(config.hidden_size, config.output_proj_dims)

    def forward(self, mel: Tensor) -> Tensor:
        """[frames, 128] -> [A, output_proj_dims]."""
        x = self.subsample_conv_projection(mel)
        bound = min(self.config.gradient_clipping, torch.finfo(x.dtype).max)
        x = run_layers(self.layers, x, self._distances(x), bound)
        last = self.output_proj
        return ops.clipped_linear(x, last.weight, None, onto=last.bias.expand(len(x), -1))

    def _distances(self, like: Tensor) -> Tensor:
        """[reach, W]: sines, then cosines, of 0, 1, ... tokens back over timescales from 1 to 10,000.

        The reference counts positions down from half the context of a block; where that is not the reach, distances
        are off by the difference, and so they are here.
        """
        config = self.config
        reach, half = config.attention_context_left - 1, config.hidden_size // 2
        shift = (config.attention_chunk_size + reach) // 2 - reach
        scale = torch.exp(torch.arange(half, device=like.device) * (-math.log(1e4) / max(half - 1, 1)))
        time = (torch.arange(reach, device=like.device) + shift)[:, None] * scale
        return torch.cat([time.sin(), time.cos()], -1).to(like.dtype)
