"""A checkpoint folder whose matrices are stored in another tool's quantised form, under plain published names.

Each logical `x.weight` is found by its scheme's marker and rebuilt when it is read. Experts that are stored one by one
(`experts.3.gate_proj.weight`, however quantised) are stacked into the published tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .params import Shape
from .safetensors import SafetensorsSource
from .schemes import Scheme, scheme_of

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_STACKED = re.compile(r"(.*\.experts\.(?:gate_up_proj|down_proj))(_\w+)")


class SchemeSource:
    """A `weights.load.Source` over a quantised folder."""

    def __init__(self, stored: SafetensorsSource, settings: Mapping[str, Any]) -> None:
        self.stored, self.settings, self.origin = stored, settings, stored.origin
        self.scheme: Scheme = scheme_of(settings)
        self.quantized = self._modules()
        taken = {name for parts in self.quantized.values() for name in parts.values()}
        self.plain = {name: entry.shape for name, entry in stored.entries.items() if name not in taken}
        self.experts = self._experts()

    def _modules(self) -> dict[str, dict[str, str]]:
        """Logical weight -> what is stored of it, by suffix. Stacked experts are tensors, not modules, so that what
        belongs to `experts.down_proj` is called `experts.down_proj_scale_inv`."""
        found: dict[str, dict[str, str]] = {}
        for name in self.stored.entries:
            if name.endswith(f".{self.scheme.marker}"):
                module = name.removesuffix(f".{self.scheme.marker}")
                suffixes = {suffix: f"{module}.{suffix}" for suffix in self.scheme.suffixes}
                found[f"{module}.weight"] = self._there(suffixes)
            elif stacked := _STACKED.fullmatch(name):
                suffixes = {s: stacked[1] + s.removeprefix("weight") for s in self.scheme.suffixes}
                if self.scheme.marker == f"weight{stacked[2]}":
                    found[stacked[1]] = self._there(suffixes)
        return found

    def _there(self, suffixes: Mapping[str, str]) -> dict[str, str]:
        return {suffix: name for suffix, name in suffixes.items() if name in self.stored.entries}

    def _experts(self) -> dict[str, list[list[str]]]:
        """Published stacked name -> for each expert, the logical names of its parts (gate, up or down)."""
        found: dict[str, dict[int, dict[str, str]]] = {}
        for name in (*self.quantized, *self.plain):
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
        logical = {name: self._shape(name, parts) for name, parts in self.quantized.items()}
        logical |= self.plain
        for name, experts in self.experts.items():
            shapes = {logical[part] for parts in experts for part in parts}
            if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
                raise CheckpointError(f"{self.origin}: the experts of {name} have different shapes; download it again.")
            logical[name] = (len(experts), shape[0] * len(experts[0]), shape[1])
        for part in (part for experts in self.experts.values() for parts in experts for part in parts):
            del logical[part]
        return logical

    def nbytes(self, name: str) -> int:
        return sum(self.stored.nbytes(part) for part in self._parts(name))

    def expect(self, name: str) -> None:
        for part in self._parts(name):
            self.stored.expect(part)

    def _parts(self, name: str) -> Iterator[str]:
        """The names of all that is stored of it."""
        if name in self.experts:
            for parts in self.experts[name]:
                for part in parts:
                    yield from self._parts(part)
        else:
            yield from self.quantized.get(name, {"": name}).values()

    def read(self, name: str) -> Tensor:
        if name in self.experts:
            return torch.stack([torch.cat([self.read(part) for part in parts]) for parts in self.experts[name]])
        if name in self.plain:
            return self.stored.read(name)
        try:
            return self.scheme.rebuild(partial(self._fetch, name), self.settings)
        except (CheckpointError, RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            said = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{self.origin}: {name}, stored as {self.scheme.name}, can't be rebuilt: {said}."
            ) from None

    def _fetch(self, name: str, suffix: str) -> Tensor | None:
        stored = self.quantized[name].get(suffix)
        return None if stored is None else self.stored.read(stored)

    def _shape(self, name: str, parts: Mapping[str, str]) -> Shape:
        """Of the rebuilt matrix, without reading more than a few numbers."""
        shapes = {suffix: self.stored.entries[stored].shape for suffix, stored in parts.items()}
        marker = self.scheme.marker
        if marker == "weight_scale" and "weight_packed" in shapes:
            if "weight_shape" in shapes:
                return self._noted_shape(name, parts["weight_shape"])
            return shapes["weight_packed"][0], 2 * shapes["weight_packed"][1]
        if marker == "qweight" and self.scheme.name == "GPTQ":
            return shapes["qweight"][1], *shapes.get("g_idx", (shapes["qweight"][0] * 8,))
        if marker == "qweight":
            return shapes["qweight"][1] * 8, shapes["qweight"][0]
        if marker == "weight.absmax":
            return tuple(self.read(name).shape)
        return shapes.get("weight", ())

    def _noted_shape(self, name: str, stored: str) -> Shape:
        noted = self.stored.read(stored)
        if noted.shape != (2,) or noted.is_floating_point() or bool((noted < 1).any()):
            raise CheckpointError(f"{self.origin}: {stored} is not the shape of {name}; download it again.")
        return tuple(noted.tolist())
