"""How a model's keys and values are stored: one group per attention kind, one row per token, layer and KV head.

A row holds key and value as two overlapping or adjacent slices of one vector, so that attention needs no case
distinction: `key = row[key_offset : key_offset + head_dim]`, `value = row[value_offset : value_offset + head_dim]`.

    two tensors          row = [ key | value ]                      2    head widths
    value = key (k_eq_v) row = [ n_rot | n_rest | k_rot ]           1.25 head widths (a quarter of the key turns)
                                 value = row[0:H]   key = row[H/4:5H/4]

where `n` is the normalised key projection without weight, `n_rot` its rotated dimensions and `k_rot = RoPE(w_k * n)`
on those. The weight of the dimensions that don't turn is folded into the query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..config import Kind, LayerSpec
from ..errors import InputError


@dataclass(frozen=True, slots=True)
class KVGroup:
    """The layers that store keys and values of one kind, in one page pool with one page table per request."""

    kind: Kind
    layers: tuple[int, ...]
    """Indices of the layers that own the stored rows, in order."""
    kv_heads: int
    head_dim: int
    row_width: int
    key_offset: int
    value_offset: int
    window: int | None

    def values_per_token(self) -> int:
        """Stored numbers per token, all layers of the group together."""
        return len(self.layers) * self.kv_heads * self.row_width


def row_geometry(spec: LayerSpec) -> tuple[int, int, int]:
    """(row_width, key_offset, value_offset) of one layer's stored row, in elements."""
    if spec.k_eq_v:
        return spec.head_dim + spec.rope.rotated, spec.rope.rotated, 0
    return 2 * spec.head_dim, 0, spec.head_dim


def kv_groups(layers: tuple[LayerSpec, ...]) -> dict[Kind, KVGroup]:
    """The groups of a model. Every owning layer of a kind must have the same geometry."""
    groups: dict[Kind, KVGroup] = {}
    kinds: tuple[Kind, ...] = ("sliding", "global")
    for kind in kinds:
        owners = [spec for spec in layers if spec.kind == kind and spec.owns_kv]
        if not owners:
            continue
        first = owners[0]
        width, key, value = row_geometry(first)
        assert all(row_geometry(spec) == (width, key, value) and spec.kv_heads == first.kv_heads for spec in owners)
        groups[kind] = KVGroup(
            kind, tuple(spec.index for spec in owners), first.kv_heads, first.head_dim, width, key, value, first.window
        )
    return groups


# Bytes --------------------------------------------------------------------------------------------------------------

CacheDtype = Literal["auto", "fp8", "int8"]
SCALES_PER_ROW = 2
"""8-bit rows carry one float32 scale for the first head width and one for the rest, per token, layer and head."""


@dataclass(frozen=True, slots=True)
class KVPlan:
    """How many pages each group gets, and what they weigh. The pool allocates exactly this."""

    groups: Mapping[Kind, KVGroup]
    page_size: int
    pages: Mapping[Kind, int]
    value_bytes: Mapping[Kind, int]
    """Bytes of one stored number: the model's type, or 1."""

    def page_bytes(self, kind: Kind) -> int:
        """Bytes of one page, all layers of the group together."""
        return self.page_size * token_bytes(self.groups[kind], self.value_bytes[kind])

    def bytes(self) -> int:
        return sum(self.page_bytes(kind) * count for kind, count in self.pages.items())


def token_bytes(group: KVGroup, value_bytes: int) -> int:
    """Bytes stored per token by all layers of a group; one-byte numbers come with their scales."""
    scales = 4 * SCALES_PER_ROW * len(group.layers) * group.kv_heads if value_bytes == 1 else 0
    return group.values_per_token() * value_bytes + scales


def request_pages(group: KVGroup, tokens: int, page_size: int) -> int:
    """Most pages that one request of up to `tokens` tokens holds at a time.

    The last w tokens of a window of w (one more than the next token sees) can begin anywhere in a page. Guesses are
    not counted: they are made where there is a page to spare.
    """
    whole = -(-tokens // page_size)
    if group.window is None:
        return whole
    return min(whole, (group.window + page_size - 1) // page_size + 1)


def bytes_read(layers: Sequence[LayerSpec], context: int, value_bytes: Mapping[Kind, int]) -> int:
    """Bytes that one decoded token reads from the pages at `context` tokens; KV-shared layers read as well."""
    total = 0
    for spec in layers:
        width, _, _ = row_geometry(spec)
        size = value_bytes[spec.kind]
        row = width * size + (4 * SCALES_PER_ROW if size == 1 else 0)
        total += spec.kv_heads * row * (context if spec.window is None else min(context, spec.window - 1))
    return total


def plan_pages(
    groups: Mapping[Kind, KVGroup],
    value_bytes: Mapping[Kind, int],
    *,
    page_size: int,
    max_tokens: int,
    requests: int,
    snapshots: int = 0,
    budget: int | None = None,
) -> KVPlan:
    """Pages for `requests` requests of `max_tokens` tokens each and `snapshots` kept windows, within `budget` bytes.

    Where the budget is short, the number of whole requests that fit decides: each gets its window and an equal share of
    global pages. One request of `max_tokens` must fit, else `InputError` says how much is missing.
    """
    one = {kind: request_pages(group, max_tokens, page_size) for kind, group in groups.items()}
    full = {kind: count * requests for kind, count in one.items()}
    full["sliding"] += one["sliding"] * snapshots
    plan = KVPlan(groups, page_size, full, value_bytes)
    if budget is None or plan.bytes() <= budget:
        return plan
    least = KVPlan(groups, page_size, one, value_bytes)
    if least.bytes() > budget:
        raise InputError(
            f"The KV cache of one request of {max_tokens} tokens takes {least.bytes() / 2**20:,.1f} MiB, but only "
            f"{max(budget, 0) / 2**20:,.1f} MiB are free for it; lower max_model_len or take an 8-bit KV cache."
        )
    share = (budget - least.bytes()) / (plan.bytes() - least.bytes())
    pages = {kind: one[kind] + int((full[kind] - one[kind]) * share) for kind in one}
    return KVPlan(groups, page_size, pages, value_bytes)
