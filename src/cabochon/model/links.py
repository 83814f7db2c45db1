"""What lies below a module, so that a prepared call can tell whether its addresses still hold (`cpu.unchanged`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..quant import QuantTensor


def links(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any, int]]:
    """(holder, key, value, address) of every module and weight below `module`. A tensor may get other numbers."""
    for holder in (module._parameters, module._buffers, module.__dict__):
        for key, value in holder.items():
            if isinstance(value, Tensor):
                yield holder, key, value, value.data_ptr()
            elif isinstance(value, QuantTensor):
                yield holder, key, value, 0
    for key, child in module._modules.items():
        if child is not None:
            yield module._modules, key, child, 0
            yield from links(child)
