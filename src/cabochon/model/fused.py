"""Decoder layers in one call of the CPU kernels, where those take them: with dense feed-forward.

`Layer.forward` op by op is the definition and what training runs. A call does what some twenty ops do, and calls of a
step with few rows are put off and made together: whatever the interpreter does between two layers it does with empty
caches, six times as slowly. The kernels, their order and the roundings between them are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops import cpu
from ..ops.views import View
from .decoder import Angles, Layer
from .layers import Linear, RMSNorm
from .links import links

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
_FEW = 64
"""So many rows wait for each other: what they store stays in memory until then."""


class Calls:
    """Layers that are called together, and what is to be done after them."""

    def __init__(self) -> None:
        self._calls: list[Any] = []
        self._needed: list[Tensor] = []
        self._after: list[Callable[[], None]] = []

    def add(self, call: Any, rows: int, *tensors: Tensor | None) -> None:
        """A prepared layer with its arguments, which hold addresses of `tensors`."""
        self._calls.append(call)
        self._needed += [tensor for tensor in tensors if tensor is not None]
        if rows > _FEW:
            self.make()

    def then(self, what: Callable[[], None]) -> None:
        """Do `what` after the layers that wait; at once if none does."""
        self._after.append(what)
        if not self._calls:
            self.make()

    def make(self) -> None:
        """Now: somebody wants the results."""
        if self._calls:
            cpu.run_layers(self._calls)
        for what in self._after:
            what()
        self._calls, self._needed, self._after = [], [], []


class FusedLayer:
    """The addresses of a layer's weights, looked up once for activations like `x`."""

    def __init__(self, layer: Layer, x: Tensor) -> None:
        self.spec, self.row_width = layer.spec, layer.self_attn.row_width
        self.dtype, self.residual = layer.input_layernorm.weight.dtype, x.dtype
        self.links = list(links(layer))
        self.kernel = _kernel(layer, self.dtype) if x.dtype == torch.float32 else None

    def current(self, x: Tensor) -> bool:
        """Are modules and weights still those that were looked up? Any of them may have been replaced or converted."""
        return x.dtype == self.residual and cpu.unchanged(self.links)

    def run(
        self,
        calls: Calls,
        x: Tensor,
        ple: Tensor | None,
        step: dict[int, Tensor],
        view: View,
        angles: Angles,
        k_weight: Tensor | None,
    ) -> Tensor | None:
        """`Layer.forward`, whose result is there when `calls` are made; None where the kernels can't."""
        spec, (cos, sin) = self.spec, angles
        seen = cpu.seen_by(self.dtype, view)
        if self.kernel is None or seen is None or cos.dtype != self.dtype:
            return None
        if spec.k_eq_v and (k_weight is None or k_weight.dtype != cos.dtype):
            return None
        if spec.owns_kv:
            step[spec.index] = cos.new_empty(x.shape[0], spec.kv_heads, self.row_width)
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        of_layer = (0, 0) if ple is None else (ple.data_ptr(), ple.stride(0))
        turn = (cos.data_ptr(), sin.data_ptr(), cos.shape[1], 0 if k_weight is None else k_weight.data_ptr())
        stored = step[spec.reads_kv_of]
        call = (self.kernel, x.data_ptr(), x.shape[0], y.data_ptr(), stored.data_ptr(), *turn, *of_layer, seen)
        calls.add(call, x.shape[0], x, stored, cos, sin, k_weight, ple)
        return y


_fused: WeakKeyDictionary[nn.Module, FusedLayer] = WeakKeyDictionary()


def run_layer(
    calls: Calls,
    layer: Layer,
    x: Tensor,
    ple: Tensor | None,
    step: dict[int, Tensor],
    view: View,
    angles: Angles,
    k_weight: Tensor | None,
) -> Tensor:
    """`layer(...)`, in one call where that can be, which then is one of `calls`."""
    if (whole := fused(layer, x)) and (y := whole.run(calls, x, ple, step, view, angles, k_weight)) is not None:
        return y
    calls.make()
    out: Tensor = layer(x, ple, step, view, angles, k_weight)
    return out


def fused(layer: Layer, x: Tensor) -> FusedLayer | None:
    """`layer` for activations like `x`; None where there are no kernels for them."""
    if not cpu.ready(x):
        return None
    known = _fused.get(layer)
    if known is None or not known.current(x):
        known = _fused[layer] = FusedLayer(layer, x)
    return known


def _kernel(layer: Layer, dtype: torch.dtype) -> Any:
    """The prepared call, or None when something in the layer is not what the kernel knows."""
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
    return cpu.prepare_layer(head, addresses, tuple(matrices), stored)


def _module(layer: nn.Module, name: str) -> Any:
    """The module at a dotted name, None where this layer has none."""
    found: Any = layer
    for part in name.split("."):
        found = found._modules.get(part)
        if found is None:
            return None
    return found
