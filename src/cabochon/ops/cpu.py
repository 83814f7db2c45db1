"""The ops through the C++ kernels of `csrc/`, for float32 and bfloat16; what they don't take goes to `reference`.

A row's result is the same bits whatever rows stand beside it and whatever the number of threads is, which torch's own
matrix products don't promise. Integer weights are multiplied in integers: activations are rounded to 8 bits in groups
of 32 (`quant.round_activations`), so the reference differs by that rounding.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import InputError
from ..quant import PANEL, QuantTensor
from . import reference, reference_drawing
from .reference import Weight
from .views import Pages, ScaledPages, View

try:
    from . import _cpu as _cpu  # the towers' ops call it too
except ImportError:  # installed without a compiler; `cabochon doctor` says what that costs
    _cpu = None  # type: ignore[assignment]  # installed without a compiler

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
FORMATS = {"int8": 1, "int4": 2}
"""Quantised formats that there are kernels for, as they call them."""
_on = _cpu is not None
HUGE_PAGE = 2 << 20


def supported() -> list[str]:
    """Names of the instruction sets that the kernels can use on this CPU, best first; empty without kernels."""
    return _cpu.supported() if _cpu is not None else []


def active() -> str:
    """Name of the instruction set in use, or "reference"."""
    return _cpu.active() if _on else "reference"


def use(name: str) -> None:
    """Use the kernels of instruction set `name`, or "reference" for none.

    Raises:
        InputError: this CPU, or this installation, has no such kernels.
    """
    global _on
    if name not in (*supported(), "reference"):
        raise InputError(f"no CPU kernels {name!r} here; there are {', '.join([*supported(), 'reference'])}")
    _on = name != "reference"
    if _on:
        _cpu.use(name)


tiles_refused = ""
"""Why the AMX tiles of this CPU are left alone; empty where nothing keeps them from use, or there are none."""
if _cpu is not None and os.environ.get("CABOCHON_ISA", "amx") == "amx":
    tiles_refused = _cpu.admit_tiles()
if "CABOCHON_ISA" in os.environ:
    use(os.environ["CABOCHON_ISA"])


class _Caller(threading.local):
    alone = False


_caller = _Caller()


@contextmanager
def alone(like: Tensor) -> Iterator[None]:
    """What torch does meanwhile it does in one thread, where there are kernels for numbers like those of `like`.

    It wakes a team for 32,768 numbers and more, which then stays awake for some milliseconds and holds up ours.
    """
    if _caller.alone or not ready(like):
        yield
        return
    _caller.alone, before = True, _cpu.set_team(1)
    try:
        yield
    finally:
        _caller.alone = False
        _cpu.set_team(before)


def on() -> bool:
    """Are the kernels in use? Tells them the number of threads on the way."""
    if _on and not _caller.alone and _cpu.threads() != torch.get_num_threads():
        _cpu.set_threads(torch.get_num_threads())
    return _on


def knows(x: Tensor) -> bool:
    """Are there kernels for numbers like those of `x`?"""
    return x.dtype in DTYPES and x.is_cpu and on()


def ready(x: Tensor) -> bool:
    """Are there kernels for `x` (numbers in a type they know, or ids)? Where gradients are recorded there are none."""
    return not torch.is_grad_enabled() and (knows(x) or (x.dtype == torch.long and x.is_cpu and on()))


def as_matrix(weight: Weight, dtype: torch.dtype) -> _cpu.Matrix | None:
    """What the kernels want to know of `weight` [.., O, I] for activations of `dtype`; None when it is nothing for
    them."""
    rows, cols = weight.shape[-2:]
    if isinstance(weight, QuantTensor):
        if weight.layout != "panels":
            return None
        return FORMATS[weight.format], 0, weight.codes.data_ptr(), weight.scales.data_ptr(), rows, cols
    if weight.dtype != dtype or not weight.is_contiguous():
        return None
    return 0, DTYPES[weight.dtype], weight.data_ptr(), 0, rows, cols


def as_rows(x: Tensor) -> Tensor:
    """`x` [.., I] as rows [M, I] whose numbers lie together."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def linear(x: Tensor, weight: Weight, wide: bool = False) -> Tensor:
    matrix = as_matrix(weight, x.dtype)
    if matrix is None:
        return reference.linear(x, weight, wide)
    return _product(x, matrix, torch.float32 if wide else x.dtype, 0.0)


