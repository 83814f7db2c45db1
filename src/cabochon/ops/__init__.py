"""One function per op; the arguments and results are documented once, in `ops.reference`.

Each call goes to the fastest implementation at hand for the tensor's device: `ops.cpu` (C++), `ops.triton_*` (CUDA and
ROCm), else `ops.reference`. Gradients are wanted only in training, which always takes the reference.
"""

from __future__ import annotations

from . import reference
from .reference import Weight, attend, attend_all, embed, experts, gated_mlp, head, linear, rms_norm, rope, route, store
from .views import Pages, Past, Rows, ScaledPages

__all__ = [
    "Pages",
    "Past",
    "Rows",
    "ScaledPages",
    "Weight",
    "attend",
    "attend_all",
    "embed",
    "experts",
    "gated_mlp",
    "head",
    "linear",
    "reference",
    "rms_norm",
    "rope",
    "route",
    "store",
]
