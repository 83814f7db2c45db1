"""Calm random weights: finite, deterministic by seed and name, at the size of real checkpoints.

"Calm" means that scores, residuals and logits stay near unit size through all layers: q and k norms have gains of
about `head_dim ** -0.25`, post norms of about 0.3, matrices have rows of unit length on average. So a 35-layer network
behaves, and float32 agrees with float64 to a few 1e-6.

Values come from sums of two random bytes instead of a normal generator: a triangular shape does as well here, and
filling 10 GB takes seconds instead of minutes.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20
"""Elements drawn at a time; small enough for the cache."""

_PAIR_STD = math.sqrt(2 * (256**2 - 1) / 12)


def calm_tensor(name: str, shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The value of the parameter `name` (ours, as in `weights.params`) under `seed`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    if name.endswith("token_ordering"):
        return torch.from_numpy(generator.permutation(math.prod(shape))).view(shape)
    mean, spread = _shape_of(name, shape)
    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    for begin in range(0, flat.numel(), CHUNK):
        part = flat[begin : begin + CHUNK]
        raw = torch.frombuffer(bytearray(generator.bytes(2 * part.numel())), dtype=torch.int8)
        pair = raw[: part.numel()].float() + raw[part.numel() :].float()
        part.copy_(pair.add_(1).mul_(spread / _PAIR_STD).add_(mean))
    return out


def _shape_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's values."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    if last in ("q_norm", "k_norm"):
        return shape[0] ** -0.25, 0.1 * shape[0] ** -0.25
    if last in ("input_min", "output_min"):
        return -4.0, 0.1
    if last in ("input_max", "output_max"):
        return 4.0, 0.1
    if last == "layer_scalar":
        return 0.95, 0.02
    if last.startswith("post_") and "norm" in last:
        return 0.3, 0.03
    if len(shape) <= 1:
        return _vector(name, last)
    if name.endswith("router.proj.weight"):
        return 0.0, 1.0  # its input has unit length, not unit elements
    if last in ("position_embedding_table", "pos_embedding"):
        return 0.0, 0.1
    fan_in = math.prod(shape[1:]) if "conv" in name else shape[-1]
    return 0.0, _width_of_ple(name, fan_in) ** -0.5


def _vector(name: str, last: str) -> tuple[float, float]:
    """Gains lie around one; biases and the like around zero."""
    zero = last in ("bias", "std_bias", "per_dim_scale") or name.endswith(".bias")
    return (0.0, 0.1) if zero else (1.0, 0.1)


def _width_of_ple(name: str, fan_in: int) -> int:
    """The per-layer table packs all layers into a row; what counts is one layer's width, 256 in every released size."""
    return min(fan_in, 256) if "embed_tokens_per_layer" in name else fan_in
