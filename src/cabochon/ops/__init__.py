"""One function per op; the arguments and results are documented once, in `ops.reference` and its neighbours.

Each call goes to the fastest implementation at hand for the tensor's device: `ops.cpu` (C++), `ops.gpu` (Triton, for
CUDA and ROCm), else the reference. Gradients are wanted only in training, which always takes the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import ParamSpec, TypeVar, cast

from torch import Tensor

from . import cpu, gpu, reference, reference_drawing
from .reference import Weight, widened
from .reference_towers import Clip, Halving
from .towers import attend_all, attend_recent, blend, clipped_gate, clipped_linear, subsample, turn
from .views import Pages, Past, Rows, ScaledPages, View

__all__ = [
    "Clip",
    "Halving",
    "Pages",
    "Past",
    "Rows",
    "ScaledPages",
    "View",
    "Weight",
    "attend",
    "attend_all",
    "attend_recent",
    "blend",
    "clipped_gate",
    "clipped_linear",
    "cos_sin",
    "draw",
    "embed",
    "experts",
    "gate",
    "gated_mlp",
    "head",
    "head_at",
    "largest",
    "linear",
    "log_sum",
    "per_layer_inputs",
    "reference",
    "rms_norm",
    "rope",
    "route",
    "settle",
    "store",
    "subsample",
    "turn",
    "widened",
]

P = ParamSpec("P")
R = TypeVar("R")


def _twin(x: Tensor) -> ModuleType | None:
    """The module whose functions take `x`; None: the reference."""
    if cpu.ready(x):
        return cpu
    return gpu if gpu.ready(x) else None


def _by(argument: int, op: Callable[P, R]) -> Callable[P, R]:
    """`op` of the module that takes its `argument`."""
    name = op.__name__

    @wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        twin = _twin(args[argument])  # type: ignore[arg-type]  # a tensor
        return op(*args, **kwargs) if twin is None else cast(R, getattr(twin, name)(*args, **kwargs))

    return call


linear = _by(0, reference.linear)
embed = _by(0, reference.embed)
rms_norm = _by(0, reference.rms_norm)
settle = _by(0, reference.settle)
per_layer_inputs = _by(0, reference.per_layer_inputs)
cos_sin = _by(1, reference.cos_sin)
rope = _by(0, reference.rope)
gate = _by(0, reference.gate)
gated_mlp = _by(0, reference.gated_mlp)
route = _by(0, reference.route)
experts = _by(0, reference.experts)
store = _by(1, reference.store)
attend = _by(0, reference.attend)
head = _by(0, reference.head)
head_at = _by(0, reference.head_at)
largest = _by(0, reference.largest)
draw = _by(0, reference_drawing.draw)
log_sum = _by(0, reference_drawing.log_sum)
