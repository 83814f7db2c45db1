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
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor

from .. import variants
from ..config import ModelConfig, read_config
from ..errors import InputError
from ..ops.cpu import prefer_huge_pages
from .params import Shape, parameters

PREFIX = "random:"
CHUNK = 1 << 18
"""Elements drawn at a time; small enough for the cache."""

_PAIR_STD = math.sqrt(2 * (256**2 - 1) / 12)


def calm_tensor(name: str, shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The value of the parameter `name` (ours, as in `weights.params`) under `seed`; in every type the same numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    bits = np.random.SFC64(int.from_bytes(digest[:16], "little"))
    if name.endswith("token_ordering"):
        return torch.from_numpy(np.random.Generator(bits).permutation(math.prod(shape))).view(shape)
    mean, spread = _shape_of(name, shape)
    # Sums of two bytes are exact in bfloat16, so a plain product is rounded once; with a mean it would be twice.
    out = torch.empty(shape, dtype=torch.float32 if mean else dtype)
    prefer_huge_pages(out)
    flat = out.view(-1)
    for begin in range(0, flat.numel(), CHUNK):
        part = flat[begin : begin + CHUNK]
        count = part.numel()
        raw = torch.from_numpy(bits.random_raw(-(-count // 4)).view(np.int8))
        part.copy_(raw[:count]).add_(raw[count : 2 * count]).add_(1).mul_(spread / _PAIR_STD)
        if mean:
            part.add_(mean)
    return out.to(dtype)


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


class RandomSource:
    """The tensors of `random:E2B`: true names and shapes, calm values, nothing on disk."""

    def __init__(self, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        self.origin = f"random weights of seed {seed}"
        self.params = {param.hf: param for param in parameters(config)}
        self.seed = seed
        self.dtype = dtype

    def shapes(self) -> dict[str, Shape]:
        return {name: param.shape for name, param in self.params.items()}

    def nbytes(self, name: str) -> int:
        return self.params[name].count * self.dtype.itemsize

    def expect(self, name: str) -> None:
        pass

    def read(self, name: str) -> Tensor:
        param = self.params[name]
        return calm_tensor(param.name, param.shape, seed=self.seed, dtype=self.dtype)


def is_random(model: str) -> bool:
    return model.startswith(PREFIX)


def open_random(model: str) -> tuple[ModelConfig, RandomSource]:
    """`random:SIZE[?layers=N&seed=N&media=no]`, for example `random:26B-A4B?layers=6`: config and weights.

    Raises:
        UnknownModelError: no such size.
        InputError: an unknown option, or a value that can't be.
    """
    name, _, query = model.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := set(options) - {"layers", "seed", "media"}:
        raise InputError(f"{model!r}: unknown option {sorted(unknown)[0]}; known are layers=N, seed=N and media=no.")
    raw = variants.find(name).config()
    if "layers" in options:
        raw["text_config"] = cut_layers(raw["text_config"], _number(model, "layers", options["layers"]))
    if options.get("media") == "no":
        raw |= {"vision_config": None, "audio_config": None}
    elif "media" in options:
        raise InputError(f"{model!r}: media={options['media']!r}; the only choice is media=no.")
    config = read_config(raw)
    return config, RandomSource(config, _number(model, "seed", options.get("seed", "0")))


def cut_layers(text: dict[str, Any], layers: int) -> dict[str, Any]:
    """A text config with only `layers` of its layers: whole patterns of sliding and global, sharing in proportion."""
    kinds, full = text["layer_types"], text["num_hidden_layers"]
    period = kinds.index("full_attention") + 1
    if layers == full:
        return text
    if not period <= layers <= full or layers % period:
        allowed = ", ".join(str(n) for n in range(period, full + 1, period))
        raise InputError(
            f"There are no {layers} layers; this size repeats a pattern of {period}, so take one of {allowed}."
        )
    shared = min(round(text["num_kv_shared_layers"] * layers / full / period) * period, layers - period)
    return {**text, "num_hidden_layers": layers, "layer_types": kinds[:layers], "num_kv_shared_layers": shared}


def _number(model: str, key: str, value: str) -> int:
    if not value.isdecimal():
        raise InputError(f"{model!r}: {key}={value!r}; it must be a whole number.")
    return int(value)
