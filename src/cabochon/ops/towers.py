"""What only the towers need, each op with its choice of implementation: kernels of `csrc/` on a CPU, else
`reference_towers`, where arguments and results are documented.

The products are for bfloat16: several hundred rows at once, activations and ranges applied while a sum is still in its
register. In float32, and on a CPU with matrix tiles (AMX), torch multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu
from . import reference_towers as reference
from .cpu import DTYPES, _cpu
from .reference import Weight
from .reference_towers import Clip, Gate, Halving

_MOST_RECENT = 16  # scores that the kernel of `attend_recent` keeps in one register
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


def _ends(clip: Clip | None) -> tuple[int, ...]:
    """Where the kernel finds the ranges: to read them here would take longer than some products."""
    return () if clip is None else tuple(number for end in clip for number in (DTYPES[end.dtype], end.data_ptr()))


def clipped_linear(
    x: Tensor, weight: Weight, clip: Clip | None, *, silu: bool = False, onto: Tensor | None = None
) -> Tensor:
    y = None
    if _multiplies(x, weight):
        y = _product(x, weight, weight, (clip, clip), _SILU if silu else _PLAIN, onto)
    return reference.clipped_linear(x, weight, clip, silu=silu, onto=onto) if y is None else y


def clipped_gate(
    x: Tensor, first: Weight, second: Weight, clips: tuple[Clip | None, Clip | None], gate: Gate
) -> Tensor:
    y = None
    if _multiplies(x, first, second):
        y = _product(x, first, second, clips, _GATES[gate])
    return reference.clipped_gate(x, first, second, clips, gate) if y is None else y


def _product(
    x: Tensor,
    first: Weight,
    second: Weight,
    clips: tuple[Clip | None, Clip | None],
    how: int,
    onto: Tensor | None = None,
) -> Tensor | None:
    """None where two matrices cut `x` to different ranges: it would have to be copied twice."""
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    rows, added = cpu.as_rows(x), None if onto is None else cpu.as_rows(onto)
    y = x.new_empty(*x.shape[:-1], len(first))
    assert added is None or (added.dtype == y.dtype and added.shape == (rows.shape[0], len(first)))
    done = _cpu.product(
        rows.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        first.data_ptr(),
        second.data_ptr(),
        len(first),
        _ends(clips[0]),
        _ends(clips[1]),
        how,
        0 if added is None else added.data_ptr(),
        0 if added is None else added.stride(0),
        y.data_ptr(),
    )
    return y if done else None


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


def conformer(
    layer: _cpu.Conformer, x: Tensor, distance: Tensor, scale: Tensor, bound: float, after: _cpu.Conformer | None
) -> Tensor:
    """A prepared `layer` in one call: `x` [A, W], `distance` [R, W] and the queries' `scale` [H] in float32 -> [A, W].

    Meanwhile the first weights of `after` are fetched.
    """
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    layer.run(x.data_ptr(), len(x), distance.data_ptr(), len(distance), scale.data_ptr(), bound, y.data_ptr(), after)
    return y


def takes_conformer(x: Tensor, distance: Tensor) -> bool:
    """Is there a kernel for a whole layer of a conformer?"""
    if not _multiplies(x, distance) or len(distance) > _MOST_RECENT:
        return False
    return len(x) > 0 and x.shape[1] % 2 == 0  # a word holds two numbers


def prepare_conformer(
    numbers: tuple[int, float, float, float, float],
    norms: Sequence[Tensor],
    taps: Tensor,
    matrices: Sequence[tuple[Weight, Clip | None]],
) -> _cpu.Conformer | None:
    """Arguments as `PreparedConformer` in `csrc/module.cpp` has them, `taps` [W, count].

    None where a weight is nothing for the kernel.
    """
    vectors, heads, *floats = [*norms, taps], *numbers
    if not all(vector.dtype == torch.bfloat16 and vector.is_contiguous() for vector in vectors):
        return None
    found = []
    for weight, clip in matrices:
        if not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
            return None
        found.append((weight.data_ptr(), *weight.shape, _ends(clip)))
    addresses = tuple(vector.data_ptr() for vector in vectors)
    return _cpu.Conformer((heads, taps.shape[1], *floats), addresses, tuple(found))


def subsample(mel: Tensor, first: Halving, second: Halving, eps: float) -> Tensor:
    channels, outputs = (len(half.kernel) for half in (first, second))
    alike = all(x.dtype == torch.bfloat16 for x in (mel, *first, *second))
    if not (alike and channels % 16 == 0 == outputs % 16 and cpu.ready(mel)):
        return reference.subsample(mel, first, second, eps)
    rows, taps = cpu.as_rows(mel), first.kernel.contiguous()
    second_taps = second.kernel.permute(0, 2, 3, 1).contiguous()
    y = mel.new_empty(-(-rows.shape[0] // 4), -(-rows.shape[1] // 4), outputs)
    _cpu.subsample(
        rows.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        taps.data_ptr(),
        first.norm.data_ptr(),
        second_taps.data_ptr(),
        second.norm.data_ptr(),
        channels,
        outputs,
        eps,
        y.data_ptr(),
    )
    return y
