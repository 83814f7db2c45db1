"""Attention over pages and over the step's own rows: one Triton kernel for prefill, chunked prefill, decode and
verification, for every head width, page type and row layout of `kv.layout`.

Unusual here: key and value are slices of one stored row, so the layers whose value is the key need no kernel of their
own. A tile of queries packs neighbouring tokens and all query heads of a group, so that a decode step of 8 heads reads
each key once. Decode cuts the keys into chunks of fixed absolute length whose partial results a second kernel joins:
a row's sums are taken in the same order whatever else is in the batch, and launch sizes never depend on device values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import attend_tile, generation
from .views import Past, ScaledPages, View

CHUNK = 512
"""Keys in a chunk of a decode step."""
DECODE_ROWS = 16
"""Most rows per request for which keys are cut into chunks; longer steps have enough tiles without."""


@triton.jit
def _fold(q, key, value, seen, top, total, acc):
    """Take a tile of keys into the running softmax: q [M, H], key [H, B], value [B, V], seen [M, B]."""
    scores = tl.where(seen, tl.dot(q, key, input_precision="ieee"), float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet stay free of nan
    p = tl.exp(scores - base[:, None])
    shrink = tl.exp(top - base)
    acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _read(
    pages, scales, row, column, inside, W: tl.constexpr, SPLIT: tl.constexpr, FLOAT8: tl.constexpr, dtype: tl.constexpr
):
    """Elements `column` of stored rows `row`; SPLIT > 0 means 8-bit rows with a scale on each side of it."""
    x = tl.load(pages + row * W + column, mask=inside)
    if SPLIT > 0:
        first = tl.load(scales + row * 2, mask=inside, other=0.0)
        second = tl.load(scales + row * 2 + 1, mask=inside, other=0.0)
        if FLOAT8:
            # float8_e4m3fn is float16 with a shorter exponent: its bits, shifted, are 1/256 of its value. So GPUs whose
            # compiler has no such type read it too.
            bits = x.to(tl.int16)
            x = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        x = tl.where(inside, x.to(tl.float32), 0.0) * tl.where(column < SPLIT, first, second)
        return x.to(dtype)
    return tl.where(inside, x, 0.0).to(dtype)


@triton.jit
def _attend(
    q_ptr,
    step_ptr,
    pages_ptr,
    scales_ptr,
    table_ptr,
    first_ptr,
    row_start_ptr,
    position_ptr,
    reach_ptr,
    start_ptr,
    context_ptr,
    out_ptr,
    acc_ptr,
    softmax_ptr,
    chunks_ptr,
    tiles,
    table_width,
    queries,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    S: tl.constexpr,
    WINDOW: tl.constexpr,
    PAST: tl.constexpr,
    SPLIT: tl.constexpr,
    FLOAT8: tl.constexpr,
    CHUNK: tl.constexpr,
    BQ: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """One tile of BQ query tokens x G heads of one request and KV head, BV columns of the value, one chunk of keys."""
    r, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv, part = tl.program_id(1) // (H // BV), tl.program_id(1) % (H // BV)
    chunk = tl.program_id(2)
    row = tl.load(row_start_ptr + r) + tile * BQ
    row_end = tl.load(row_start_ptr + r + 1)
    if row >= row_end:
        return

    m = tl.arange(0, BQ * BG)
    t, g = row + m // BG, m % BG
    live = (t < row_end) & (g < G)
    position = tl.load(position_ptr + t, mask=t < row_end, other=-1)
    reach = tl.load(reach_ptr + t, mask=t < row_end, other=-1)
    line = t.to(tl.int64) * (K * G) + kv * G + g  # of q and out, [Q * N, H]
    h = tl.arange(0, H)
    v = part * BV + tl.arange(0, BV)
    q = tl.load(q_ptr + line[:, None] * H + h[None, :], mask=live[:, None], other=0.0)

    context = tl.load(context_ptr + r)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(tl.load(position_ptr + row) - WINDOW + 1, 0)
    high = tl.max(reach) + 1
    if CHUNK > 0:
        base = low // CHUNK * CHUNK
        if chunk == 0:
            tl.store(chunks_ptr + t, (high - base + CHUNK - 1) // CHUNK, mask=(t < row_end) & (g == 0))
        low = tl.maximum(low, base + chunk * CHUNK)
        high = tl.minimum(high, base + (chunk + 1) * CHUNK)
        if low >= high:
            return

    top = tl.full((BQ * BG,), float("-inf"), tl.float32)
    total = tl.zeros((BQ * BG,), tl.float32)
    acc = tl.zeros((BQ * BG, BV), tl.float32)
    if PAST:
        first = tl.load(first_ptr + r)
        begin, end = tl.maximum(low, first), tl.minimum(high, context)
        for at in range(begin // BN * BN, end, BN):
            j = at + tl.arange(0, BN)
            inside = (j >= begin) & (j < end)
            slot = tl.maximum(j - first, 0)
            page = tl.load(table_ptr + r * table_width + slot // S, mask=inside, other=0)
            stored = (page.to(tl.int64) * S + slot % S) * K + kv
            key = _read(
                pages_ptr,
                scales_ptr,
                stored[None, :],
                KEY + h[:, None],
                inside[None, :],
                W,
                SPLIT,
                FLOAT8,
                q_ptr.dtype.element_ty,
            )
            value = _read(
                pages_ptr,
                scales_ptr,
                stored[:, None],
                VALUE + v[None, :],
                inside[:, None],
                W,
                SPLIT,
                FLOAT8,
                q_ptr.dtype.element_ty,
            )
            seen = inside[None, :] & (j[None, :] <= reach[:, None])
            if WINDOW > 0:
                seen &= j[None, :] > position[:, None] - WINDOW
            top, total, acc = _fold(q, key, value, seen, top, total, acc)

    first_token = tl.load(start_ptr + r)
    begin, end = tl.maximum(low, context), tl.minimum(high, context + tl.load(start_ptr + r + 1) - first_token)
    for at in range(begin // BN * BN, end, BN):
        j = at + tl.arange(0, BN)
        inside = (j >= begin) & (j < end)
        token = tl.maximum(first_token + j - context, 0).to(tl.int64) * K + kv
        key = tl.load(step_ptr + token[None, :] * W + KEY + h[:, None], mask=inside[None, :], other=0.0)
        value = tl.load(step_ptr + token[:, None] * W + VALUE + v[None, :], mask=inside[:, None], other=0.0)
        seen = inside[None, :] & (j[None, :] <= reach[:, None])
        if WINDOW > 0:
            seen &= j[None, :] > position[:, None] - WINDOW
        top, total, acc = _fold(q, key, value, seen, top, total, acc)

    if CHUNK > 0:
        line += chunk.to(tl.int64) * queries * (K * G)
        tl.store(acc_ptr + line[:, None] * H + v[None, :], acc, mask=live[:, None])
        if part == 0:
            tl.store(softmax_ptr + line * 2, top, mask=live)
            tl.store(softmax_ptr + line * 2 + 1, total, mask=live)
    else:
        out = acc / tl.maximum(total, 1e-30)[:, None]
        tl.store(out_ptr + line[:, None] * H + v[None, :], out.to(out_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def _join(acc_ptr, softmax_ptr, chunks_ptr, out_ptr, lines, N: tl.constexpr, H: tl.constexpr, BN: tl.constexpr):
    """Join the chunks of one query row, BN heads at a time, in the order of the keys."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    line = row * N + n
    h = tl.arange(0, H)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    acc = tl.zeros((BN, H), tl.float32)
    for chunk in range(tl.load(chunks_ptr + row)):
        at = line + chunk * lines
        chunk_top = tl.load(softmax_ptr + at * 2, mask=n < N, other=float("-inf"))
        new_top = tl.maximum(top, chunk_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        old, new = tl.exp(top - base), tl.exp(chunk_top - base)
        part = tl.load(acc_ptr + at[:, None] * H + h[None, :], mask=(n < N)[:, None], other=0.0)
        acc = acc * old[:, None] + part * new[:, None]
        total = total * old + tl.load(softmax_ptr + at * 2 + 1, mask=n < N, other=0.0) * new
        top = new_top
    out = acc / tl.maximum(total, 1e-30)[:, None]
    tl.store(out_ptr + line[:, None] * H + h[None, :], out.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None])


