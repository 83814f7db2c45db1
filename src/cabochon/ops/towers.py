"""What only the towers need, each op with its choice of implementation: kernels of `csrc/` on a CPU, else
`reference_towers`, where arguments and results are documented.

The products are for bfloat16: several hundred rows at once, activations and ranges applied while a sum is still in its
register. In float32, and on a CPU with matrix tiles (AMX), torch multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu
from . import reference_towers as reference
from .cpu import DTYPES, _cpu
from .reference import Weight
from .reference_towers import Clip, Gate

Limits = tuple[float, float]

_MOST_RECENT = 16  # scores that the kernel of `attend_recent` keeps in one register
_ENDLESS = (-torch.inf, torch.inf)
_PLAIN, _SILU = 0, 1
_GATES = {"gelu": 2, "sigmoid": 3}


def _multiplies(x: Tensor, *weights: Weight) -> bool:
    """Is our product the one to take?"""
    return (
        x.dtype == torch.bfloat16
        and cpu.ready(x)
        and not _cpu.matrix_tiles()
        and all(isinstance(w, Tensor) and w.dtype == x.dtype and w.is_contiguous() for w in weights)
    )


def _limits(clip: Clip | None, dtype: torch.dtype) -> tuple[Limits, Limits]:
    """Ranges in and out, rounded as `torch.clamp` rounds them."""
    if clip is None:
        return _ENDLESS, _ENDLESS
    low_in, high_in, low_out, high_out = torch.stack(clip).to(dtype).tolist()
    return (low_in, high_in), (low_out, high_out)


def clipped_linear(x: Tensor, weight: Weight, clip: Clip | None, *, silu: bool = False) -> Tensor:
    if not _multiplies(x, weight):
        return reference.clipped_linear(x, weight, clip, silu=silu)
    limits = _limits(clip, x.dtype)
    return _product(x, weight, weight, *limits, _ENDLESS, _SILU if silu else _PLAIN)


def clipped_gate(
    x: Tensor, first: Weight, second: Weight, clips: tuple[Clip | None, Clip | None], gate: Gate
) -> Tensor:
    if _multiplies(x, first, second):
        (taken, given), (also_taken, also_given) = (_limits(clip, x.dtype) for clip in clips)
        if taken == also_taken:  # else x would have to be packed twice
            return _product(x, first, second, taken, given, also_given, _GATES[gate])
    return reference.clipped_gate(x, first, second, clips, gate)


def _product(
    x: Tensor, first: Weight, second: Weight, taken: Limits, given: Limits, also_given: Limits, how: int
) -> Tensor:
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    rows = cpu.as_rows(x)
    y = x.new_empty(*x.shape[:-1], len(first))
    _cpu.product(
        rows.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        first.data_ptr(),
        second.data_ptr(),
        len(first),
        taken,
        given,
        also_given,
        how,
        y.data_ptr(),
    )
    return y


def settle(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bound: float = torch.inf,
    onto: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    if not cpu.ready(x) or weight.dtype != x.dtype or (onto is not None and onto.dtype != x.dtype):
        return reference.settle(x, weight, eps, bound=bound, onto=onto, share=share)
    rows, onto = cpu.as_rows(x), None if onto is None else onto.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    _cpu.settle(
        rows.data_ptr(),
        DTYPES[x.dtype],
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        weight.data_ptr(),
        0 if onto is None else onto.data_ptr(),
        eps,
        bound,
        share,
        y.data_ptr(),
    )
    return y


def turn(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    if not cpu.ready(x) or weight.dtype != x.dtype or cos.dtype != x.dtype:
        return reference.turn(x, weight, eps, cos, sin)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    pictures, patches, heads, head = x.shape
    _cpu.turn(
        x.data_ptr(),
        weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        DTYPES[x.dtype],
        eps,
        pictures * patches,
        patches,
        heads,
        head,
    )
    return y


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not cpu.ready(q):
        return reference.attend_all(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    _cpu.attend_all(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), DTYPES[q.dtype], *q.shape)
    return out


def attend_recent(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, scale: Tensor, key_scale: float, cap: float
) -> Tensor:
    if not cpu.ready(q) or len(relative) > _MOST_RECENT or relative.dtype != q.dtype:
        return reference.attend_recent(q, k, v, relative, scale, key_scale, cap)
    q, k, v, relative, scale = (x.contiguous() for x in (q, k, v, relative, scale.float()))
    out = torch.empty_like(q)
    _cpu.recent(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        relative.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        DTYPES[q.dtype],
        key_scale,
        cap,
        q.shape[0],
        q.shape[1],
        q.shape[2],
        len(relative),
    )
    return out


def blend(x: Tensor, taps: Tensor, weight: Tensor, eps: float, bound: float) -> Tensor:
    if not cpu.ready(x) or not x.dtype == taps.dtype == weight.dtype:
        return reference.blend(x, taps, weight, eps, bound)
    rows, taps = cpu.as_rows(x), taps.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    _cpu.blend(
        rows.data_ptr(),
        DTYPES[x.dtype],
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        taps.data_ptr(),
        weight.data_ptr(),
        len(taps),
        eps,
        bound,
        y.data_ptr(),
    )
    return y


def halve(x: Tensor, kernel: Tensor, weight: Tensor, eps: float) -> Tensor:
    outputs, inputs = kernel.shape[:2]
    ours = inputs == 1 and outputs % 16 == 0 and x.dtype == kernel.dtype == weight.dtype
    if not (ours and cpu.ready(x)):
        return reference.halve(x, kernel, weight, eps)
    x, kernel = x.contiguous(), kernel.contiguous()
    rows, width = x.shape[2:]
    y = x.new_empty(1, -(-rows // 2), -(-width // 2), outputs)
    _cpu.halve(
        x.data_ptr(),
        kernel.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        DTYPES[x.dtype],
        eps,
        rows,
        width,
        outputs,
    )
    return y.permute(0, 3, 1, 2)
