"""The ops through the Triton kernels of `triton_*`, for CUDA and ROCm; what they don't take goes to `reference`.

Nothing here waits for the device or reads a value from it, so that a whole step can be recorded in a graph. Plain
matrices go to the vendor's matmul, whose sums differ between one row and many; `use_invariant(True)` (or the
environment's CABOCHON_INVARIANT=1) sends them through our kernel instead, one tile shape for all: a row's result is
then the same bits whatever stands beside it, at the price that docs/gpu.md states.

Triton is imported with the first tensor on a GPU; installing and importing the package needs neither.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..errors import InputError
from ..quant import QuantTensor, dequantize
from . import reference, reference_drawing
from .reference import Weight
from .views import Pages, View

FEW = 64
"""Rows up to which quantised weights are multiplied as they are; for more they are widened for the call."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_invariant = os.environ.get("CABOCHON_INVARIANT") == "1"


def use_invariant(on: bool) -> None:
    """Do a row's sums stay the same whatever the batch is?"""
    global _invariant
    _invariant = on


def ready(x: Tensor) -> bool:
    """Are there kernels for `x` (numbers in a type they know, or ids)? Where gradients are recorded there are none."""
    known = x.dtype in _DTYPES or not x.is_floating_point()
    return x.is_cuda and known and not torch.is_grad_enabled() and bool(kernels())


@cache
def kernels() -> tuple[ModuleType, ...]:
    """(attention, experts, matmul, rows), or nothing where Triton is not installed."""
    try:
        from . import triton_attention, triton_experts, triton_matmul, triton_rows
    except ModuleNotFoundError:
        return ()
    return triton_attention, triton_experts, triton_matmul, triton_rows


def linear(x: Tensor, weight: Weight, wide: bool = False) -> Tensor:
    if _ours(x, weight):
        y: Tensor = kernels()[2].linear(x, weight, wide)
        return y
    if not wide or x.dtype not in (torch.bfloat16, torch.float16) or not x.is_cuda or torch.version.hip:
        return reference.linear(x, weight, wide)
    # In one launch, and not rounded: cuBLAS can give what it has added up, ROCm's library can't.
    dense = dequantize(weight, x.dtype) if isinstance(weight, QuantTensor) else weight
    sums: Tensor = torch.mm(x.flatten(0, -2), dense.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    return sums


def _ours(x: Tensor, weight: Weight) -> bool:
    """Is our matmul the better one? It reads quantised weights as they are, but is made for few rows."""
    return _invariant or (isinstance(weight, QuantTensor) and x.numel() <= FEW * x.shape[-1])


def gated_mlp(x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    if not _ours(x, gate) or _kind(gate) != _kind(up):
        return linear(kernels()[3].gate(linear(x, gate), linear(x, up)), down, wide=True)
    return linear(kernels()[2].gated(x, gate, up), down, wide=True)


def _kind(weight: Weight) -> str:
    return weight.format if isinstance(weight, QuantTensor) else str(weight.dtype)


def head(x: Tensor, weight: Weight, softcap: float | None) -> Tensor:
    logits = linear(x, weight, wide=True)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def embed(ids: Tensor, table: Weight, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """As `reference.embed`; the table may lie in pinned host memory."""
    numbers = table.codes if isinstance(table, QuantTensor) else table
    if torch.float64 in (numbers.dtype, dtype):
        return reference.embed(ids, table, scale, dtype)
    if numbers.device != ids.device and not numbers.is_pinned():
        raise InputError("the embedding table lies in host memory that the GPU can't read; pin it or move it there")
    y: Tensor = kernels()[3].embed(ids, table, scale, dtype)
    return y


head_at = reference.head_at
largest = reference.largest
draw = reference_drawing.draw
log_sum = reference_drawing.log_sum
cos_sin = reference.cos_sin


def route(
    x: Tensor, proj: Weight, scale: Tensor, per_expert_scale: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    normed = kernels()[3].rms_norm(x, scale, eps, gain=x.shape[-1] ** -0.5)
    chosen, weights = kernels()[1].route(linear(normed, proj), per_expert_scale, top_k)
    return chosen, weights


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    y: Tensor = kernels()[1].experts(x, chosen, weights, gate_up, down)
    return y


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y: Tensor = kernels()[3].rms_norm(x, weight, eps)
    return y


def settle(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bound: float = torch.inf,
    onto: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    if bound != torch.inf:
        return reference.settle(x, weight, eps, bound=bound, onto=onto, share=share)
    y: Tensor = kernels()[3].rms_norm(x, weight, eps, gain=share, onto=onto, wide=True)
    return y


def per_layer_inputs(x: Tensor, token: Tensor, weight: Tensor, eps: float, scale: float) -> Tensor:
    return ((settle(x * scale, weight, eps) + token) * 2**-0.5).to(token.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    y: Tensor = kernels()[3].rope(x, cos, sin, dtype)
    return y


def gate(x: Tensor, y: Tensor) -> Tensor:
    gated: Tensor = kernels()[3].gate(x, y)
    return gated


def store(pages: Pages, rows: Tensor, slots: Tensor) -> None:
    kernels()[3].store(pages, rows, slots)


def attend(
    q: Tensor,
    step: Tensor,
    view: View,
    *,
    key_offset: int,
    value_offset: int,
    window: int | None,
) -> Tensor:
    y: Tensor = kernels()[0].attend(q, step, view, key_offset=key_offset, value_offset=value_offset, window=window)
    return y
