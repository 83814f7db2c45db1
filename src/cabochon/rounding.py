"""Rounding a matrix for the inputs that it will meet, instead of every number to its nearest code.

Columns are rounded one after the other. What a column loses is passed on to those that are still to come, as far as
their inputs go together (E. Frantar and others, GPTQ, 2022), those with the largest inputs first; a group of int4 gets
its scale when its turn comes, from numbers that carry the errors of the groups before. In the end every number goes
once more, and again, to where the products lose least.

What is aimed at are the products of the network that was not rounded: the inputs that arrive differ from its inputs by
the errors of earlier layers, and part of that can be made good here (Y. Li and others, GPTAQ, 2025; here as least
squares, in one step before the first column).

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
AGAIN = 2
"""How often all levels are looked at once more, when the last one has got its first."""
NUMBERS_AT_ONCE = 1 << 23
"""Of a matrix that are rounded side by side, in float64."""
_LEVELS = {"int8": (-127, 127), "int4": (-8, 7)}


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

    def sort(self, order: Tensor) -> None:
        """Inputs in another order, without a second table of both."""
        self.own = self.own[order[:, None], order]
        self.missing = self.missing[order[:, None], order]


def quantize_for(moments: Moments, weights: Sequence[Tensor], format: str) -> list[QuantTensor]:
    """`weights` [O, I], which share their inputs, in `format` (int8, int4), so that their products suffer least.

    From fewer tokens than inputs nothing can be learned about all of them: then as `quant.quantize` does it. The
    `moments` are used up.

    Raises:
        CheckpointError: the inputs hold infinities or not-a-numbers.
    """
    inputs = moments.own.shape[0]
    if moments.tokens < inputs:
        return [quantize(weight, format) for weight in weights]
    order = _order(moments.own.diagonal())
    moments.sort(order)
    _damp(moments.own)
    spread = _spread(moments.own)
    rounded = []
    for weight in weights:
        parts = []
        for block in weight.split(max(1, NUMBERS_AT_ONCE // inputs)):
            rows = block.double()[:, order]
            # Least squares for the exact products. From the left, for the matrices with most inputs have fewer rows.
            rows += rows @ moments.missing @ spread.T @ spread
            columns = rows.T.contiguous()  # a column's numbers lie together
            levels, scales = _round_columns(columns, spread, format)
            for _ in range(AGAIN):
                _round_again(columns, moments.own, levels, scales, format)
            parts.append((levels.T.to(torch.int8), scales.T))
        levels, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        back = order.argsort()
        scales = scales[:, 0].float() if format == "int8" else scales[:, back[::GROUP] // GROUP].half()
        rounded.append(from_levels(levels[:, back], scales, format, weight.dtype))
    return rounded


def _order(squares: Tensor) -> Tensor:
    """The inputs [I] by falling `squares`, group by group: what is rounded early has many others to make up for it.

    Neighbours that share a scale stay together; a last group that is not full stays last.
    """
    whole = squares.shape[0] // GROUP * GROUP
    groups = squares[:whole].unflatten(0, (-1, GROUP))
    inside = groups.argsort(-1, descending=True) + GROUP * torch.arange(len(groups))[:, None]
    rest = whole + squares[whole:].argsort(descending=True)
    return torch.cat([inside[groups.sum(-1).argsort(descending=True)].flatten(), rest])


def _damp(own: Tensor) -> None:
    squares = own.diagonal()
    mean = squares.mean()
    if not mean.isfinite():
        raise CheckpointError("From the texts for calibration the network computes infinities, or what is no number.")
    squares += DAMPING * mean if mean else 1.0


def _spread(own: Tensor) -> Tensor:
    """U [I, I], upper triangular, with U^T U the inverse of `own`.

    Row j of U over its diagonal number says what the columns after j must take over of column j's error.
    """
    # own = R R^T with R upper triangular is Cholesky's factor from the other end; the inverse is then R^-T R^-1.
    upper = torch.linalg.cholesky(own.flip(0, 1)).flip(0, 1)
    spread: Tensor = torch.linalg.solve_triangular(upper, torch.eye(own.shape[0], dtype=own.dtype), upper=True)
    return spread


def _round_columns(columns: Tensor, spread: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Levels [I, O] and scales [groups, O] of `columns` [I, O], all float64; int8's groups have the same ones.

    Inside a group errors are passed on at once, to the columns behind it by one product when it is done.
    """
    columns = columns.clone()
    scale, scales = columns.abs().amax(0).float() / 127, []
    for first in range(0, columns.shape[0], GROUP):
        block, ways = columns[first : first + GROUP], spread[first : first + GROUP]
        if format == "int4":
            filled = torch.zeros(block.shape[1], GROUP)
            filled[:, : block.shape[0]] = block.T
            scale = fitted_scales(filled)
        scales.append(scale.double())
        inverse = _inverse(scales[-1])
        errors = torch.empty_like(block)
        for j, column in enumerate(block):
            level = (column * inverse).round_().clamp_(*_LEVELS[format])
            errors[j] = (column - level * scales[-1]) / ways[j, first + j]
            block[j + 1 :] -= ways[j, first + j + 1 : first + block.shape[0], None] * errors[j]
            column.copy_(level)
        columns[first + GROUP :] -= ways[:, first + GROUP :].T @ errors
    return columns, torch.stack(scales)


def _round_again(columns: Tensor, own: Tensor, levels: Tensor, scales: Tensor, format: str) -> None:
    """Every level once more, as all others have come out; in place.

    Errors E [I, O] cost tr(E^T own E). Along one number that is a parabola, and `pull` half of its slope.
    """
    errors = columns - levels * scales.repeat_interleave(GROUP, 0)[: len(columns)]
    for first, scale in zip(range(0, len(columns), GROUP), scales, strict=True):
        part = slice(first, first + GROUP)
        near, pull, inverse = own[part, part], own[part] @ errors, _inverse(scale)
        for j, level in enumerate(levels[part]):
            better = ((level * scale + pull[j] / near[j, j]) * inverse).round_().clamp_(*_LEVELS[format])
            change = (level - better) * scale
            level.copy_(better)
            errors[first + j] += change
            pull += near[:, j, None] * change


def _inverse(scale: Tensor) -> Tensor:
    return (1 / scale).masked_fill_(scale == 0, 0.0)
