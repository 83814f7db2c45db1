"""Quantised weights: codes and scales as one value that `ops` understands in place of a tensor.

There are no `Int4Linear` modules: a loader puts a `QuantTensor` where the parameter was. It comes in two layouts:

    rows     the portable one, on disk and for GPUs: each row's codes lie together
             int8  codes [.., O, I] int8          scales [.., O] float32
             int4  codes [.., O, G, 16] uint8     scales [.., O, G] float16     G groups of 32 along I
                   byte i of a group holds element i in its low half and element 16 + i in its high half, plus 8
    panels   what the CPU kernels stream: 16 rows side by side, four neighbours of each row in 32 bits
             int8  codes [.., P, I/4, 16, 4] uint8, plus 128 scales [.., P, 16] float32      I filled up to 32s
             int4  codes [.., P, G, 4, 16, 4] uint8          scales [.., P, G, 16] float16

P is O / 16 rounded up. Both layouts hold the same codes, so packing is a permutation of bytes and loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .formats import QUANTIZED

Layout = Literal["rows", "panels"]

PANEL = 16
"""Rows in a panel: the lanes of a 512-bit register of 32-bit sums."""
GROUP = 32
"""Numbers that share a scale in int4, and activations that share one in every format."""
DIVISORS = (8.0, 7.25, 7.75, 8.25, 8.5, 8.75)
"""An int4 group's scale is its number of largest magnitude over minus one of these. The first, q4_0's own choice, puts
that number on the grid's end; another that is nearer to the group as a whole takes a tenth off the mean squared error.
Candidates beyond these six would take off one hundredth more."""


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A weight of logical `shape` in one of the quantised formats of `formats.py`."""

    codes: Tensor
    scales: Tensor
    format: str
    shape: tuple[int, ...]
    layout: Layout = "rows"
    dtype: torch.dtype = torch.bfloat16
    """Type of the tensor that it stands for: what looked-up rows come in."""

    def rows(self, index: Tensor) -> QuantTensor:
        """The rows `index` [T] of a two-dimensional weight, in the layout of rows."""
        shape = (index.shape[0], self.shape[1])
        if self.layout == "rows":
            return replace(self, codes=self.codes[index], scales=self.scales[index], shape=shape)
        panel, lane = index // PANEL, index % PANEL
        if self.format == "int8":
            codes = (self.codes[panel, :, lane].flatten(-2)[:, : shape[1]] ^ 128).view(torch.int8)
            scales = self.scales[panel, lane]
        else:
            codes, scales = self.codes[panel, :, :, lane].flatten(-2), self.scales[panel, :, lane]
        return replace(self, codes=codes, scales=scales, shape=shape, layout="rows")

    def __getitem__(self, expert: int) -> QuantTensor:
        """One expert's matrix of a three-dimensional weight."""
        return replace(self, codes=self.codes[expert], scales=self.scales[expert], shape=self.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def quantize(weight: Tensor, format: str) -> QuantTensor:
    """`weight` [.., O, I] of any float type in `format`, in the layout of rows.

    Raises:
        InputError: the format is not a quantised one.
    """
    if format == "int8":
        wide = weight.float()
        scales = wide.abs().amax(-1) / 127
        codes = (wide * _inverse(scales)[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        return QuantTensor(codes, scales, format, tuple(weight.shape), dtype=weight.dtype)
    if format != "int4":
        raise InputError(f"The format is {format!r}, but must be one of {', '.join(QUANTIZED)}.")
    groups = F.pad(weight.float(), (0, -weight.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))  # [.., O, G, 32]
    scales = fitted_scales(groups)
    levels = (groups * _inverse(scales.float())[..., None] + 8).round_().clamp_(0, 15).to(torch.uint8)
    return QuantTensor(_nibbles(levels), scales, format, tuple(weight.shape), dtype=weight.dtype)


def from_levels(levels: Tensor, scales: Tensor, format: str, dtype: torch.dtype) -> QuantTensor:
    """The weight whose numbers are `levels` [O, I] int8 times their scales, in the layout of rows."""
    shape = tuple(levels.shape)
    if format == "int8":
        return QuantTensor(levels, scales, format, shape, dtype=dtype)
    groups = F.pad(levels + 8, (0, -shape[1] % GROUP), value=8).view(torch.uint8).unflatten(-1, (-1, GROUP))
    return QuantTensor(_nibbles(groups), scales, format, shape, dtype=dtype)


def _nibbles(levels: Tensor) -> Tensor:
    """Levels [.., 32] from 0 to 15 as codes [.., 16]."""
    return levels[..., :16] | levels[..., 16:] << 4


def fitted_scales(groups: Tensor) -> Tensor:
    """The scales [..] float16 with which `groups` [.., 32] float32 lose least on q4_0's grid, by squared error.

    Tried are the quotients of the number of largest magnitude, whatever its sign, by minus each of `DIVISORS`.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = (largest / -DIVISORS[0]).half()
    least = _misfit(groups, best.float())
    for divisor in DIVISORS[1:]:
        scales = (largest / -divisor).half()
        error = _misfit(groups, scales.float())
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best[..., 0]


def _misfit(groups: Tensor, scales: Tensor) -> Tensor:
    """Squared errors of `groups` [.., 32] rounded with `scales` [.., 1]; added in the order of the kernels' lanes."""
    error = (groups - (groups * _inverse(scales)).round_().clamp_(-8, 7) * scales).square_()
    while (half := error.shape[-1] // 2) > 0:
        error = error[..., :half] + error[..., half:]
    return error


def _inverse(scales: Tensor) -> Tensor:
    return (1 / scales).masked_fill(scales == 0, 0.0)


def dequantize(weight: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as an ordinary tensor of `weight.shape`."""
    weight = unpack(weight)
    if weight.format == "int8":
        wide = weight.codes.float() * weight.scales[..., None]
    else:
        levels = torch.cat([weight.codes & 15, weight.codes >> 4], -1).float() - 8
        wide = (levels * weight.scales.float()[..., None]).flatten(-2)[..., : weight.shape[-1]]
    return wide.to(dtype)


def pack(weight: QuantTensor) -> QuantTensor:
    """The same weight in the layout of panels, for the CPU kernels. For a moment both copies exist."""
    if weight.layout == "panels":
        return weight
    lead, rows = weight.codes.dim() - (2 if weight.format == "int8" else 3), weight.shape[-2]
    missing = -rows % PANEL
    if weight.format == "int8":
        codes = F.pad(weight.codes, (0, -weight.shape[-1] % GROUP, 0, missing))
        codes = codes.unflatten(-1, (-1, 4)).unflatten(-3, (-1, PANEL)).transpose(lead + 1, lead + 2)
        codes = codes.contiguous().view(torch.uint8).bitwise_xor_(128)
        scales = F.pad(weight.scales, (0, missing)).unflatten(-1, (-1, PANEL))
    else:
        codes = F.pad(weight.codes, (0, 0, 0, 0, 0, missing))
        codes = codes.unflatten(-1, (4, 4)).unflatten(-4, (-1, PANEL))  # [.., P, 16, G, 4, 4]
        codes = codes.movedim(lead + 1, lead + 3).contiguous()
        scales = F.pad(weight.scales, (0, 0, 0, missing)).unflatten(-2, (-1, PANEL)).transpose(-1, -2).contiguous()
    return replace(weight, codes=codes, scales=scales.contiguous(), layout="panels")


def unpack(weight: QuantTensor) -> QuantTensor:
    """The same weight in the layout of rows."""
    if weight.layout == "rows":
        return weight
    rows, width = weight.shape[-2:]
    if weight.format == "int8":
        lead = weight.codes.dim() - 4
        codes = weight.codes.transpose(lead + 1, lead + 2).flatten(-2).flatten(lead, lead + 1)
        codes = (codes[..., :rows, :width] ^ 128).view(torch.int8)
        scales = weight.scales.flatten(-2)[..., :rows]
    else:
        lead = weight.codes.dim() - 5
        codes = weight.codes.movedim(lead + 3, lead + 1).flatten(-2).flatten(lead, lead + 1)[..., :rows, :, :]
        scales = weight.scales.transpose(-1, -2).flatten(-3, -2)[..., :rows, :]
    return replace(weight, codes=codes.contiguous(), scales=scales.contiguous(), layout="rows")


def round_activations(x: Tensor) -> Tensor:
    """`x` [.., I] as the integer kernels see it: groups of 32 neighbours on a grid of 255 steps, in float64.

    A group's scale is its largest magnitude over 127. The kernels multiply these codes with the weight's exactly, so
    `round_activations(x) @ dequantize(w).T` in float64 is what they compute up to the sum of groups in float32.
    """
    groups = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    rounded: Tensor = (groups * _inverse(scales)).round().double() * scales.double()
    return rounded.flatten(-2)[..., : x.shape[-1]]
