"""A model as a compressed-tensors folder, which vLLM and `transformers` load.

    w4a16   4-bit codes in groups of 32 along a row, bfloat16 scales (`pack-quantized`)
    fp8     e4m3 codes with a scale per row; activations are rounded per token when the model runs (`float-quantized`)

Embeddings, norms, routers, gates and towers stay as they are. Experts are written one by one, as published
checkpoints of this kind do; `transformers` keeps them stacked and can't load those, vLLM can.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig, to_json
from ..errors import InputError
from .params import Param, parameters
from .safetensors import save

FORMATS = ("w4a16", "fp8")
GROUP = 32
_WEIGHTS = {
    "w4a16": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
    "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
}
_ACTIVATIONS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def save_compressed(
    folder: Path,
    config: ModelConfig,
    tensors: Iterator[tuple[Param, Tensor]],
    format: str,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json and the weights of `config`; `tensors` are all its parameters in any float type.

    Raises:
        InputError: the format is unknown.
    """
    if format not in FORMATS:
        raise InputError(f"compressed-tensors folders can be written as {', '.join(FORMATS)}, not as {format!r}.")
    save(folder, _stored(tensors, format), shard_bytes=shard_bytes)
    raw = to_json(config)
    raw["dtype"] = "bfloat16"
    raw["quantization_config"] = settings(config, format)
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def settings(config: ModelConfig, format: str) -> dict[str, Any]:
    """The `quantization_config` of such a folder. Modules that stay as they are are named one by one."""
    kept = [p.hf.removesuffix(".weight") for p in parameters(config) if len(p.shape) == 2 and not _goes_in(p)]
    group = {
        "targets": ["Linear"],
        "weights": _WEIGHTS[format],
        "input_activations": _ACTIVATIONS if format == "fp8" else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized" if format == "w4a16" else "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *kept],
        "kv_cache_scheme": None,
    }


def _goes_in(param: Param) -> bool:
    return param.quantize and param.part in ("text", "experts")


def _stored(tensors: Iterator[tuple[Param, Tensor]], format: str) -> Iterator[tuple[str, Tensor]]:
    for param, tensor in tensors:
        if not _goes_in(param):
            yield param.hf, tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        for module, matrix in _matrices(param, tensor):
            yield from ((f"{module}.{suffix}", part) for suffix, part in _encode(matrix.float(), format))


def _matrices(param: Param, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(module, matrix): the one of a linear layer, or those of every expert."""
    if param.part != "experts":
        yield param.hf.removesuffix(".weight"), tensor
        return
    base, _, which = param.hf.rpartition(".")
    for expert, stacked in enumerate(tensor):
        names = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
        for name, matrix in zip(names, stacked.chunk(len(names)), strict=True):
            yield f"{base}.{expert}.{name}", matrix


def _encode(matrix: Tensor, format: str) -> list[tuple[str, Tensor]]:
    if format == "fp8":
        scale = matrix.abs().amax(-1, keepdim=True).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
        scale = scale.bfloat16()
        codes = (matrix / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return [("weight", codes), ("weight_scale", scale)]
    rows, width = matrix.shape
    if width % GROUP:
        raise InputError(f"a matrix of {width} columns can't be cut into groups of {GROUP}; write fp8.")
    groups = matrix.view(rows, -1, GROUP)
    scale = (groups.abs().amax(-1).clamp_min(1e-12) / 7.5).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).view(rows, width)
    return [
        ("weight_packed", pack_nibbles(codes.int() + 8)),
        ("weight_scale", scale),
        ("weight_shape", torch.tensor([rows, width])),
    ]


def pack_nibbles(codes: Tensor) -> Tensor:
    """[O, I] unsigned 4-bit codes (int32) -> [O, I / 8] int32 words, lowest bits first."""
    parts = codes.view(codes.shape[0], -1, 8)
    words = torch.zeros(parts.shape[:2], dtype=torch.int32)
    for nibble in range(8):
        words |= parts[..., nibble] << (4 * nibble)
    return words
