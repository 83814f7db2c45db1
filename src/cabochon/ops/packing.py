"""Making quantised weights: `quant.quantize` and `quant.pack` through the C++ kernels, the same bits in a fraction of
the time. Matrices that the kernels don't take (another float type, another device, strides) go the plain way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import quant
from ..formats import FORMATS
from ..quant import GROUP, PANEL, Layout, QuantTensor
from . import cpu

NUMBERS_AT_ONCE = 1 << 24
"""That are quantised at a time without kernels."""


def quantize(weight: Tensor, format: str, layout: Layout = "rows") -> QuantTensor:
    """`weight` [.., O, I] in `format`. Panels are made directly, without a copy in rows.

    Raises:
        InputError: the format is not a quantised one.
    """
    if format not in cpu.FORMATS or not cpu.knows(weight) or not weight.is_contiguous():
        rows = quantize_in_blocks(weight, format)
        return quant.pack(rows) if layout == "panels" else rows
    out = _empty(weight.shape, format, layout, weight.dtype)
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


def pack(weight: QuantTensor) -> QuantTensor:
    """The same weight in the layout of panels."""
    parts = (weight.codes, weight.scales)
    if weight.layout == "panels" or not cpu.on() or not all(p.is_cpu and p.is_contiguous() for p in parts):
        return quant.pack(weight)
    out = _empty(weight.shape, weight.format, "panels", weight.dtype)
    for (codes, scales), (to_codes, to_scales) in zip(_matrices(weight), _matrices(out), strict=True):
        cpu.pack(codes, scales, weight.shape[-2:], weight.format, to_codes, to_scales)
    return out


def _empty(shape: tuple[int, ...], format: str, layout: Layout, dtype: torch.dtype) -> QuantTensor:
    """Memory for a weight; what is streamed through in every step lies in huge pages."""
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
    codes = torch.empty(*lead, *code_shape, dtype=code_type)
    scales = torch.empty(
        *lead, *scale_shape, dtype=torch.float16 if FORMATS[format].scale_bytes == 2 else torch.float32
    )
    if layout == "panels":
        cpu.prefer_huge_pages(codes)
    return QuantTensor(codes, scales, format, tuple(shape), layout, dtype)


def _matrices(weight: QuantTensor) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of every matrix of a weight [.., O, I], all leading axes in one."""
    lead = len(weight.shape) - 2
    stacked = (part.flatten(0, lead - 1) if lead else part[None] for part in (weight.codes, weight.scales))
    return list(zip(*(part.unbind(0) for part in stacked), strict=True))
