"""Our own quantised folder: safetensors whose matrices are stored as the codes and scales that `quant` keeps in memory,
so that the next load only maps and repacks. What isn't repacked, such as the tables of per-layer embeddings, stays in
the file, and only rows that are looked up come into memory.

`x.weight` becomes `x.weight.codes` and `x.weight.scales`; config.json says
`"quantization_config": {"quant_method": "cabochon", "format": "int4"}`. Everything else is stored in bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..config import ModelConfig, to_json
from ..errors import CheckpointError
from ..formats import FORMATS
from ..ops.packing import quantize
from ..quant import GROUP, QuantTensor
from .params import OWN_METHOD, Param, Shape, own_format, parameters
from .safetensors import SHARD_BYTES, SafetensorsSource, save


def save_own(
    folder: Path, config: ModelConfig, tensors: Iterator[tuple[Param, Tensor | QuantTensor]], format: str
) -> None:
    """Write config.json and the weights of `config` in `format` (int8 or int4).

    `tensors` are all its parameters; what is in `format` already stays as it is.
    """

    def stored() -> Iterator[tuple[str, Tensor]]:
        for param, tensor in tensors:
            if isinstance(tensor, QuantTensor) or param.quantize:
                weight = tensor if isinstance(tensor, QuantTensor) else quantize(tensor, format)
                yield f"{param.hf}.codes", weight.codes
                yield f"{param.hf}.scales", weight.scales
            else:
                yield param.hf, tensor if param.integer else tensor.bfloat16()

    save(folder, stored(), shard_bytes=SHARD_BYTES)
    raw = to_json(config) | {"dtype": "bfloat16", "quantization_config": {"quant_method": OWN_METHOD, "format": format}}
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


class OwnSource:
    """A `weights.load.Source` over such a folder."""

    def __init__(self, stored: SafetensorsSource, config: ModelConfig) -> None:
        self.stored, self.origin = stored, stored.origin
        self.format = own_format(config)
        self.logical = {p.hf: p.shape for p in parameters(config) if f"{p.hf}.codes" in stored.entries}
        for name, shape in self.logical.items():
            self._check(name, shape)

    def shapes(self) -> dict[str, Shape]:
        parts = {f"{name}.{part}" for name in self.logical for part in ("codes", "scales")}
        return self.logical | {name: shape for name, shape in self.stored.shapes().items() if name not in parts}

    def nbytes(self, name: str) -> int:
        return sum(self.stored.nbytes(part) for part in self._parts(name))

    def expect(self, name: str) -> None:
        for part in self._parts(name):
            self.stored.expect(part)

    def _parts(self, name: str) -> tuple[str, ...]:
        return (f"{name}.codes", f"{name}.scales") if name in self.logical else (name,)

    def read(self, name: str) -> Tensor | QuantTensor:
        if name not in self.logical:
            return self.stored.read(name)
        assert self.format is not None
        codes, scales = self.stored.mapped(f"{name}.codes"), self.stored.mapped(f"{name}.scales")
        return QuantTensor(codes, scales, self.format, self.logical[name])

    def _check(self, name: str, shape: Shape) -> None:
        *rows, width = shape
        groups = FORMATS[str(self.format)].groups(width)
        wanted = {
            "int8": (("I8", shape), ("F32", tuple(rows))),
            "int4": (("U8", (*rows, groups, GROUP // 2)), ("F16", (*rows, groups))),
        }[str(self.format)]
        stored = (self.stored.entries.get(f"{name}.{part}") for part in ("codes", "scales"))
        if tuple((entry.dtype, entry.shape) if entry else None for entry in stored) != wanted:
            raise CheckpointError(
                f"{self.origin}: codes and scales of {name} are no {self.format} of {list(shape)}; write it again."
            )
