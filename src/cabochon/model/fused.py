"""Decoder layers in one call of the CPU kernels, where those take them: with dense feed-forward.

`Layer.forward` op by op is the definition and what training runs. A call does what some twenty ops per layer do, and
what is the same in every step was looked up before: whatever the interpreter does in a step it does with empty caches,
six times as slowly. The kernels, their order and the roundings between them are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import ops
from ..config import Kind, LayerSpec
from ..ops import cpu
from ..ops.views import View
from .decoder import Angles, Layer
from .layers import Linear, RMSNorm
from .watched import Watched

_NORMS = (
    "input_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_per_layer_input_norm",
)
_MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "per_layer_input_gate",
    "per_layer_projection",
)
_NOTHING = (0, 0, 0, 0, 0, 0)


@dataclass(slots=True)
class Step:
    """What the layers of a step read beside their activations, and what becomes of the rows that they make."""

    tokens: int
    see: Callable[[LayerSpec], View]
    angles: Mapping[Kind, Angles]
    k_weight: Callable[[LayerSpec], Tensor | None]
    """See `Attention.queries`."""
    rows: dict[int, Tensor] = field(default_factory=dict)
    """[T, K, W] of the step's tokens by the layer that makes them, for as long as somebody reads them."""
    last_reader: Mapping[int, int] = field(default_factory=dict)
    """Of each layer that makes rows; they are stored after it."""
    kept: dict[Kind, Tensor] | None = None
    """Gets the rows of the last layer of each kind that makes any."""

    def over(self, spec: LayerSpec) -> Tensor | None:
        """The rows that the layer `spec` is the last to read."""
        if self.last_reader.get(spec.reads_kv_of) != spec.index:
            return None
        rows = self.rows.pop(spec.reads_kv_of)
        if self.kept is not None:
            self.kept[spec.kind] = rows
        return rows


class FusedLayers:
    """Consecutive layers, the addresses of whose weights were looked up once for activations like `x`."""

    def __init__(self, layers: tuple[Layer, ...], x: Tensor, last_reader: Mapping[int, int]) -> None:
        self.layers, self.changes = layers, Watched.changes
        # Of a norm that nobody wraps: `verify` puts the input norms into boxes, which have no weight of their own.
        self.dtype, self.residual = layers[0].post_attention_layernorm.weight.dtype, x.dtype
        self._weights = [weight for layer in layers for weight in _weights(layer)]  # their memory stays
        self._readers = {layer.spec.reads_kv_of: layer for layer in reversed(layers)}
        """Of each source of rows, its first reader here."""
        self._kinds = {layer.spec.kind: layer.spec for layer in layers}
        sources, kinds = list(self._readers), list(self._kinds)
        parts = []
        for layer in layers:
            spec, source = layer.spec, layer.spec.reads_kv_of
            place = (kinds.index(spec.kind), sources.index(source), last_reader.get(source) == spec.index)
            parts.append(_part(layer, self.dtype, place) if x.dtype == torch.float32 else None)
        ready = [part for part in parts if part is not None]
        self.plan = cpu.prepare_layers(ready) if len(ready) == len(parts) else None

    def current(self, layers: tuple[Layer, ...], x: Tensor) -> bool:
        """Are these still the layers that were looked up, with the same weights?"""
        return x.dtype == self.residual and self.changes == Watched.changes and self.layers == layers

    def run(self, x: Tensor, ple: Tensor | None, step: Step) -> Tensor | None:
        """All layers, and the storing of what they are the last to read; None where the kernels can't."""
        angles = [step.angles[kind] for kind in self._kinds]
        if self.plan is None or any(cos.dtype != torch.float32 for cos, _ in angles):
            return None
        views = [step.see(layer.spec) for layer in self._readers.values()]
        rows = list(self._rows(x.new_empty(0, dtype=self.dtype), step))
        norms = [step.k_weight(layer.spec) for layer in self._readers.values()]
        if any(norm is not None and norm.dtype != self.dtype for norm in norms):
            return None
        sources = []
        for made, view, norm in zip(rows, views, norms, strict=True):
            if (source := cpu.looked_in(made, view)) is None:
                return None
            sources.append((*source, 0 if norm is None else norm.data_ptr()))
        kinds = []
        for spec, (cos, sin) in zip(self._kinds.values(), angles, strict=True):
            view = step.see(spec)
            slots = 0 if view.past is None else view.past.slots.data_ptr()
            kinds.append((cos.data_ptr(), sin.data_ptr(), cos.shape[1], slots, cpu.asking(view)))
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        of_layers = (0, 0) if ple is None else (ple.data_ptr(), ple.stride(0))
        self.plan.run(x.data_ptr(), x.shape[0], y.data_ptr(), *of_layers, step.tokens, kinds, sources)
        for layer in self.layers:
            step.over(layer.spec)
        return y

    def _rows(self, like: Tensor, step: Step) -> Iterator[Tensor]:
        """Memory for the rows of each source. Those that nobody but their maker reads share one."""
        own: dict[Kind, Tensor] = {}
        for source, layer in self._readers.items():
            spec = layer.spec
            if spec.owns_kv:
                alone = step.last_reader.get(source) == source and step.kept is None
                rows = own.get(spec.kind) if alone else None
                if rows is None:
                    rows = like.new_empty(step.tokens, spec.kv_heads, layer.self_attn.row_width)
                if alone:
                    own[spec.kind] = rows
                step.rows[source] = rows
            yield step.rows[source]


