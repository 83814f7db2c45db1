"""Making quantised weights: `quant.quantize` and `quant.pack` through the C++ kernels, the same bits in a fraction of
the time. Matrices that the kernels don't take (another float type, another device, strides) go the plain way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import quant
from ..formats import FORMATS
from ..quant import GROUP, PANEL, Layout, QuantTensor
from . import cpu

CACHE_LINE = 64
NUMBERS_AT_ONCE = 1 << 24
"""That are quantised at a time without kernels."""


class Arena:
    """Memory for weights that every step streams through, all of it in huge pages. Alone, a matrix of a few MiB lies in
    small ones for the greater part, which cost four times as much to get and a missed translation every 4 KiB.

    Weights lie side by side in large pieces; a piece is given back when the last of them is gone.
    """

    PIECE = 1 << 26
    """Bytes asked for at a time. What nobody has written to takes no memory."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of unspecified content that begins at a cache line."""
        size = math.prod(shape) * dtype.itemsize
        lines = -(-size // CACHE_LINE) * CACHE_LINE
        at = next((i for i, free in enumerate(self._free) if len(free) >= lines), len(self._free))
        if at == len(self._free):
            self._free.append(_piece(max(lines, self.PIECE)))
        free = self._free[at]
        self._free[at] = free[lines:]
        return free[:size].view(dtype).view(shape)


def _piece(size: int) -> Tensor:
    memory = torch.empty(size + cpu.HUGE_PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % cpu.HUGE_PAGE
    piece = memory[begin : begin + size]
    cpu.prefer_huge_pages(piece)
    return piece


def quantize(weight: Tensor, format: str, layout: Layout = "rows", arena: Arena | None = None) -> QuantTensor:
    """`weight` [.., O, I] in `format`. Panels are made directly, without a copy in rows; in `arena` if there is one.

    Raises:
        InputError: the format is not a quantised one.
    """
    if format not in cpu.FORMATS or not cpu.knows(weight) or not weight.is_contiguous():
        rows = quantize_in_blocks(weight, format)
        return quant.pack(rows) if layout == "panels" else rows
    out = _empty(weight.shape, format, layout, weight.dtype, arena)
    matrices = weight.reshape(-1, *weight.shape[-2:])
    for i, (codes, scales) in enumerate(_matrices(out)):
        cpu.quantize(matrices[i], format, layout == "panels", codes, scales)
    return out


def quantize_in_blocks(weight: Tensor, format: str) -> QuantTensor:
    """`quant.quantize`, a few rows (or experts) at a time: the float32 copies stay small beside the result."""
    step = max(1, NUMBERS_AT_ONCE // max(1, weight[0].numel()))
    first = quant.quantize(weight[:step], format)
    if step >= weight.shape[0]:
        return first
    codes, scales = (part.new_empty(weight.shape[0], *part.shape[1:]) for part in (first.codes, first.scales))
    for top in range(0, weight.shape[0], step):
        rows = slice(top, top + step)
        block = quant.quantize(weight[rows], format)
        codes[rows], scales[rows] = block.codes, block.scales
    return QuantTensor(codes, scales, format, tuple(weight.shape), dtype=weight.dtype)


def pack(weight: QuantTensor, arena: Arena | None = None) -> QuantTensor:
    """The same weight in the layout of panels; in `arena` if there is one."""
    parts = (weight.codes, weight.scales)
    if weight.layout == "panels" or not cpu.on() or not all(p.is_cpu and p.is_contiguous() for p in parts):
        return quant.pack(weight)
    out = _empty(weight.shape, weight.format, "panels", weight.dtype, arena)
    for (codes, scales), (to_codes, to_scales) in zip(_matrices(weight), _matrices(out), strict=True):
        cpu.pack(codes, scales, weight.shape[-2:], weight.format, to_codes, to_scales)
    return out


def _empty(shape: tuple[int, ...], format: str, layout: Layout, dtype: torch.dtype, arena: Arena | None) -> QuantTensor:
    *lead, rows, width = shape
    groups, panels = -(-width // GROUP), -(-rows // PANEL)
    sizes: dict[tuple[str, Layout], tuple[tuple[int, ...], tuple[int, ...]]] = {
        ("int8", "rows"): ((rows, width), (rows,)),
        ("int4", "rows"): ((rows, groups, 16), (rows, groups)),
        ("int8", "panels"): ((panels, groups * 8, PANEL, 4), (panels, PANEL)),
        ("int4", "panels"): ((panels, groups, 4, PANEL, 4), (panels, groups, PANEL)),
    }
    code_shape, scale_shape = sizes[format, layout]
    code_type = torch.int8 if (format, layout) == ("int8", "rows") else torch.uint8
    scale_type = torch.float16 if FORMATS[format].scale_bytes == 2 else torch.float32
    empty = torch.empty if arena is None else arena.empty
    codes, scales = empty((*lead, *code_shape), dtype=code_type), empty((*lead, *scale_shape), dtype=scale_type)
    if layout == "panels" and arena is None:
        cpu.prefer_huge_pages(codes)
    return QuantTensor(codes, scales, format, tuple(shape), layout, dtype)


def _matrices(weight: QuantTensor) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of every matrix of a weight [.., O, I], all leading axes in one."""
    lead = len(weight.shape) - 2
    stacked = (part.flatten(0, lead - 1) if lead else part[None] for part in (weight.codes, weight.scales))
    return list(zip(*(part.unbind(0) for part in stacked), strict=True))