def attend(
    q: Tensor,
    step: Tensor,
    view: View,
    *,
    key_offset: int,
    value_offset: int,
    window: int | None,
) -> Tensor:
    """`reference.attend` for float32, bfloat16 and float16; H a power of two."""
    rows, start, context, pages, past = view.rows, view.start, view.context, view.pages, view.past
    queries, heads, head = q.shape
    kv_heads, width = step.shape[1:]
    group = heads // kv_heads
    out = torch.empty_like(q)
    if not queries:
        return out
    stored = pages.codes if isinstance(pages, ScaledPages) else pages
    float8 = stored is not None and stored.dtype == torch.float8_e4m3fn
    decode = rows.longest <= DECODE_ROWS
    tile = attend_tile(generation(q.device), head, decode)
    packed = triton.next_power_of_2(group)
    tokens = max(min(triton.next_power_of_2(rows.longest) * packed, tile.rows), 16) // packed
    chunks = _chunks(step, past, window) if decode else 1
    acc = q.new_empty((chunks, queries, heads, head) if decode else 0, dtype=torch.float32)
    softmax = q.new_empty((chunks, queries, heads, 2) if decode else 0, dtype=torch.float32)
    counts = q.new_empty(queries if decode else 0, dtype=torch.int32)
    tiles = triton.cdiv(rows.longest, tokens)
    columns = min(tile.columns, head)
    _attend[(context.shape[0] * tiles, kv_heads * (head // columns), chunks)](
        q.contiguous(),
        step.contiguous(),
        step if stored is None else stored.view(torch.uint8) if float8 else stored,  # step: nothing is read there
        pages.scales if isinstance(pages, ScaledPages) else acc,
        past.table if past is not None else start,
        past.first if past is not None else start,
        rows.start,
        rows.position,
        rows.see_until if window is not None else rows.position,
        start,
        context,
        out,
        acc,
        softmax,
        counts,
        tiles,
        past.table.shape[1] if past is not None else 0,
        queries,
        K=kv_heads,
        G=group,
        H=head,
        W=width,
        KEY=key_offset,
        VALUE=value_offset,
        S=stored.shape[1] if stored is not None else 1,
        WINDOW=window or 0,
        PAST=past is not None and stored is not None,
        SPLIT=pages.split if isinstance(pages, ScaledPages) else 0,
        FLOAT8=float8,
        CHUNK=CHUNK if decode else 0,
        BQ=tokens,
        BG=packed,
        BN=max(16, tile.keys * 2 // q.element_size()),
        BV=columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if decode:
        together = max(1, min(triton.next_power_of_2(heads), 2048 // head))
        _join[(queries, triton.cdiv(heads, together))](
            acc, softmax, counts, out, queries * heads, N=heads, H=head, BN=together, num_warps=4
        )
    return out


def _chunks(step: Tensor, past: Past | None, window: int | None) -> int:
    """Most chunks that the keys of one row can touch; known on the host, so that a launch can be recorded."""
    keys = (past.longest if past is not None else 0) + step.shape[0]
    if window is None:
        return triton.cdiv(keys, CHUNK)
    keys = min(keys, window + step.shape[0])
    return triton.cdiv(keys + CHUNK - 1, CHUNK)  # a window may begin at the last key of a chunk