def _product(x: Tensor, matrix: _cpu.Matrix, kind: torch.dtype, softcap: float) -> Tensor:
    rows = as_rows(x)
    y = torch.empty(*x.shape[:-1], matrix[4], dtype=kind)
    address = y.data_ptr()
    _cpu.linear(rows.data_ptr(), DTYPES[x.dtype], rows.shape[0], rows.stride(0), matrix, address, DTYPES[kind], softcap)
    return y


def head(x: Tensor, weight: Weight, softcap: float | None) -> Tensor:
    matrix = as_matrix(weight, x.dtype)
    if matrix is None:
        return reference.head(x, weight, softcap)
    return _product(x, matrix, torch.float32, softcap or 0.0)


def head_at(x: Tensor, weight: Weight, ids: Tensor) -> Tensor:
    matrix = as_matrix(weight, x.dtype)
    if matrix is None or isinstance(weight, QuantTensor):
        return reference.head_at(x, weight, ids)
    rows, ids = as_rows(x), ids.contiguous()
    y = torch.empty(ids.shape, dtype=torch.float32)
    count, some = ids.shape
    _cpu.head_at(rows.data_ptr(), DTYPES[x.dtype], count, some, rows.stride(0), matrix, ids.data_ptr(), y.data_ptr())
    return y


