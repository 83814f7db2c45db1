"""Our own quantised folder: safetensors whose matrices are stored as the codes and scales that `quant` keeps in memory,
so that the next load only maps and repacks.

`x.weight` becomes `x.weight.codes` and `x.weight.scales`; config.json says
`"quantization_config": {"quant_method": "cabochon", "format": "int4"}`. Everything else is stored in bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig, to_json
from ..errors import CheckpointError
from ..formats import QUANTIZED
from ..ops.packing import quantize
from ..quant import QuantTensor
from .params import Param, Shape, parameters
from .safetensors import SHARD_BYTES, SafetensorsSource, save

METHOD = "cabochon"


def save_own(folder: Path, config: ModelConfig, tensors: Iterator[tuple[Param, Tensor]], format: str) -> None:
    """Write config.json and the weights of `config` in `format` (int8 or int4); `tensors` are all its parameters."""

    def stored() -> Iterator[tuple[str, Tensor]]:
        for param, tensor in tensors:
            if param.quantize:
                weight = quantize(tensor, format)
                yield f"{param.hf}.codes", weight.codes
                yield f"{param.hf}.scales", weight.scales
            else:
                yield param.hf, tensor if param.integer else tensor.bfloat16()

    save(folder, stored(), shard_bytes=SHARD_BYTES)
    raw = to_json(config) | {"dtype": "bfloat16", "quantization_config": {"quant_method": METHOD, "format": format}}
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


class OwnSource:
    """A `weights.load.Source` over such a folder."""

    def __init__(self, stored: SafetensorsSource, config: ModelConfig) -> None:
        self.stored, self.origin = stored, stored.origin
        self.format = (config.quantization or {}).get("format")
        if self.format not in QUANTIZED:
            known = ", ".join(QUANTIZED)
            raise CheckpointError(f"{self.origin} is stored in the format {self.format!r}; known are {known}.")
        self.logical = {p.hf: p.shape for p in parameters(config) if f"{p.hf}.codes" in stored.entries}

    def shapes(self) -> dict[str, Shape]:
        parts = {f"{name}.{part}" for name in self.logical for part in ("codes", "scales")}
        return self.logical | {name: shape for name, shape in self.stored.shapes().items() if name not in parts}

    def nbytes(self, name: str) -> int:
        if name in self.logical:
            return self.stored.nbytes(f"{name}.codes") + self.stored.nbytes(f"{name}.scales")
        return self.stored.nbytes(name)

    def read(self, name: str) -> Tensor | QuantTensor:
        if name not in self.logical:
            return self.stored.read(name)
        assert self.format is not None
        codes, scales = self.stored.read(f"{name}.codes"), self.stored.read(f"{name}.scales")
        wanted = {"int8": torch.int8, "int4": torch.uint8}[self.format]
        if codes.dtype != wanted or codes.shape[:-1] != scales.shape:
            raise CheckpointError(f"{self.origin}: codes and scales of {name} don't fit together; write it again.")
        return QuantTensor(codes, scales, self.format, self.logical[name])
