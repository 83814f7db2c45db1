"""Routed experts in Triton, for one token as for thousands, without asking the device how many chose whom.

The pairs (token, chosen expert) are laid out in blocks of rows that share an expert; a block that nobody needs ends at
once, so the launch has the size of the worst case and can be recorded in a graph. Each pair writes its own row and the
rows of a token are summed in the order of its choices: no atomics, the same sums every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_matmul import Weight, _dot, _gelu, parts, sizes
from .triton_tiles import experts_tile, generation

LONE = 16
"""Up to so many pairs each has a block for itself; sorting them would take longer than reading an expert twice."""


@triton.jit
def _route(
    scores_ptr, gain_ptr, chosen_ptr, weight_ptr, E: tl.constexpr, TOP: tl.constexpr, B: tl.constexpr, BT: tl.constexpr
):
    """Softmax over a token's scores, the best TOP of them, their sum made 1, each times its expert's own scale."""
    t = tl.program_id(0).to(tl.int64)
    e, place = tl.arange(0, B), tl.arange(0, BT)
    score = tl.load(scores_ptr + t * E + e, mask=e < E, other=float("-inf")).to(tl.float32)
    rest = tl.exp(score - tl.max(score, 0))  # the sum of all cancels out
    rest = tl.where(e < E, rest, -1.0)
    chosen = tl.zeros((BT,), tl.int32)
    weight = tl.zeros((BT,), tl.float32)
    for k in tl.static_range(TOP):
        best = tl.argmax(rest, 0)
        chosen = tl.where(place == k, best, chosen)
        weight = tl.where(place == k, tl.max(rest, 0), weight)
        rest = tl.where(e == best, -1.0, rest)
    gain = tl.load(gain_ptr + chosen, mask=place < TOP, other=0.0).to(tl.float32)
    weight = weight / tl.sum(weight, 0) * gain
    tl.store(chosen_ptr + t * TOP + place, chosen.to(tl.int64), mask=place < TOP)
    tl.store(weight_ptr + t * TOP + place, weight.to(weight_ptr.dtype.element_ty), mask=place < TOP)


@triton.jit
def _rows(pair_ptr, LONE: tl.constexpr, BR: tl.constexpr):
    """The pairs of a block, -1 where it has none; LONE: block n holds pair n alone."""
    r = tl.arange(0, BR)
    if LONE:
        return tl.where(r == 0, tl.program_id(1), -1).to(tl.int64)
    return tl.load(pair_ptr + tl.program_id(1) * BR + r).to(tl.int64)


@triton.jit
def _inner(
    x_ptr,
    w_ptr,
    scale_ptr,
    y_ptr,
    pair_ptr,
    expert_ptr,
    CHOICES: tl.constexpr,
    COUNT: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    FORMAT: tl.constexpr,
    LONE: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """hidden[pair] = gelu_tanh(gate x) * up x of the pair's expert; w is [E, 2 O, I], gate rows first."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert >= COUNT:
        return
    pair = _rows(pair_ptr, LONE, BR)
    live = pair >= 0
    token = tl.where(live, pair // CHOICES, 0)
    o = (tl.program_id(0) * BO + tl.arange(0, BO)).to(tl.int64)
    kind = y_ptr.dtype.element_ty
    row = expert * (2 * O) + o
    gate = _dot(x_ptr, token, live, w_ptr, scale_ptr, row, o < O, I, FORMAT, BI).to(kind).to(tl.float32)
    up = _dot(x_ptr, token, live, w_ptr, scale_ptr, row + O, o < O, I, FORMAT, BI).to(kind).to(tl.float32)
    y = _gelu(gate).to(kind).to(tl.float32) * up
    tl.store(y_ptr + pair[:, None] * O + o[None, :], y.to(kind), mask=live[:, None] & (o < O)[None, :])


@triton.jit
def _outer(
    x_ptr,
    w_ptr,
    scale_ptr,
    y_ptr,
    weight_ptr,
    pair_ptr,
    expert_ptr,
    COUNT: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    FORMAT: tl.constexpr,
    LONE: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """y[pair] = weight[pair] * down hidden[pair], float32; w is [E, O, I]."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert >= COUNT:
        return
    pair = _rows(pair_ptr, LONE, BR)
    live = pair >= 0
    o = (tl.program_id(0) * BO + tl.arange(0, BO)).to(tl.int64)
    row = expert * O + o
    y = _dot(x_ptr, tl.where(live, pair, 0), live, w_ptr, scale_ptr, row, o < O, I, FORMAT, BI)
    y *= tl.load(weight_ptr + pair, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + pair[:, None] * O + o[None, :], y, mask=live[:, None] & (o < O)[None, :])


def route(scores: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """What follows the projection in `reference.route`: scores [T, E] -> chosen [T, top_k] int64 and their weights."""
    tokens, count = scores.shape
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=scores.device)
    weights = scores.new_empty(tokens, top_k)
    if tokens:
        _route[(tokens,)](
            scores.contiguous(), per_expert_scale, chosen, weights, E=count, TOP=top_k,
            B=triton.next_power_of_2(count), BT=triton.next_power_of_2(top_k), num_warps=1,
        )  # fmt: skip
    return chosen, weights


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """`reference.experts` for float32, bfloat16 and float16."""
    (tokens, choices), count = chosen.shape, gate_up.shape[0]
    inner, width = gate_up.shape[1] // 2, x.shape[1]
    pairs = tokens * choices
    if not pairs:
        return torch.zeros_like(x, dtype=torch.float32)
    tile = experts_tile(generation(x.device), pairs, count)
    lone = pairs <= LONE
    flat = chosen.flatten()
    pair, expert = (flat, flat) if lone else _sorted(flat, count, tile.rows)
    hidden = x.new_empty(pairs, inner)
    out = x.new_empty(pairs, width, dtype=torch.float32)
    codes, scales, format = parts(gate_up)
    _inner[(triton.cdiv(inner, tile.outputs), expert.shape[0])](
        x.contiguous(), codes, scales, hidden, pair, expert,
        CHOICES=choices, COUNT=count, I=width, O=inner, FORMAT=format, LONE=lone, **sizes(tile),
    )  # fmt: skip
    codes, scales, format = parts(down)
    _outer[(triton.cdiv(width, tile.outputs), expert.shape[0])](
        hidden, codes, scales, out, weights.contiguous(), pair, expert,
        COUNT=count, I=inner, O=width, FORMAT=format, LONE=lone, **sizes(tile),
    )  # fmt: skip
    return out.unflatten(0, (tokens, choices)).sum(1)


def _sorted(chosen: Tensor, count: int, rows: int) -> tuple[Tensor, Tensor]:
    """Blocks of `rows` pairs of one expert: (pair of each row or -1, expert of each block or `count`)."""
    pairs = chosen.shape[0]
    order = chosen.argsort(stable=True)
    sizes = torch.zeros(count, dtype=torch.int64, device=chosen.device).scatter_add_(0, chosen, torch.ones_like(chosen))
    filled = (sizes + rows - 1) // rows * rows
    ends = filled.cumsum(0)
    blocks = pairs // rows + min(pairs, count)
    expert = torch.searchsorted(ends, torch.arange(blocks, device=chosen.device) * rows, right=True)
    # A pair keeps its distance from the first of its expert; only that first one moves.
    mine = chosen[order]
    shift = (ends - filled) - (sizes.cumsum(0) - sizes)
    pair = torch.full((blocks * rows,), -1, dtype=torch.int64, device=chosen.device)
    return pair.scatter_(0, torch.arange(pairs, device=chosen.device) + shift[mine], order), expert