def gated_mlp(x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    first, second, third = (as_matrix(weight, x.dtype) for weight in (gate, up, down))
    if first is None or second is None or third is None or first[0] != second[0]:
        return reference.gated_mlp(x, gate, up, down)
    rows, dtype = as_rows(x), DTYPES[x.dtype]
    y = torch.empty(*x.shape[:-1], third[4], dtype=torch.float32)
    _cpu.gated(rows.data_ptr(), dtype, rows.shape[0], rows.stride(0), first, second, third, y.data_ptr())
    return y


def route(
    x: Tensor, proj: Weight, scale: Tensor, per_expert_scale: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    normed = (rms_norm(x, None, eps) * scale * x.shape[-1] ** -0.5).to(proj.dtype)
    return reference.choose(head(normed, proj, None), per_expert_scale, top_k)


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    first, second = as_matrix(gate_up, x.dtype), as_matrix(down, x.dtype)
    # The rows of `up` begin where those of `gate` end: in a panel of their own, or the kernels can't address them.
    apart = not isinstance(gate_up, QuantTensor) or down.shape[-1] % PANEL == 0
    if first is None or second is None or weights.dtype != x.dtype or not apart:
        return reference.experts(x, chosen, weights, gate_up, down)
    x, chosen, weights = as_rows(x), chosen.contiguous(), weights.contiguous()
    y = torch.empty_like(x, dtype=torch.float32)
    _cpu.experts(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        x.stride(0),
        chosen.data_ptr(),
        weights.data_ptr(),
        chosen.shape[1],
        gate_up.shape[0],
        first,
        second,
        *_steps(gate_up),
        *_steps(down),
        y.data_ptr(),
    )
    return y


def _steps(stacked: Weight) -> tuple[int, int]:
    """Bytes from one expert's codes to the next one's, and the same of the scales."""
    if isinstance(stacked, QuantTensor):
        return (stacked.codes.nbytes // stacked.shape[0], stacked.scales.nbytes // stacked.shape[0])
    return stacked.nbytes // stacked.shape[0], 0


def embed(ids: Tensor, table: Weight, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """Torch would gather more than a few rows on a team of its own, whose threads then stay awake for some milliseconds
    and hold up ours."""
    matrix, kind = as_table(table), dtype or table.dtype
    if matrix is None or kind not in DTYPES:
        return reference.embed(ids, table, scale, dtype)
    ids = ids.contiguous()
    y = torch.empty(*ids.shape, table.shape[1], dtype=kind)
    panels = isinstance(table, QuantTensor) and table.layout == "panels"
    factor = reference.rounded(scale, table.dtype)
    _cpu.lookup(ids.data_ptr(), ids.numel(), matrix, panels, factor, y.data_ptr(), DTYPES[kind])
    return y


def as_table(table: Weight) -> _cpu.Matrix | None:
    """What the kernels want to know of `table` [V, D] to look rows up in it; None when it is nothing for them."""
    rows, width = table.shape
    if table.dtype not in DTYPES:
        return None
    if isinstance(table, QuantTensor):
        if table.format not in FORMATS:
            return None
        return FORMATS[table.format], 0, table.codes.data_ptr(), table.scales.data_ptr(), rows, width
    if not (table.is_cpu and table.is_contiguous()):
        return None
    return 0, DTYPES[table.dtype], table.data_ptr(), 0, rows, width


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    kind = x.dtype if weight is None else weight.dtype
    if kind not in _narrower(x.dtype):
        return reference.rms_norm(x, weight, eps)
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=kind)
    _cpu.norm(
        rows.data_ptr(),
        DTYPES[x.dtype],
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        0 if weight is None else weight.data_ptr(),
        eps,
        y.data_ptr(),
        DTYPES[kind],
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
    if weight.dtype not in _narrower(x.dtype) or (onto is not None and onto.dtype != x.dtype):
        return reference.settle(x, weight, eps, bound=bound, onto=onto, share=share)
    rows, onto = as_rows(x), None if onto is None else onto.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _cpu.settle(
        rows.data_ptr(),
        DTYPES[x.dtype],
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        weight.data_ptr(),
        DTYPES[weight.dtype],
        0 if onto is None else onto.data_ptr(),
        eps,
        bound,
        share,
        y.data_ptr(),
    )
    return y


def _narrower(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """`dtype`, and what the kernels make of a residual stream in it."""
    return (torch.float32, torch.bfloat16) if dtype == torch.float32 else (dtype,)


gate = reference.gate


def per_layer_inputs(x: Tensor, token: Tensor, weight: Tensor, eps: float, scale: float) -> Tensor:
    """In one call: from some thousand numbers on torch shares out sums, with what `cos_sin` says of its threads."""
    if x.dtype != torch.float32 or token.dtype != weight.dtype or token.dtype not in DTYPES:
        return reference.per_layer_inputs(x, token, weight, eps, scale)
    x, token = x.contiguous(), token.contiguous()
    y, width = torch.empty_like(token), x.shape[-1]
    _cpu.per_layer(
        x.data_ptr(),
        x.numel() // width,
        width,
        token.data_ptr(),
        weight.data_ptr(),
        eps,
        scale,
        y.data_ptr(),
        DTYPES[y.dtype],
    )
    return y


def cos_sin(position: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Torch would wake a team of its own for any number of angles, whose threads stay awake for some milliseconds and
    hold up ours."""
    position, count, width = position.int().contiguous(), position.shape[0], frequency.shape[0]
    cos, sin = torch.empty(count, width), torch.empty(count, width)
    _cpu.cos_sin(position.data_ptr(), count, frequency.data_ptr(), width, cos.data_ptr(), sin.data_ptr())
    return cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    kind = dtype or x.dtype
    if not x.dtype == cos.dtype == torch.float32 or kind not in DTYPES or x.dim() != 3:
        return reference.rope(x, cos, sin, dtype)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x, dtype=kind)
    tokens, heads, head = x.shape
    _cpu.rope(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), DTYPES[kind], tokens, heads, head, cos.shape[-1]
    )
    return y


def store(pages: Pages, rows: Tensor, slots: Tensor) -> None:
    codes, scales, split = stored(pages)
    if codes.dtype != (rows.dtype if scales is None else torch.int8) or rows.shape[0] == 0:
        return reference.store(pages, rows, slots)
    rows, slots = rows.contiguous(), slots.contiguous()
    addresses = (codes.data_ptr(), 0 if scales is None else scales.data_ptr(), rows.data_ptr(), slots.data_ptr())
    tokens, kv_heads, width = rows.shape
    _cpu.store(*addresses, DTYPES[rows.dtype], tokens, kv_heads, width, split)
    return None


def stored(pages: Pages) -> tuple[Tensor, Tensor | None, int]:
    """Codes, their scales, and where the second scale begins; numbers have no scales."""
    return (pages.codes, pages.scales, pages.split) if isinstance(pages, ScaledPages) else (pages, None, 0)


def attend(
    q: Tensor,
    step: Tensor,
    view: View,
    *,
    key_offset: int,
    value_offset: int,
    window: int | None,
) -> Tensor:
    source = None if step.dtype != q.dtype else looked_in(step := step.contiguous(), view)
    if source is None:
        return reference.attend(q, step, view, key_offset=key_offset, value_offset=value_offset, window=window)
    q = q.contiguous()
    out = torch.empty_like(q)
    shape = (step.shape[1], step.shape[2], key_offset, value_offset, window or 0)
    _cpu.attend(q.data_ptr(), asking(view), source, shape, out.data_ptr(), DTYPES[q.dtype], q.shape[1], q.shape[2])
    return out


def asking(view: View) -> _cpu.Asking:
    """Who asks, and where the past of each request lies, as the kernels want to know it."""
    rows, past = view.rows, view.past
    asked = (rows.start.data_ptr(), rows.position.data_ptr(), rows.see_until.data_ptr())
    step, requests = (view.start.data_ptr(), view.context.data_ptr()), view.context.shape[0]
    if past is None:
        return 0, 0, 0, *asked, *step, requests
    assert past.table.is_contiguous()
    return past.table.data_ptr(), past.table.shape[1], past.first.data_ptr(), *asked, *step, requests


def looked_in(step: Tensor, view: View) -> _cpu.Source | None:
    """Where the rows `step` [T, K, W] and the pages of `view` lie; None when they are nothing for the kernels."""
    if view.past is None or view.pages is None:
        return step.data_ptr(), 0, 0, 0, 0
    codes, scales, split = stored(view.pages)
    if codes.dtype != (step.dtype if scales is None else torch.int8):
        return None
    return step.data_ptr(), codes.data_ptr(), 0 if scales is None else scales.data_ptr(), codes.shape[1], split


def prepare_layers(layers: list[_cpu.Part]) -> _cpu.Layers:
    """Decoder layers whose weights were looked up, see `model.fused` and `csrc/ops.h`."""
    return _cpu.Layers(layers)


def unchanged(links: list[_cpu.Link]) -> bool:
    """Are modules and weights still where they were found?"""
    return _cpu.unchanged(links)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32 or x.numel() == 0:
        return reference.largest(x, k)
    x, k = as_rows(x), min(k, x.shape[1])
    values, places = torch.empty(x.shape[0], k), torch.empty(x.shape[0], k, dtype=torch.long)
    _cpu.largest(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), k, values.data_ptr(), places.data_ptr())
    return values, places


def draw(logits: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    if logits.dtype != torch.float32 or logits.numel() == 0:
        return reference_drawing.draw(logits, settings)
    x, settings = as_rows(logits), settings.contiguous()
    count, width = x.shape
    tokens, best = torch.empty(count, dtype=torch.long), torch.empty(count)
    _cpu.draw(x.data_ptr(), count, width, x.stride(0), settings.data_ptr(), tokens.data_ptr(), best.data_ptr())
    return tokens, best


def log_sum(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.numel() == 0:
        return reference_drawing.log_sum(x)
    x = as_rows(x)
    y = torch.empty(x.shape[0])
    _cpu.log_sum(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), y.data_ptr())
    return y


def quantize(weight: Tensor, format: str, panels: bool, codes: Tensor, scales: Tensor) -> None:
    """`weight` [O, I], whose rows lie together, into `codes` and `scales`; see `ops.packing`."""
    rows, width = weight.shape
    _cpu.quantize(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        rows,
        width,
        weight.stride(0),
        FORMATS[format],
        panels,
        codes.data_ptr(),
        scales.data_ptr(),
    )


def pack(
    codes: Tensor, scales: Tensor, shape: tuple[int, ...], format: str, to_codes: Tensor, to_scales: Tensor
) -> None:
    """Rows of a matrix of `shape` into panels; see `ops.packing`."""
    rows, width = shape
    _cpu.pack(
        codes.data_ptr(), scales.data_ptr(), rows, width, FORMATS[format], to_codes.data_ptr(), to_scales.data_ptr()
    )


def read(memory: Tensor) -> int:
    """Read every cache line of `memory` once, on all threads: nothing that reads it all can be faster."""
    return _cpu.read(memory.data_ptr(), memory.nbytes)


def prefer_huge_pages(memory: Tensor) -> None:
    """Ask for 2 MiB pages under `memory`, which nobody has written yet; without kernels nothing happens."""
    if _on and memory.nbytes >= HUGE_PAGE:
        _cpu.huge_pages(memory.data_ptr(), memory.nbytes)


def give_back() -> None:
    """Hand freed memory back to the system; without kernels nothing happens."""
    if _on:
        _cpu.give_back()
