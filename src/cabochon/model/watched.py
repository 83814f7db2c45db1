"""Modules that tell when something in them is replaced: prepared calls hold addresses of what was there.

To look whether all of it is still in place would take as long as everything else that the interpreter does in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import Tensor, nn


class Watched(nn.Module):
    """A module whose parts and weights are put in place by assignment. Only `weight.data = ...` goes unnoticed."""

    changes: ClassVar[int] = 0
    """How many assignments there were to any module of this kind."""

    def __setattr__(self, name: str, value: Any) -> None:
        Watched.changes += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        Watched.changes += 1
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        Watched.changes += 1  # another type or device gives all weights other addresses
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's has no types
