"""Attention over 8-bit pages as the CPU kernels define it where they multiply bytes, in float64.

Keys before the last whole 64 of the past are met by a query that is rounded to 8 bits, with one scale for every four
numbers in 64 and each part of the key. Weights, times the values' scales, are rounded to 8 bits in blocks of 64 keys.
What weights are divided by is not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.ops import reference
from cabochon.ops.views import ScaledPages, View

BLOCK = 64


def attend(
    q: Tensor,
    step: Tensor,
    view: View,
    *,
    key_offset: int,
    value_offset: int,
    window: int | None,
    widened_to: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.attend` with those roundings: [Q, N, H] in float64. Newer codes are `widened_to` a type first."""
    pages, past, rows = view.pages, view.past, view.rows
    if not isinstance(pages, ScaledPages) or past is None:
        return reference.attend(q, step, view, key_offset=key_offset, value_offset=value_offset, window=window)
    out = []
    head, cut = q.shape[-1], min(max(pages.split - key_offset, 0), q.shape[-1])
    for r, context in enumerate(view.context.tolist()):
        mine = slice(int(rows.start[r]), int(rows.start[r + 1]))
        first = int(past.first[r])
        page = past.table[r, : -(-(context - first) // pages.shape[1])].long()
        coded = max(context // BLOCK * BLOCK - first, 0)
        stored = pages.read(page, torch.float64).flatten(0, 1)[:coded]
        widened = pages.read(page, widened_to).flatten(0, 1)[coded : context - first]
        newest = step[int(view.start[r]) : int(view.start[r + 1])]
        kv = torch.cat([stored, widened.double(), newest.double()])
        scale = pages.scales[page].flatten(0, 1)[:coded, :, int(value_offset >= pages.split)].double()

        grouped = q[mine].unflatten(1, (kv.shape[1], -1))  # [Q, K, G, H]
        key, value = kv[..., key_offset : key_offset + head], kv[..., value_offset : value_offset + head]
        score = torch.einsum("qkgh,lkh->qkgl", grouped.double(), key)
        score[..., :coded] = torch.einsum("qkgh,lkh->qkgl", round_query(grouped, cut), key[:coded])
        at = torch.arange(first, first + len(kv))
        position, reach = rows.position[mine, None], (rows.see_until if window else rows.position)[mine, None]
        seen = (at <= reach) & (at > position - (window or context + len(kv)))
        weight = (score.masked_fill(~seen[:, None, None], -torch.inf)).softmax(-1)
        if coded:
            weight[..., :coded] = (
                round_weights(weight[..., :coded] * scale.T[:, None], first % BLOCK) / scale.T[:, None]
            )
        out.append(torch.einsum("qkgl,lkh->qkgh", weight, value).flatten(1, 2))
    return torch.cat(out)


def round_query(q: Tensor, cut: int) -> Tensor:
    """`q` [..., H] rounded, the parts before and after `cut` each on their own, as float64."""
    parts = []
    for part in (q[..., :cut].float(), q[..., cut:].float()):
        if part.shape[-1] == 0:
            continue
        lanes = part.unflatten(-1, (-1, 16, 4))
        top = lanes.abs().amax((-3, -1), keepdim=True).clamp_min(1e-30)
        parts.append(((lanes * (127 / top)).round().double() * (top / 127)).flatten(-3))
    return torch.cat(parts, -1)


def round_weights(weight: Tensor, skip: int) -> Tensor:
    """`weight` [..., L] rounded in blocks, the first of which lacks `skip` keys."""
    length = weight.shape[-1]
    blocks = torch.nn.functional.pad(weight, (skip, -(length + skip) % BLOCK)).unflatten(-1, (-1, BLOCK))
    unit = (blocks.amax(-1, keepdim=True) / 255).clamp_min(1e-300)
    return ((blocks / unit).round() * unit).flatten(-2)[..., skip : skip + length]
