"""A checkpoint folder whose matrices are stored in another tool's quantised form, under plain published names.

Each logical `x.weight` is found by its scheme's marker and rebuilt when it is read. Experts that are stored one by one
(`experts.3.gate_proj.weight`, however quantised) are stacked into the published tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .params import Shape
from .safetensors import SafetensorsSource
from .schemes import Scheme, scheme_of

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class SchemeSource:
    """A `weights.load.Source` over a quantised folder."""

    def __init__(self, stored: SafetensorsSource, settings: Mapping[str, Any]) -> None:
        self.stored, self.settings, self.origin = stored, settings, stored.origin
        self.scheme: Scheme = scheme_of(settings)
        self.quantized, self.plain = self._modules()
        self.experts = self._experts()

    def _modules(self) -> tuple[set[str], set[str]]:
        """Modules stored in the scheme's form, and names of tensors that are stored as they are."""
        names = set(self.stored.entries)
        mark = f".{self.scheme.marker}"
        modules = {name.removesuffix(mark) for name in names if name.endswith(mark)}
        taken = {f"{module}.{suffix}" for module in modules for suffix in self.scheme.suffixes}
        return modules, names - taken - {f"{module}.{s}" for module in modules for s in ("input_scale", "output_scale")}

    def _experts(self) -> dict[str, list[list[str]]]:
        """Published stacked name -> for each expert, the logical names of its parts (gate, up or down)."""
        found: dict[str, dict[int, dict[str, str]]] = {}
        for name in (*(f"{module}.weight" for module in self.quantized), *self.plain):
            if match := _EXPERT.fullmatch(name):
                found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
        stacked = {}
        for base, experts in found.items():
            if sorted(experts) != list(range(len(experts))) or any(len(parts) != 3 for parts in experts.values()):
                raise CheckpointError(f"{self.origin}: the experts of {base} are incomplete; download it again.")
            rows = [experts[i] for i in range(len(experts))]
            stacked[f"{base}.gate_up_proj"] = [[parts["gate_proj"], parts["up_proj"]] for parts in rows]
            stacked[f"{base}.down_proj"] = [[parts["down_proj"]] for parts in rows]
        return stacked

    def shapes(self) -> dict[str, Shape]:
        logical = {f"{module}.weight": self._shape(module) for module in self.quantized}
        logical |= {name: self.stored.entries[name].shape for name in self.plain}
        for name, experts in self.experts.items():
            rows = sum(logical[part][0] for part in experts[0])
            width = logical[experts[0][0]][1]
            for part in (part for parts in experts for part in parts):
                del logical[part]
            logical[name] = (len(experts), rows, width)
        return logical

    def nbytes(self, name: str) -> int:
        if name in self.experts:
            return sum(self.nbytes(part) for parts in self.experts[name] for part in parts)
        if name in self.plain:
            return self.stored.nbytes(name)
        return sum(self.stored.nbytes(stored) for stored in self._stored_names(name.removesuffix(".weight")))

    def read(self, name: str) -> Tensor:
        if name in self.experts:
            return torch.stack([torch.cat([self.read(part) for part in parts]) for parts in self.experts[name]])
        if name in self.plain:
            return self.stored.read(name)
        module = name.removesuffix(".weight")
        try:
            return self.scheme.rebuild(partial(self._fetch, module), self.settings)
        except (CheckpointError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.origin}: {name}, stored as {self.scheme.name}, can't be rebuilt: {error}."
            ) from None

    def _fetch(self, module: str, suffix: str) -> Tensor | None:
        name = f"{module}.{suffix}"
        return self.stored.read(name) if name in self.stored.entries else None

    def _stored_names(self, module: str) -> list[str]:
        return [n for s in self.scheme.suffixes if (n := f"{module}.{s}") in self.stored.entries]

    def _shape(self, module: str) -> Shape:
        """Of the rebuilt matrix, without reading more than a few numbers."""

        def stored(suffix: str) -> Shape:
            return self.stored.entries[f"{module}.{suffix}"].shape

        match self.scheme.marker:
            case "weight_packed":
                return tuple(self.stored.read(f"{module}.weight_shape").tolist())
            case "qweight" if self.scheme.name == "GPTQ":
                return stored("qweight")[1], stored("qweight")[0] * 8
            case "qweight":
                return stored("qweight")[1] * 8, stored("qweight")[0]
            case "weight.absmax":
                return tuple(self.read(f"{module}.weight").shape)
        return stored("weight")
