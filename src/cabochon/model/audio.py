"""The audio tower of E2B and E4B: log-mel frames in, soft tokens out, four frames to one.

A conformer whose attention sees only the last twelve tokens. transformers cuts the sequence into blocks and shifts a
matrix of relative scores; here a query meets its twelve keys directly, and because a key's relative position only adds
to it (q k + q r = q (k + r)), there is no such matrix.

One sound at a time and only its own frames, so nothing is padded or masked out.

Letters: A tokens of the sound (a quarter of its frames), N heads, H head width, W tower width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import AudioConfig
from ..errors import ConfigError
from .layers import ClippedLinear, Linear, RMSNorm


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


class Attention(nn.Module):
    """Each token sees itself and the eleven before it, with learned projections of sinusoids of the distance."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        width, clipped = config.hidden_size, config.use_clipped_linears
        self.heads, self.cap = config.num_attention_heads, config.attention_logit_cap
        head = width // self.heads
        self.q_proj = ClippedLinear(width, width, clipped)
        self.k_proj = ClippedLinear(width, width, clipped)
        self.v_proj = ClippedLinear(width, width, clipped)
        self.post = ClippedLinear(width, width, clipped)
        self.relative_k_proj = Linear(width, width)
        self.per_dim_scale = nn.Parameter(torch.empty(head))
        self.q_scale, self.k_scale = head**-0.5 / math.log(2), math.log(1 + math.e) / math.log(2)

    def forward(self, x: Tensor, distance: Tensor) -> Tensor:
        """`x` [A, W] and the sinusoids `distance` [reach, W] of 0, 1, ... tokens back -> [A, W]. Scores in float32."""
        shape, wide = (self.heads, -1), torch.promote_types(x.dtype, torch.float32)
        q, k, v = (proj(x).unflatten(-1, shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        relative = self.relative_k_proj(distance).unflatten(-1, shape)
        scale = self.q_scale * F.softplus(self.per_dim_scale.to(wide))
        out: Tensor = self.post(ops.attend_recent(q, k, v, relative, scale, self.k_scale, self.cap).flatten(1))
        return out


class FeedForward(nn.Module):
    """A half-step feed-forward: the residual gets `residual_weight` of it."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.ffw_layer_1 = ClippedLinear(width, 4 * width, config.use_clipped_linears)
        self.ffw_layer_2 = ClippedLinear(4 * width, width, config.use_clipped_linears)
        self.pre_layer_norm = RMSNorm(width, eps)
        self.post_layer_norm = RMSNorm(width, eps)
        self.share = config.residual_weight

    def forward(self, x: Tensor, bound: float) -> Tensor:
        y = self.ffw_layer_2(self.ffw_layer_1(self.pre_layer_norm.settle(x, bound=bound), silu=True))
        return self.post_layer_norm.settle(y, bound=bound, onto=x, share=self.share)


class LightConv(nn.Module):
    """Gate, depthwise convolution over the last tokens, norm, SiLU, matrix."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        width, eps, kernel = config.hidden_size, config.rms_norm_eps, config.conv_kernel_size
        self.linear_start = ClippedLinear(width, 2 * width, config.use_clipped_linears)
        self.linear_end = ClippedLinear(width, width, config.use_clipped_linears)
        self.depthwise_conv1d = nn.Conv1d(width, width, kernel, groups=width, bias=False)
        self.pre_layer_norm = RMSNorm(width, eps)
        self.conv_norm = RMSNorm(width, eps)

    def forward(self, x: Tensor, bound: float) -> Tensor:
        start = self.linear_start
        value, gate = start.linear.weight.chunk(2)  # type: ignore[union-attr]  # towers are not quantised
        y = ops.clipped_gate(self.pre_layer_norm(x), value, gate, (start.clip, start.clip), "sigmoid")
        taps = self.depthwise_conv1d.weight[:, 0].T  # [kernel, W], oldest first
        y = ops.blend(y, taps, self.conv_norm.weight, self.conv_norm.eps, bound)
        out: Tensor = self.linear_end(y, onto=x)
        return out


class Layer(nn.Module):
    """Feed-forward, attention, convolution, feed-forward."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.feed_forward1 = FeedForward(config)
        self.feed_forward2 = FeedForward(config)
        self.self_attn = Attention(config)
        self.lconv1d = LightConv(config)
        self.norm_pre_attn = RMSNorm(width, eps)
        self.norm_post_attn = RMSNorm(width, eps)
        self.norm_out = RMSNorm(width, eps)

    def forward(self, x: Tensor, distance: Tensor, bound: float) -> Tensor:
        x = self.feed_forward1(x, bound)
        y = self.self_attn(self.norm_pre_attn.settle(x, bound=bound), distance)
        x = self.norm_post_attn.settle(y, bound=bound, onto=x)
        x = self.feed_forward2(self.lconv1d(x, bound), bound)
        return self.norm_out.settle(x, bound=bound)


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
        distance = self._distances(x)
        for layer in self.layers:
            x = layer(x, distance, bound)
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
