"""The tensors of a GGUF file under their published names, one at a time.

Blocks of type Q4_0 are our int4 to the byte and enter as they are; every other type is expanded. A router's or norm's
tensor is always expanded, whatever it is stored as. Experts that are stored as separate gate and up tensors are joined.
Towers come from a second file, the `mmproj`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import ModelConfig
from ..quant import QuantTensor
from .gguf import GGUFFile, GGUFTensor
from .gguf_towers import restore, tower_name
from .header import expect
from .params import Param, Shape, parameters

_OURS_TO_MAKE = ("rope_freqs.weight",)
"""Tensors that only repeat the config."""


class GGUFSource:
    """A `weights.load.Source` over a mapped GGUF file."""

    def __init__(self, file: GGUFFile, config: ModelConfig, origin: str, towers: GGUFFile | None = None) -> None:
        self.origin = origin
        self.parts: dict[str, list[GGUFTensor]] = {}
        self.params: dict[str, Param] = {}
        table = parameters(config, unused=True)
        known = {param.gguf: param for param in table}
        for name, tensor in file.tensors.items():
            if name in _OURS_TO_MAKE:
                continue
            param = known.get(_joined(name))
            # A name that the table doesn't have is kept: the loader reports it with all others that don't fit.
            published = param.hf if param else name
            self.parts.setdefault(published, []).append(tensor)
            if param:
                self.params[published] = param
        for parts in self.parts.values():
            parts.sort(key=lambda tensor: "up_exps" in tensor.name)  # gate rows before up rows
        self.towers = _placed(towers, config) if towers is not None else {}

    def shapes(self) -> dict[str, Shape]:
        towers = {name: param.shape if param else tensor.shape for name, (param, tensor) in self.towers.items()}
        return {name: _stacked(parts) for name, parts in self.parts.items()} | towers

    def nbytes(self, name: str) -> int:
        return sum(tensor.raw.nbytes for tensor in self._stored(name))

    def expect(self, name: str) -> None:
        for tensor in self._stored(name):
            expect(tensor.file, tensor.begin, tensor.raw.nbytes)

    def _stored(self, name: str) -> list[GGUFTensor]:
        return [self.towers[name][1]] if name in self.towers else self.parts[name]

    def read(self, name: str) -> Tensor | QuantTensor:
        if name in self.towers:
            param, tensor = self.towers[name]
            return tensor.dequantize() if param is None else restore(param, tensor)
        parts, param = self.parts[name], self.params.get(name)
        if _enters_as_int4(param, parts):
            return as_int4(parts[0])
        return torch.cat([part.dequantize() for part in parts], -2 if len(parts) > 1 else 0)

    def kept(self) -> frozenset[str]:
        """Our names of the matrices that enter as int4; all others are expanded."""
        return frozenset(param.name for name, param in self.params.items() if _enters_as_int4(param, self.parts[name]))

    def formats(self) -> dict[str, str]:
        """Block type by published name, for people."""
        stored = {name: parts[0] for name, parts in self.parts.items()}
        stored |= {name: tensor for name, (_, tensor) in self.towers.items()}
        return {name: tensor.kind.name for name, tensor in stored.items()}


def _enters_as_int4(param: Param | None, parts: list[GGUFTensor]) -> bool:
    return param is not None and param.quantize and len(parts) == 1 and parts[0].kind.name == "Q4_0"


def _placed(file: GGUFFile, config: ModelConfig) -> dict[str, tuple[Param | None, GGUFTensor]]:
    """The tensors of an mmproj file by published name; those that the table doesn't have, or of another size, stay
    under their own, so that the loader reports them with all others that don't fit."""
    table = {tower_name(param.hf): param for param in parameters(config)}
    placed: dict[str, tuple[Param | None, GGUFTensor]] = {}
    for name, tensor in file.tensors.items():
        param = table.get(name)
        fits = param is not None and param.count == math.prod(tensor.shape)
        placed[param.hf if param is not None and fits else name] = (param if fits else None, tensor)
    return placed


def as_int4(tensor: GGUFTensor) -> QuantTensor:
    """Q4_0 blocks (2 bytes scale, 16 bytes codes) as our int4 in rows: the same codes and scales, apart."""
    blocks = tensor.blocks().view(*tensor.shape[:-1], tensor.shape[-1] // 32, 18)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    return QuantTensor(blocks[..., 2:].contiguous(), scales, "int4", tensor.shape)


def _joined(name: str) -> str:
    """Separate gate and up experts have one published name."""
    return name.replace("ffn_gate_exps.", "ffn_gate_up_exps.").replace("ffn_up_exps.", "ffn_gate_up_exps.")


def _stacked(parts: list[GGUFTensor]) -> Shape:
    first = parts[0].shape
    return first if len(parts) == 1 else (*first[:-2], sum(part.shape[-2] for part in parts), first[-1])
