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

from dataclasses import dataclass

from ..config import Kind, LayerSpec


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
