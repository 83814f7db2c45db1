"""Triton twins of the ops that touch each row once: norm, rotation, embedding and the store into pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Weight, rounded
from .triton_matmul import _gelu, parts
from .views import Pages, ScaledPages

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and taking it away rounds a float32 of up to 2^22 to the nearest even integer."""


@triton.jit
def _norm(
    x_ptr,
    weight_ptr,
    onto_ptr,
    y_ptr,
    rows,
    eps,
    gain,
    WIDTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    ONTO: tl.constexpr,
    BR: tl.constexpr,
    B: tl.constexpr,
):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    i = tl.arange(0, B)[None, :]
    at = r.to(tl.int64)[:, None] * WIDTH + i
    inside = (r < rows)[:, None] & (i < WIDTH)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = x * (gain * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps))[:, None]
    if WEIGHT:
        y *= tl.load(weight_ptr + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    if ONTO:
        y += tl.load(onto_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    lines,
    N: tl.constexpr,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    BR: tl.constexpr,
    B: tl.constexpr,
):
    line = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None].to(tl.int64)
    i = tl.arange(0, B)[None, :]
    inside = (line < lines) & (i < HALF)
    turned = (line < lines) & (i < TURNED)
    a = tl.load(x_ptr + line * (2 * HALF) + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + line * (2 * HALF) + HALF + i, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + line // N * TURNED + i, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + line // N * TURNED + i, mask=turned, other=0.0).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    tl.store(y_ptr + line * (2 * HALF) + i, (a * cos - b * sin).to(kind), mask=inside)
    tl.store(y_ptr + line * (2 * HALF) + HALF + i, (b * cos + a * sin).to(kind), mask=inside)


@triton.jit
def _gate(a_ptr, b_ptr, y_ptr, count, B: tl.constexpr):
    """gelu_tanh(a) * b in the type of b; the first is rounded to that of a, as a tensor of its own would be."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    a = _gelu(tl.load(a_ptr + i, mask=i < count, other=0.0).to(tl.float32)).to(a_ptr.dtype.element_ty).to(tl.float32)
    b = tl.load(b_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, (a * b).to(y_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def _embed(ids_ptr, table_ptr, scales_ptr, y_ptr, factor, WIDTH: tl.constexpr, FORMAT: tl.constexpr, B: tl.constexpr):
    """FORMAT as in `triton_matmul`: 0 plain, 1 int8 with a scale per row, 2 int4 with one per 32 numbers."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    row, inside = tl.load(ids_ptr + t), i < WIDTH
    if FORMAT == 2:
        groups: tl.constexpr = (WIDTH + 31) // 32
        byte = tl.load(table_ptr + row * (groups * 16) + i // 32 * 16 + i % 16, mask=inside, other=136)
        level = tl.where(i % 32 < 16, byte & 15, byte >> 4).to(tl.float32) - 8.0
        x = level * tl.load(scales_ptr + row * groups + i // 32, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(table_ptr + row * WIDTH + i, mask=inside, other=0).to(tl.float32)
        if FORMAT == 1:
            x *= tl.load(scales_ptr + row)
    tl.store(y_ptr + t * WIDTH + i, (x * factor).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _float8(x):
    """The bits of float8_e4m3fn nearest to float32 `x`, |x| <= 448. Spelt out because older GPUs have no such cast."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.abs(x)
    small = ((size * 512.0 + ROUND) - ROUND).to(tl.int32)  # multiples of 2^-9, up to the first normal number 2^-6
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    return (tl.where(size < 0.015625, small, normal) | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def _store(
    rows_ptr,
    slots_ptr,
    pages_ptr,
    scales_ptr,
    K: tl.constexpr,
    W: tl.constexpr,
    SPLIT: tl.constexpr,
    FLOAT8: tl.constexpr,
    B: tl.constexpr,
):
    """Row (token, KV head) to its slot; SPLIT > 0 rounds each side of it to 8 bits with its own scale."""
    line = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + line // K)
    if slot < 0:
        return
    i = tl.arange(0, B)
    x = tl.load(rows_ptr + line * W + i, mask=i < W, other=0.0)
    target = slot * K + line % K
    if SPLIT > 0:
        x = x.to(tl.float32)
        largest: tl.constexpr = 448.0 if FLOAT8 else 127.0
        first = tl.maximum(tl.max(tl.where(i < SPLIT, tl.abs(x), 0.0)) / largest, 1e-20)
        second = tl.maximum(tl.max(tl.where(i < SPLIT, 0.0, tl.abs(x))) / largest, 1e-20)
        tl.store(scales_ptr + target * 2, first)
        tl.store(scales_ptr + target * 2 + 1, second)
        x = x / tl.where(i < SPLIT, first, second)
        if FLOAT8:
            tl.store(pages_ptr + target * W + i, _float8(x), mask=i < W)
        else:
            tl.store(pages_ptr + target * W + i, ((x + ROUND) - ROUND).to(tl.int8), mask=i < W)
    else:
        tl.store(pages_ptr + target * W + i, x.to(pages_ptr.dtype.element_ty), mask=i < W)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, gain: float = 1.0, onto: Tensor | None = None, wide: bool = False
) -> Tensor:
    """`onto + gain * reference.rms_norm` for float32, bfloat16 and float16; if `wide` in the type of `x`."""
    width = x.shape[-1]
    x, onto = x.contiguous(), None if onto is None else onto.contiguous()
    y = torch.empty_like(x, dtype=x.dtype if wide or weight is None else weight.dtype)
    rows, tile = y.numel() // width, _tile(width)
    if rows:
        _norm[(triton.cdiv(rows, tile["BR"]),)](
            x, x if weight is None else weight, x if onto is None else onto, y, rows, eps, gain,
            WIDTH=width, WEIGHT=weight is not None, ONTO=onto is not None, **tile,
        )  # fmt: skip
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`reference.rope`; the products are rounded once, at the end."""
    tokens, heads, head = x.shape
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    tile = _tile(head // 2)
    if y.numel():
        _rope[(triton.cdiv(tokens * heads, tile["BR"]),)](
            x, cos.contiguous(), sin.contiguous(), y, tokens * heads,
            N=heads, HALF=head // 2, TURNED=cos.shape[-1], **tile,
        )  # fmt: skip
    return y


def gate(a: Tensor, b: Tensor) -> Tensor:
    """`reference.gate`."""
    y = torch.empty_like(b, memory_format=torch.contiguous_format)
    if y.numel():
        _gate[(triton.cdiv(y.numel(), 1024),)](a.contiguous(), b.contiguous(), y, y.numel(), B=1024, num_warps=4)
    return y


def embed(ids: Tensor, table: Weight, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """`reference.embed`; the table may lie in pinned host memory: the GPU reads the rows of the step from there."""
    width = table.shape[1]
    codes, scales, format = parts(table)
    y = torch.empty(ids.shape[0], width, dtype=dtype or table.dtype, device=ids.device)
    block = min(triton.next_power_of_2(width), 1024)
    if y.numel():
        _embed[(ids.shape[0], triton.cdiv(width, block))](
            ids,
            codes,
            scales,
            y,
            rounded(scale, table.dtype),
            WIDTH=width,
            FORMAT=format,
            B=block,
            num_warps=_warps(block),
        )
    return y


def store(pages: Pages, rows: Tensor, slots: Tensor) -> None:
    """`reference.store`: plain pages, int8 or float8 with two scales per row."""
    tokens, heads, width = rows.shape
    scaled = isinstance(pages, ScaledPages)
    stored = pages.codes if isinstance(pages, ScaledPages) else pages
    float8 = scaled and stored.dtype == torch.float8_e4m3fn
    block = triton.next_power_of_2(width)
    if rows.numel():
        _store[(tokens * heads,)](
            rows.contiguous(), slots, stored.view(torch.uint8) if float8 else stored,
            pages.scales if isinstance(pages, ScaledPages) else slots,
            K=heads, W=width, SPLIT=pages.split if isinstance(pages, ScaledPages) else 0, FLOAT8=float8,
            B=block, num_warps=_warps(block),
        )  # fmt: skip


def _tile(width: int) -> dict[str, int]:
    """Narrow rows go several to a program, so that each thread has eight numbers."""
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    return {"BR": rows, "B": block, "num_warps": _warps(rows * block)}


def _warps(numbers: int) -> int:
    """Eight numbers per thread, up to eight warps."""
    return max(1, min(8, numbers // 256))
