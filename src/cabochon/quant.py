"""Quantised weights: codes and scales as one value that `ops` understands in place of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A weight of logical `shape` in one of the formats of `formats.py`."""

    codes: Tensor
    scales: Tensor
    format: str
    shape: tuple[int, ...]

    def rows(self, index: Tensor) -> QuantTensor:
        """The rows `index` [T] of a two-dimensional weight."""
        raise NotImplementedError

    def __getitem__(self, expert: int) -> QuantTensor:
        """One expert's matrix of a three-dimensional weight."""
        raise NotImplementedError


def dequantize(weight: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as an ordinary tensor of `weight.shape`."""
    raise NotImplementedError
