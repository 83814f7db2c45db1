"""Attention in which every token sees every token, as in the vision tower: one op with its choice of implementation.

On a CPU the kernel of `csrc/attend_all.h` packs a head's keys once for all its queries; torch's fused attention, which
everything else takes, does it anew for every tile and is slow with heads of 72.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, reference


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference.attend_all`. On a CPU a picture's result is the same bits whatever lies beside it."""
    if not cpu.ready(q):
        return reference.attend_all(q, k, v)
    from . import _cpu

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    wide = q.dtype == torch.bfloat16
    _cpu.attend_all(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), int(wide), *q.shape)
    return out
