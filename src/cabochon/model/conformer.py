"""The layers of the audio tower: a conformer whose attention sees only the last twelve tokens.

transformers cuts the sequence into blocks and shifts a matrix of relative scores; here a query meets its twelve keys
directly, and because a key's relative position only adds to it (q k + q r = q (k + r)), there is no such matrix.

Letters: A tokens of the sound, N heads, H head width, W tower width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import AudioConfig
from .layers import ClippedLinear, Linear, RMSNorm


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
        shape = (self.heads, -1)
        q, k, v = (proj(x).unflatten(-1, shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        relative = ops.clipped_linear(distance, self.relative_k_proj.weight, None).unflatten(-1, shape)
        scale = self.query_scale(x.dtype)
        out: Tensor = self.post(ops.attend_recent(q, k, v, relative, scale, self.k_scale, self.cap).flatten(1))
        return out

    def query_scale(self, dtype: torch.dtype) -> Tensor:
        """[H], float32 at least."""
        return self.q_scale * F.softplus(self.per_dim_scale.to(torch.promote_types(dtype, torch.float32)))


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
        y = ops.clipped_gate(self.pre_layer_norm.settle(x), value, gate, (start.clip, start.clip), "sigmoid")
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
