"""Every op in plain torch: differentiable, in any dtype, on any device. This is the definition; fast twins are tested
against it. Norms, router and soft-cap are computed in float32 at least (float64 stays float64).

Shapes use the letters of `ops.views`: T tokens, Q query rows, N query heads, K KV heads, H head width, W row width.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import QuantTensor, dequantize
from .views import Pages, Past, Rows, ScaledPages, View

Weight = Tensor | QuantTensor


def linear(x: Tensor, weight: Weight, wide: bool = False) -> Tensor:
    """`x` [..., I] times the rows of `weight` [O, I] -> [..., O], in x's type, or if `wide` in float32 at least.

    Then the fast twins hand over their sums as they are, while torch has rounded them to x's type on the way.
    """
    if isinstance(weight, QuantTensor):
        weight = dequantize(weight, x.dtype)
    y = F.linear(x, weight)
    return y.to(widened(y.dtype)) if wide else y


def widened(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 if that is wider: the type of the residual stream, and of what is on its way to it."""
    return torch.promote_types(dtype, torch.float32)


def embed(ids: Tensor, table: Weight, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of `table` [V, D] for `ids` [T], times `scale` rounded to its type as transformers does -> [T, D].

    The products are in the type of the table, or in a wider `dtype`.
    """
    kind = dtype or table.dtype
    rows = dequantize(table.rows(ids), kind) if isinstance(table, QuantTensor) else F.embedding(ids, table).to(kind)
    return rows * rounded(scale, table.dtype)


@cache
def rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as `dtype` has it, found on the host: a step that is being recorded can't make tensors from numbers."""
    return float(torch.tensor(value, dtype=dtype))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis; the weight is plain (not 1 + w) and may be absent.

    The result has the weight's type: a wider residual stream becomes what a matrix takes.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) if weight is None else (y * weight.to(wide.dtype)).to(weight.dtype)


def settle(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bound: float = torch.inf,
    onto: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    """`onto + share * rms_norm(x cut to +-bound) * weight` over the last axis of `x` [..., W], typed like `x`."""
    y = rms_norm(x.clamp(-bound, bound), weight.to(x.dtype), eps) * share
    return y if onto is None else onto + y


def per_layer_inputs(x: Tensor, token: Tensor, weight: Tensor, eps: float, scale: float) -> Tensor:
    """`(rms_norm(x * scale) + token) / sqrt(2)`, what the layers get of a token's own embeddings: [T, layers, P].

    `x` may be wider than the other two, whose type the result has.
    """
    return ((settle(x * scale, weight, eps) + token) * 2**-0.5).to(token.dtype)


def cos_sin(position: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Of `position` [T] times `frequency` [A], an angle in float32: how many thousand turns it has made counts."""
    angle = position.float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Turn the rotated dimensions of `x` [T, N, H] by `cos`, `sin` [T, rotated / 2]; in `dtype`, or as x is.

    Dimension i turns with i + H / 2 for i < rotated / 2; the others stay (proportional RoPE, fact sheet 2b).
    """
    quarter, half = cos.shape[-1], x.shape[-1] // 2
    cos, sin, kind = cos[:, None], sin[:, None], dtype or x.dtype
    a, b = x[..., :quarter], x[..., half : half + quarter]
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    if quarter == half:
        return torch.cat([turned_a, turned_b], -1).to(kind)
    return torch.cat([turned_a, x[..., quarter:half], turned_b, x[..., half + quarter :]], -1).to(kind)


def gate(x: Tensor, y: Tensor) -> Tensor:
    """`gelu_tanh(x) * y` of one shape, in the type of `y`; `x` may be wider."""
    return (F.gelu(x, approximate="tanh") * y).to(y.dtype)


def gated_mlp(x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    """`down(gelu_tanh(gate(x)) * up(x))`: [T, D] -> [T, D]; gate and up are [F, D], down, which is wide, [D, F]."""
    return linear(F.gelu(linear(x, gate), approximate="tanh") * linear(x, up), down, wide=True)


def route(
    x: Tensor, proj: Weight, scale: Tensor, per_expert_scale: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of each token and their weights: [T, D] -> two of [T, top_k], int64 and like the scales.

    Softmax over all experts in float32, the chosen ones renormalised to sum 1, then times the expert's own scale.
    """
    normed = (rms_norm(x, None, eps) * scale * x.shape[-1] ** -0.5).to(proj.dtype)
    return choose(head(normed, proj, None), per_expert_scale, top_k)


def choose(scores: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The second half of `route`: `scores` [T, E] -> chosen experts and weights [T, top_k]."""
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights, chosen = probs.topk(top_k, -1)
    weights = weights / weights.sum(-1, keepdim=True) * per_expert_scale[chosen]
    return chosen, weights.to(per_expert_scale.dtype)


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """Each token's experts, weighted and summed [T, D]; gate_up [E, 2F, D] (gate rows first), down [E, D, F].

    Typed as a wide `linear`.
    """
    out = torch.zeros_like(x, dtype=widened(x.dtype))
    for expert in chosen.unique().tolist():
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = linear(x[token], gate_up[expert]).chunk(2, -1)
        y = linear(F.gelu(gate, approximate="tanh") * up, down[expert], wide=True)
        out = out.index_add(0, token, y * weights[token, slot, None])
    return out


def store(pages: Pages, rows: Tensor, slots: Tensor) -> None:
    """Write `rows` [T, K, W] into `pages` [pages, S, K, W] at `slots` [T] (page * S + slot; -1: not), in place."""
    kept = slots >= 0
    if isinstance(pages, ScaledPages):
        pages.write(rows[kept], slots[kept])
    else:
        pages.view(-1, *pages.shape[2:])[slots[kept]] = rows[kept].to(pages.dtype)


def attend(
    q: Tensor,
    step: Tensor,
    view: View,
    *,
    key_offset: int,
    value_offset: int,
    window: int | None,
) -> Tensor:
    """Attention of `q` [Q, N, H] over this step's `step` [T, K, W] and the past in `view.pages` [pages, S, K, W].

    Returns [Q, N, H]. Request r's query rows are `rows.start[r] ..`, its tokens of the step `start[r] ..` at positions
    `context[r] ..`, its past the tokens before that. Row i sees position j iff `j <= i`, on sliding layers iff
    `i - window < j <= see_until[i]`. Scores are not scaled (q and k norms absorb it). Key and value of a token are the
    slices of width H at `key_offset` and `value_offset` of its row.
    """
    rows, start, context, pages, past = view.rows, view.start, view.context, view.pages, view.past
    head = q.shape[-1]
    if past is None and rows.see_until is rows.position:
        key, value = step[..., key_offset : key_offset + head], step[..., value_offset : value_offset + head]
        return _attend_together(q, key, value, rows, start, window)
    out = []
    bounds, first_rows, begin = start.tolist(), rows.start.tolist(), context.tolist()
    for r in range(len(begin)):
        mine = slice(first_rows[r], first_rows[r + 1])
        if mine.start == mine.stop:
            continue
        kv, origin = step[bounds[r] : bounds[r + 1]], begin[r]
        if past is not None and pages is not None:
            origin = int(past.first[r])
            kv = torch.cat([_read_past(pages, past, r, begin[r], kv.dtype), kv])
        reach = rows.see_until[mine] if window is not None else rows.position[mine]
        key, value = kv[..., key_offset : key_offset + head], kv[..., value_offset : value_offset + head]
        out.append(_attend_one(q[mine], key, value, rows.position[mine], reach, origin, window))
    return torch.cat(out) if out else torch.empty_like(q)


def _attend_together(q: Tensor, key: Tensor, value: Tensor, rows: Rows, start: Tensor, window: int | None) -> Tensor:
    """Whole sequences without two-way spans, as in training: padded to the longest and attended in one call."""
    longest = rows.longest if rows.index is None else int(start.diff().max())
    place = _places(rows.start, rows.longest, q.shape[0])
    key_place = place if rows.index is None else _places(start, longest, key.shape[0])
    requests, heads = start.shape[0] - 1, q.shape[1]

    def spread(x: Tensor, at: Tensor | None, length: int) -> Tensor:
        if at is not None:
            x = x.new_zeros(requests * length, *x.shape[1:]).index_copy(0, at, x)
        x = x.unflatten(0, (requests, length)).transpose(1, 2)  # [R, N or K, length, H]
        # Repeated heads: with enable_gqa the CPU has no fused backward.
        return x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)

    # Padding comes last, so no row sees it.
    seen = None
    if rows.index is not None or (window is not None and window < longest):
        position = rows.position
        if place is not None:
            position = position.new_zeros(requests * rows.longest).index_copy(0, place, position)
        position = position.view(requests, 1, rows.longest, 1)
        at = torch.arange(longest, device=q.device)
        seen = at <= position
        if window is not None:
            seen &= at > position - window
    out = F.scaled_dot_product_attention(
        spread(q, place, rows.longest),
        spread(key, key_place, longest),
        spread(value, key_place, longest),
        attn_mask=seen,
        is_causal=seen is None,
        scale=1.0,
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if place is None else out[place]


def _places(start: Tensor, longest: int, count: int) -> Tensor | None:
    """Where each of `count` packed rows lies once every request is padded to `longest`; None: they lie there now."""
    requests = start.shape[0] - 1
    if count == requests * longest:
        return None
    row = torch.arange(count, device=start.device)
    request = torch.arange(requests, device=start.device).repeat_interleave(start.diff(), output_size=count)
    return request * longest + row - start[request]


def _read_past(pages: Pages, past: Past, r: int, until: int, dtype: torch.dtype) -> Tensor:
    """The stored rows of request r from position `past.first[r]` up to `until` -> [n, K, W]."""
    count = until - int(past.first[r])
    page = past.table[r, : -(-count // pages.shape[1])].long()
    rows = pages.read(page, dtype) if isinstance(pages, ScaledPages) else pages[page].to(dtype)
    return rows.flatten(0, 1)[:count]


def _attend_one(
    q: Tensor, key: Tensor, value: Tensor, position: Tensor, reach: Tensor, origin: int, window: int | None
) -> Tensor:
    """One request: `q` [Q, N, H] over `key`, `value` [L, K, H] at positions origin, origin + 1, ... -> [Q, N, H].

    Query rows go in tiles so that a sliding layer touches only the keys that a tile can see.
    """
    tile = max(window or 0, 256)
    out = []
    for top in range(0, q.shape[0], tile):
        rows = slice(top, top + tile)
        low = 0 if window is None else max(0, int(position[rows].min()) - window + 1 - origin)
        high = int(reach[rows].max()) + 1 - origin
        at = torch.arange(origin + low, origin + high, device=q.device)
        seen = at[None, :] <= reach[rows, None]
        if window is not None:
            seen &= at[None, :] > position[rows, None] - window
        out.append(
            F.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None],
                key[low:high].transpose(0, 1)[None],
                value[low:high].transpose(0, 1)[None],
                attn_mask=seen,
                scale=1.0,
                enable_gqa=True,
            )[0].transpose(0, 1)
        )
    return torch.cat(out)


def head(x: Tensor, weight: Weight, softcap: float | None) -> Tensor:
    """Logits of `x` [L, D] over `weight` [V, D], soft-capped as `c * tanh(logits / c)`: [L, V], float32 at least."""
    logits = linear(x, weight, wide=True)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def head_at(x: Tensor, weight: Weight, ids: Tensor) -> Tensor:
    """Logits of each row of `x` [L, D] over its rows `ids` [L, C] of `weight` [V, D]: [L, C], typed as in `head`."""
    flat = ids.flatten()
    rows = dequantize(weight.rows(flat), x.dtype) if isinstance(weight, QuantTensor) else weight[flat]
    logits: Tensor = (rows.unflatten(0, ids.shape) @ x[..., None]).squeeze(-1)
    return logits if logits.dtype == torch.float64 else logits.float()


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` >= 1 largest numbers of each row of `x` [R, V], descending, and their places: two of [R, min(k, V)].

    Of equal numbers the earlier goes first; NaN goes before all. A long row is not sorted: the best k lie in those k of
    its blocks whose largest numbers are the best, and these are found the same way.
    """
    if k == 1:
        return x.max(-1, keepdim=True)
    rows, width = x.shape
    size = min(64, 1 << (width // (4 * k)).bit_length() >> 1)
    if size < 4 or width % size:
        values, places = x.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], places[:, :k]
    blocks = x.reshape(rows, -1, size)
    best = largest(blocks.amax(-1), k)[1].sort(-1).values  # [R, k]
    inside = blocks.gather(1, best[..., None].expand(-1, -1, size)).flatten(1)  # [R, k * size]
    values, at = largest(inside, k)
    return values, best.gather(1, at // size) * size + at % size
