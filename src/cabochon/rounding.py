"""Rounding a matrix for the inputs that it will meet, instead of every number to its nearest code.

Columns are rounded one after the other. What a column loses is passed on to those that are still to come, as far as
their inputs go together (E. Frantar and others, GPTQ, 2022); a group of int4 gets its scale when its turn comes, from
numbers that carry the errors of the groups before. What is aimed at are the products of the network that was not
rounded: the inputs that arrive differ from its inputs by the errors of earlier layers, and part of that can be made
good here (Y. Li and others, GPTAQ, 2025; here as least squares, in one step before the first column).

On disk and in the kernels the result is like any other weight of its format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import CheckpointError
from .quant import GROUP, QuantTensor, fitted_scales, from_levels, quantize

DAMPING = 0.05
"""What is added to every input's square, in parts of their mean: what the texts don't have may come all the same."""
NUMBERS_AT_ONCE = 1 << 23
"""Of a matrix that are rounded side by side, in float64."""


@dataclass(slots=True)
class Moments:
    """What a matrix of I inputs is told about them: sums over tokens."""

    own: Tensor
    """[I, I] float64, of x x^T for the inputs x that arrive in the rounded network."""
    missing: Tensor
    """[I, I] float64, of (exact - x) x^T, where `exact` arrives in the network that is not rounded."""
    tokens: int = 0

    @classmethod
    def none(cls, width: int) -> Moments:
        return cls(*torch.zeros(2, width, width, dtype=torch.float64))

    def add(self, x: Tensor, exact: Tensor) -> None:
        """`x`, `exact` [T, I]: the same tokens in both networks."""
        x = x.float()
        self.own += x.T @ x
        self.missing += (exact.float() - x).T @ x
        self.tokens += x.shape[0]


def quantize_for(moments: Moments, weights: Sequence[Tensor], format: str) -> list[QuantTensor]:
    """`weights` [O, I], which share their inputs, in `format` (int8, int4), so that their products suffer least.

    From fewer tokens than inputs nothing can be learned about all of them: then as `quant.quantize` does it.

    Raises:
        CheckpointError: the inputs hold infinities or not-a-numbers.
    """
    inputs = moments.own.shape[0]
    if moments.tokens < inputs:
        return [quantize(weight, format) for weight in weights]
    spread = _spread(moments.own)
    rounded = []
    for weight in weights:
        parts = []
        for block in weight.split(max(1, NUMBERS_AT_ONCE // inputs)):
            rows = block.double()
            # Least squares for the exact products. From the left, for the matrices with most inputs have fewer rows.
            rows += rows @ moments.missing @ spread.T @ spread
            parts.append(_round_rows(rows, spread, format))
        levels, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        rounded.append(from_levels(levels, scales, format, weight.dtype))
    return rounded


def _spread(own: Tensor) -> Tensor:
    """U [I, I], upper triangular, with U^T U the inverse of the damped `own`.

    Row j of U over its diagonal number says what the columns after j must take over of column j's error.
    """
    mean = own.diagonal().mean()
    if not mean.isfinite():
        raise CheckpointError("From the texts for calibration the network computes infinities, or what is no number.")
    # own = R R^T with R upper triangular is Cholesky's factor from the other end; the inverse is then R^-T R^-1.
    damped = own + torch.eye(own.shape[0], dtype=own.dtype) * (DAMPING * mean if mean else 1.0)
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    spread: Tensor = torch.linalg.solve_triangular(upper, torch.eye(own.shape[0], dtype=own.dtype), upper=True)
    return spread


def _round_rows(rows: Tensor, spread: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Levels [O, I] and scales of `rows` [O, I] float64.

    Inside a block of columns errors are passed on at once, to the columns behind it by one product when it is done.
    """
    columns = rows.T.contiguous()  # [I, O]: a column's numbers lie together
    inputs = columns.shape[0]
    low, high = (-127, 127) if format == "int8" else (-8, 7)
    scales = [(columns.abs().amax(0) / 127).float()] if format == "int8" else []
    for first in range(0, inputs, GROUP):
        block, ways = columns[first : first + GROUP], spread[first : first + GROUP]
        if format == "int4":
            filled = torch.zeros(rows.shape[0], GROUP)
            filled[:, : block.shape[0]] = block.T
            scales.append(fitted_scales(filled))
        scale = scales[-1].double()
        inverse = (1 / scale).masked_fill_(scale == 0, 0.0)
        errors = torch.empty_like(block)
        for j, column in enumerate(block):
            level = (column * inverse).round_().clamp_(low, high)
            errors[j] = (column - level * scale) / ways[j, first + j]
            block[j + 1 :] -= ways[j, first + j + 1 : first + block.shape[0], None] * errors[j]
            column.copy_(level)
        columns[first + GROUP :] -= ways[:, first + GROUP :].T @ errors
    return columns.T.to(torch.int8), scales[0] if format == "int8" else torch.stack(scales, -1)
