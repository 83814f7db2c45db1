"""A plan as tables: rows of text, which the command line, HTML and docs print each in their own way."""

from __future__ import annotations

from dataclasses import dataclass

from ..weights.params import Part
from .plan import MemoryPlan
from .units import gib, kilo

PART_NAMES: dict[Part, str] = {
    "text": "text layers",
    "experts": "experts",
    "embedding": "embedding",
    "head": "head",
    "per_layer_embedding": "per-layer embeddings",
    "vision": "vision",
    "audio": "audio",
    "drafter": "drafter",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Headings and rows of cells."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(plan: MemoryPlan) -> tuple[Table, ...]:
    """Weights, keys and values, the sum, and speeds."""
    return weights_table(plan), cache_table(plan), total_table(plan), speed_table(plan)


def weights_table(plan: MemoryPlan) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            PART_NAMES[p.part],
            f"{p.parameters:,}",
            p.format,
            gib(p.bytes),
            "host memory" if p.place == "host" else "device",
        )
        for p in plan.memory.weights
    ]
    headings: tuple[str, ...] = ("weights", "parameters", "format", "bytes", "where")
    if plan.work.ranks > 1:
        headings = (*headings, "on every rank")
        rows = [(*row, gib(p.replicated)) for row, p in zip(rows, plan.memory.weights, strict=True)]
    return Table("Weights", headings, tuple(rows))


def cache_table(plan: MemoryPlan) -> Table:
    rows = [
        (
            f"{part.kind}, {part.layers} layers",
            f"{part.token_bytes:,} B" + (f" (of the last {part.window:,})" if part.window else ""),
            gib(part.user_bytes),
            gib(part.read_bytes),
            f"{part.saved_by_k_eq_v:,} B" if part.saved_by_k_eq_v else "-",
            f"{part.saved_by_sharing:,} B" if part.saved_by_sharing else "-",
        )
        for part in plan.memory.kv
    ]
    headings = (
        "keys and values",
        "per token",
        "per user",
        "read per reply token",
        "value = key saves",
        "sharing saves",
    )
    return Table(f"Cache at {kilo(plan.work.context)}", headings, tuple(rows))


def total_table(plan: MemoryPlan) -> Table:
    took = plan.memory
    rows = [
        ("weights on the device", gib(took.on_device)),
        (f"pages of {plan.work.users} x {kilo(plan.work.context)}", gib(took.pool)),
        ("kept windows for the next turn", gib(took.snapshots)),
        ("activations of a step", gib(took.activations)),
        *((("image encoder", gib(took.encoder)),) if took.encoder else ()),
        ("runtime", gib(took.runtime)),
        ("in all", gib(took.total)),
        ("there is", gib(plan.available)),
    ]
    return Table("Memory", ("what", "bytes"), tuple(rows))


def speed_table(plan: MemoryPlan) -> Table:
    drafted = any(speed.decode_with_drafter for speed in plan.speeds)
    headings: tuple[str, ...] = ("users", "reply tokens/s", "per user", "prompt tokens/s")
    rows: list[tuple[str, ...]] = []
    for speed in plan.speeds:
        row = (str(speed.batch), f"{speed.decode:,.0f}", f"{speed.per_user:,.1f}", f"{speed.prefill:,.0f}")
        rows.append((*row, f"{speed.decode_with_drafter:,.0f}") if speed.decode_with_drafter else row)
    if drafted:
        headings = (*headings, f"with drafter at {plan.work.acceptance:.0%}")
    return Table(f"At most, on {plan.hardware.name}", headings, tuple(rows))


def comparison(plans: list[MemoryPlan], title: str) -> Table:
    """One row per plan."""
    headings = ("model", "format", "weights", "in all", "longest", "users", "reply tokens/s", "prompt tokens/s", "")
    rows = tuple(
        (
            plan.model,
            plan.work.precision,
            gib(plan.memory.on_device),
            gib(plan.memory.total),
            kilo(plan.longest_context),
            f"{plan.most_users:,}",
            f"{plan.speeds[0].decode:,.0f}",
            f"{plan.speeds[0].prefill:,.0f}",
            "fits" if plan.fits else "too large",
        )
        for plan in plans
    )
    return Table(title, headings, rows)
