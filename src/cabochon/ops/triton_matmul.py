"""Matrices times few rows, and experts times any, in Triton: weights in 16 bits, int8 or int4 are read once, as stored.

Unusual here: one row of x is padded to the sixteen that a tensor core multiplies anyway, so decode, verification and
grouped experts share one inner product, and a row's sums do not depend on how many rows stand beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant import QuantTensor
from .triton_tiles import MatmulTile, generation, matmul_tile

Weight = Tensor | QuantTensor
FORMATS = {"int8": 1, "int4": 2}
"""Format of a weight as the kernels know it; 0 is a plain tensor."""


@triton.jit
def _dot(
    x_ptr, x_row, x_live, w_ptr, scale_ptr, w_row, w_live, I: tl.constexpr, FORMAT: tl.constexpr, BI: tl.constexpr
):
    """Rows `x_row` [R] of x [.., I] times rows `w_row` [O] of a weight -> [R, O] float32, in a fixed order along I.

    int4: byte b of a row holds elements (b // 16) * 32 + b % 16 and 16 further (see `quant`); the halves are two dots.
    """
    acc = tl.zeros((x_row.shape[0], w_row.shape[0]), tl.float32)
    if FORMAT == 2:
        GROUPS: tl.constexpr = (I + 31) // 32
        half = tl.arange(0, BI // 2)
        for at in range(0, GROUPS, BI // 32):
            group = at + half // 16
            inside = w_live[None, :] & (group < GROUPS)[:, None]
            codes = tl.load(w_ptr + w_row[None, :] * (GROUPS * 16) + (at * 16 + half)[:, None], mask=inside, other=136)
            scale = tl.load(scale_ptr + w_row[None, :] * GROUPS + group[:, None], mask=inside, other=0.0).to(tl.float32)
            low = ((codes & 15).to(tl.float32) - 8.0) * scale
            high = ((codes >> 4).to(tl.float32) - 8.0) * scale
            i = group * 32 + half % 16
            left = tl.load(x_ptr + x_row[:, None] * I + i[None, :], mask=x_live[:, None] & (i < I)[None, :], other=0.0)
            i += 16
            right = tl.load(x_ptr + x_row[:, None] * I + i[None, :], mask=x_live[:, None] & (i < I)[None, :], other=0.0)
            acc = tl.dot(left, low.to(left.dtype), acc, input_precision="ieee")
            acc = tl.dot(right, high.to(right.dtype), acc, input_precision="ieee")
    else:
        k = tl.arange(0, BI)
        for at in range(0, I, BI):
            i = at + k
            x = tl.load(x_ptr + x_row[:, None] * I + i[None, :], mask=x_live[:, None] & (i < I)[None, :], other=0.0)
            inside = (i < I)[:, None] & w_live[None, :]
            w = tl.load(w_ptr + w_row[None, :] * I + i[:, None], mask=inside, other=0)
            if FORMAT == 1:
                w = w.to(tl.float32)
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
        if FORMAT == 1:
            acc *= tl.load(scale_ptr + w_row, mask=w_live, other=0.0)[None, :]
    return acc


@triton.jit
def _gelu(x):
    """gelu_tanh in float32; tanh by exp, since Triton has none of its own."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * tl.maximum(inner, -40.0)))  # below that it is zero, and exp would overflow


@triton.jit
def _linear(
    x_ptr,
    w_ptr,
    scale_ptr,
    y_ptr,
    rows,
    I: tl.constexpr,
    O: tl.constexpr,
    FORMAT: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    o = (tl.program_id(1) * BO + tl.arange(0, BO)).to(tl.int64)
    y = _dot(x_ptr, r, r < rows, w_ptr, scale_ptr, o, o < O, I, FORMAT, BI)
    tl.store(
        y_ptr + r[:, None] * O + o[None, :], y.to(y_ptr.dtype.element_ty), mask=(r < rows)[:, None] & (o < O)[None, :]
    )


@triton.jit
def _gated(
    x_ptr,
    gate_ptr,
    gate_scale_ptr,
    up_ptr,
    up_scale_ptr,
    y_ptr,
    rows,
    I: tl.constexpr,
    O: tl.constexpr,
    FORMAT: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """gelu_tanh(x @ gate.T) * (x @ up.T); both are rounded to x's type first, as two separate matmuls would."""
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    o = (tl.program_id(1) * BO + tl.arange(0, BO)).to(tl.int64)
    kind = y_ptr.dtype.element_ty
    gate = _dot(x_ptr, r, r < rows, gate_ptr, gate_scale_ptr, o, o < O, I, FORMAT, BI).to(kind).to(tl.float32)
    up = _dot(x_ptr, r, r < rows, up_ptr, up_scale_ptr, o, o < O, I, FORMAT, BI).to(kind).to(tl.float32)
    y = _gelu(gate).to(kind).to(tl.float32) * up
    tl.store(y_ptr + r[:, None] * O + o[None, :], y.to(kind), mask=(r < rows)[:, None] & (o < O)[None, :])


def parts(weight: Weight) -> tuple[Tensor, Tensor, int]:
    """(codes, scales, format) of a weight as the kernels take it; a plain tensor stands for its own scales."""
    if isinstance(weight, QuantTensor):
        assert weight.layout == "rows", "the panels are for CPUs"
        return weight.codes, weight.scales, FORMATS[weight.format]
    return weight.contiguous(), weight, 0


def linear(x: Tensor, weight: Weight, wide: bool = False) -> Tensor:
    """`reference.linear` for a weight [O, I]; x [.., I] float32, bfloat16 or float16."""
    flat = x.flatten(0, -2).contiguous()
    outputs, inputs = weight.shape
    y = x.new_empty(flat.shape[0], outputs, dtype=torch.float32 if wide else x.dtype)
    tile = matmul_tile(generation(x.device))
    codes, scales, format = parts(weight)
    if y.numel():
        _linear[(triton.cdiv(flat.shape[0], tile.rows), triton.cdiv(outputs, tile.outputs))](
            flat, codes, scales, y, flat.shape[0],
            I=inputs, O=outputs, FORMAT=format, **sizes(tile),
        )  # fmt: skip
    return y.unflatten(0, x.shape[:-1])


def gated(x: Tensor, gate: Weight, up: Weight) -> Tensor:
    """`gelu_tanh(x @ gate.T) * (x @ up.T)`: [T, D] -> [T, F]; gate and up [F, D] are of one format."""
    outputs, inputs = gate.shape
    y = x.new_empty(x.shape[0], outputs)
    tile = matmul_tile(generation(x.device))
    codes, scales, format = parts(gate)
    up_codes, up_scales, up_format = parts(up)
    assert format == up_format, "gate and up have one format"
    if y.numel():
        _gated[(triton.cdiv(x.shape[0], tile.rows), triton.cdiv(outputs, tile.outputs))](
            x.contiguous(), codes, scales, up_codes, up_scales, y, x.shape[0],
            I=inputs, O=outputs, FORMAT=format, **sizes(tile),
        )  # fmt: skip
    return y


def sizes(tile: MatmulTile) -> dict[str, int]:
    return {
        "BR": tile.rows, "BO": tile.outputs, "BI": tile.inputs, "num_warps": tile.warps, "num_stages": tile.stages
    }  # fmt: skip
