"""What only the towers need, in plain torch: the definition that the kernels behind `ops.towers` are tested against.

Letters: B pictures, I patches of each, A tokens of a sound, N heads, H head width, W a row's width, O outputs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import Weight

Gate = Literal["gelu", "sigmoid"]


class Clip(NamedTuple):
    """The ranges that a clipped matrix cuts its inputs and outputs to, as scalar tensors."""

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor


class Halving(NamedTuple):
    """A convolution `kernel` [outputs, inputs, 3, 3] and the weight of the norm behind it, [outputs]."""

    kernel: Tensor
    norm: Tensor


def clipped_linear(
    x: Tensor, weight: Weight, clip: Clip | None, *, silu: bool = False, onto: Tensor | None = None
) -> Tensor:
    """`x` [..., I] times the rows of `weight` [O, I], both sides cut, SiLU where asked, added `onto` -> [..., O]."""
    if clip is None:
        y = reference.linear(x, weight)
    else:
        y = reference.linear(x.clamp(clip.input_min, clip.input_max), weight).clamp(clip.output_min, clip.output_max)
    y = F.silu(y) if silu else y
    return y if onto is None else onto + y


def clipped_gate(
    x: Tensor, first: Weight, second: Weight, clips: tuple[Clip | None, Clip | None], gate: Gate
) -> Tensor:
    """`gelu_tanh(first(x)) * second(x)`, or `first(x) * sigmoid(second(x))`, of clipped matrices [O, I] -> [..., O]."""
    a, b = clipped_linear(x, first, clips[0]), clipped_linear(x, second, clips[1])
    return F.gelu(a, approximate="tanh") * b if gate == "gelu" else a * b.sigmoid()


def turn(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm of every head of `x` [B, I, N, H], then inside each half of it dimension i turns with i + H / 4.

    `cos` and `sin` are [I, 1, 2, H / 4]: the first half turns by the patch's column, the second by its row.
    """
    a, b = reference.rms_norm(x, weight, eps).unflatten(-1, (2, 2, -1)).unbind(-2)  # each [B, I, N, 2, H / 4]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-3)


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in which every token sees every token, unscaled: `q`, `k`, `v` [B, I, N, H] -> [B, I, N, H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)


def attend_recent(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, scale: Tensor, key_scale: float, cap: float
) -> Tensor:
    """Each of A tokens over itself and the R - 1 before it: `q`, `k`, `v` [A, N, H], `relative` [R, N, H] -> [A, N, H].

    The score of a key r tokens back is `(q * scale) . (k * key_scale + relative[r])`, soft-capped at `cap`; `scale` is
    [H] float32. Scores and sums are float32 at least.
    """
    reach, wide = len(relative), torch.promote_types(q.dtype, torch.float32)
    back = torch.arange(len(q), device=q.device)[:, None] - torch.arange(reach, device=q.device)  # [A, R]
    seen, at = back >= 0, back.clamp(min=0)
    keys = k.to(wide)[at] * key_scale + relative.to(wide)  # [A, R, N, H]
    scores = torch.einsum("anh,arnh->anr", q.to(wide) * scale, keys)
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("anr,arnh->anh", scores.softmax(-1), v.to(wide)[at]).to(q.dtype)


def blend(x: Tensor, taps: Tensor, weight: Tensor, eps: float, bound: float) -> Tensor:
    """`x` [A, W] convolved along A with `taps` [count, W], oldest first, each column alone; cut, normed, SiLU."""
    padded = F.pad(x, (0, 0, len(taps) - 1, 0))
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros_like(x, dtype=wide)
    for i, tap in enumerate(taps):
        y += padded[i : i + len(x)].to(wide) * tap.to(wide)
    return F.silu(reference.rms_norm(y.clamp(-bound, bound).to(x.dtype), weight, eps))


def subsample(mel: Tensor, first: Halving, second: Halving, eps: float) -> Tensor:
    """Two 3 x 3 convolutions with stride 2, after each a norm over channels (mean and variance) and ReLU.

    `mel` [A, F] -> [A / 4, F / 4, outputs of the second], rounded up at either halving.
    """
    x = mel[None, None]
    for kernel, weight in (first, second):
        y = F.conv2d(x, kernel, stride=2, padding=1).permute(0, 2, 3, 1)
        x = F.layer_norm(y, weight.shape, weight, eps=eps).relu().permute(0, 3, 1, 2)
    return x[0].permute(1, 2, 0)