_fused: WeakKeyDictionary[nn.Module, FusedLayers] = WeakKeyDictionary()


def run_layers(layers: tuple[Layer, ...], x: Tensor, ple: Tensor | None, step: Step) -> Tensor:
    """`x` [Q, D] through consecutive layers, with their `ple` [Q, layers, P]: in one call where that can be."""
    if (whole := fused(layers, x, step.last_reader)) and (y := whole.run(x, ple, step)) is not None:
        return y
    for i, layer in enumerate(layers):
        spec, of_layer = layer.spec, None if ple is None else ple[:, i]
        view = step.see(spec)
        x = layer(x, of_layer, step.rows, view, step.angles[spec.kind], step.k_weight(spec))
        rows = step.over(spec)
        # Only now: new rows may lie in the slots of rows that leave the window, which every reader had to see first.
        if rows is not None and view.pages is not None and view.past is not None:
            ops.store(view.pages, rows, view.past.slots)
    return x


def fused(layers: tuple[Layer, ...], x: Tensor, last_reader: Mapping[int, int]) -> FusedLayers | None:
    """`layers` for activations like `x`; None where there are no kernels for them."""
    if not cpu.ready(x):
        return None
    known = _fused.get(layers[0])
    if known is None or not known.current(layers, x):
        known = _fused[layers[0]] = FusedLayers(layers, x, last_reader)
    return known


def neighbours(layers: Iterable[Layer]) -> list[tuple[Layer, ...]]:
    """Layers that may be called together: all of them make rows, or none does."""
    alike = groupby(layers, lambda layer: layer.spec.owns_kv)
    return [tuple(part) for _, part in alike]


def _weights(layer: Layer) -> Iterator[Any]:
    for module in layer.modules():
        yield from (
            tensor.detach()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        )
        yield getattr(module, "weight", None)


def _part(layer: Layer, dtype: torch.dtype, place: tuple[int, int, bool]) -> Any:
    """A layer as the kernels want to know it, or None when something in it is not what they know."""
    spec, attn = layer.spec, layer.self_attn
    if spec.experts or dtype not in cpu.DTYPES:
        return None
    norms = [_module(layer, name) for name in _NORMS]
    products = [_module(layer, name) for name in _MATRICES]
    if any(type(norm) not in (RMSNorm, type(None)) for norm in norms):
        return None
    if any(type(product) not in (Linear, type(None)) for product in products):
        return None
    vectors = [None if norm is None else norm.weight for norm in norms] + [layer.layer_scalar]
    if any(vector is not None and vector.dtype != dtype for vector in vectors):
        return None
    matrices = []
    for product in products:
        matrix = _NOTHING if product is None else cpu.as_matrix(product.weight, dtype)
        if matrix is None:
            return None
        matrices.append(matrix)
    query, key, value, _, gate, up, *_ = matrices
    together = ((query, key, value), (gate, up))  # they are multiplied with the same rounded activations
    if any(m != _NOTHING and m[0] != first[0] for first, *others in together for m in others):
        return None
    head = (cpu.DTYPES[dtype], attn.eps, spec.q_heads, spec.head_dim)
    stored = (spec.kv_heads, attn.row_width, attn.key_offset, attn.value_offset, spec.window or 0)
    addresses = tuple(0 if vector is None else vector.data_ptr() for vector in vectors)
    return head, addresses, tuple(matrices), stored, place


def _module(layer: nn.Module, name: str) -> Any:
    """The module at a dotted name, None where this layer has none."""
    found: Any = layer
    for part in name.split("."):
        found = found._modules.get(part)
        if found is None:
            return None
    return found
