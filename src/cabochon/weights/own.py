"""Our own quantised folder: safetensors whose matrices are stored as the codes and scales that `quant` keeps in memory,
so that the next load only maps and repacks. What isn't repacked, the tables that rows are looked up in, stays in the
file, and only those rows come into memory.

`x.weight` becomes `x.weight.codes` and `x.weight.scales`, whose types say which format it has; config.json says
`"quantization_config": {"quant_method": "cabochon", "format": "int4"}`. With int4 `embed_tokens.weight` is the table
that rows are looked up in, in eight bits, and `lm_head.weight` the same in four, for products; where the latter is
missing one table serves both. Everything else is stored in bfloat16.
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
from .params import OWN_METHOD, Param, Shape, as_kept, parameters
from .safetensors import SHARD_BYTES, SafetensorsSource, save


def save_own(
    folder: Path, config: ModelConfig, tensors: Iterator[tuple[Param, Tensor | QuantTensor]], format: str
) -> None:
    """Write config.json and the weights of `config` in `format` (int8 or int4).

    `tensors` are all its parameters as in `as_kept(config, format)`; what is quantised already stays as it is.
    """

    def stored() -> Iterator[tuple[str, Tensor]]:
        for param, tensor in tensors:
            if isinstance(tensor, QuantTensor) or param.quantize:
                wanted = param.format("bfloat16", format).name
                weight = tensor if isinstance(tensor, QuantTensor) else quantize(tensor, wanted)
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
        rows = parameters(as_kept(config, None))
        self.logical = {p.hf: (p.shape, self._format(p.hf, p.shape)) for p in rows if f"{p.hf}.codes" in stored.entries}

    def shapes(self) -> dict[str, Shape]:
        parts = {f"{name}.{part}" for name in self.logical for part in ("codes", "scales")}
        plain = {name: shape for name, shape in self.stored.shapes().items() if name not in parts}
        return {name: shape for name, (shape, _) in self.logical.items()} | plain

    def nbytes(self, name: str) -> int:
        return sum(self.stored.nbytes(part) for part in self._parts(name))

    def expect(self, name: str) -> None:
        for part in self._parts(name):
            self.stored.expect(part)

    def _parts(self, name: str) -> tuple[str, ...]:
        return (f"{name}.codes", f"{name}.scales") if name in self.logical else (name,)

    def format(self, name: str) -> str:
        """Of the quantised weight `name`."""
        return self.logical[name][1]

    def read(self, name: str) -> Tensor | QuantTensor:
        if name not in self.logical:
            return self.stored.read(name)
        shape, format = self.logical[name]
        codes, scales = (self.stored.mapped(part) for part in self._parts(name))
        return QuantTensor(codes, scales, format, shape)

    def _format(self, name: str, shape: Shape) -> str:
        """What the stored codes and scales of a weight of `shape` are."""
        *rows, width = shape
        groups = FORMATS["int4"].groups(width)
        known = {
            "int8": [("I8", shape), ("F32", tuple(rows))],
            "int4": [("U8", (*rows, groups, GROUP // 2)), ("F16", (*rows, groups))],
        }
        stored = (self.stored.entries.get(f"{name}.{part}") for part in ("codes", "scales"))
        found = [(entry.dtype, entry.shape) for entry in stored if entry]
        for format, parts in known.items():
            if found == parts:
                return format
        raise CheckpointError(
            f"{self.origin}: codes and scales of {name} are no {' or '.join(known)} of {list(shape)}; write it again."
        )
