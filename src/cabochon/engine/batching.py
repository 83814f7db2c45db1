"""From a plan to the `Batch` that the model reads: packed ids, positions, page tables, slots.

Everything is computed in numpy for all tokens at once and goes to the device in one transfer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import Kind
from ..kv.cache import KVCache
from ..model.batch import Batch, SoftTokens
from ..ops.views import Past, Rows
from .request import SoftSpan
from .scheduler import Item
from .track import Track

Array = NDArray[Any]


def build(
    items: list[Item], cache: KVCache, device: torch.device, *, skip: bool = True, features: Mapping[bytes, Tensor]
) -> Batch:
    """The batch of one step.

    Args:
        skip: rows whose logits nobody wants do not go through the KV-shared layers.
        features: key of every media span that the step touches -> its soft tokens [length, D].
    """
    count = np.fromiter((item.count for item in items), np.int64, len(items))
    context = np.fromiter((item.context for item in items), np.int64, len(items))
    wanted = np.fromiter((item.wanted for item in items), np.int64, len(items))
    table = np.fromiter((_row(item.track) for item in items), np.int64, len(items))
    start = _starts(count)
    total = int(start[-1])
    owner = np.repeat(np.arange(len(items)), count)
    position = np.arange(total) + np.repeat(context - start[:-1], count)
    arrays: dict[str, Array] = {
        "ids": np.concatenate([item.track.span(item.context, item.context + item.count) for item in items]),
        "start": start.astype(np.int32),
        "context": context.astype(np.int32),
        "position": position.astype(np.int32),
    }
    spans = [(item, base, span) for item, base in zip(items, start, strict=False) for span in spans_of(item)]
    if any(span.two_way for _, _, span in spans):
        arrays["see_until"] = _see_until(spans, position).astype(np.int32)
    every = int(wanted.sum()) == total
    if not every:
        _want(arrays, wanted, start, position, skip)
    longest = _pages(arrays, cache, table, owner, context, position)
    t = ship(arrays, device)
    rows = Rows(None, t["start"], t["position"], t.get("see_until", t["position"]), int(count.max()))
    tail = rows
    if not every and skip:
        reach = t["tail_until"] if "tail_until" in t else t["tail_position"]
        tail = Rows(t["tail_index"], t["tail_start"], t["tail_position"], reach, int(wanted.max()))
    past = _past(t, longest)
    only = t["tail_index"] if not every and not skip else None
    soft = _soft(spans, features, device) if spans else None
    return Batch(t["ids"], t["start"], t["context"], rows, tail, only, past, cache.store.by_layer, soft)


def last_rows(
    tracks: Sequence[Track], cache: KVCache, device: torch.device
) -> tuple[Rows, Tensor, Tensor, dict[Kind, Past]]:
    """What a drafter asks from, between steps: one row per reply, at its last computed token, all of it in pages.

    Returns the rows, `start` [R + 1] and `context` [R] of a step without tokens, and where the past lies.
    """
    context = np.fromiter((track.computed for track in tracks), np.int64, len(tracks))
    row = np.fromiter((_row(track) for track in tracks), np.int64, len(tracks))
    arrays: dict[str, Array] = {
        "index": np.zeros(len(tracks), np.int64),
        "each": np.arange(len(tracks) + 1, dtype=np.int32),
        "start": np.zeros(len(tracks) + 1, np.int32),
        "context": context.astype(np.int32),
        "position": (context - 1).astype(np.int32),
    }
    nobody = np.zeros(0, np.int64)
    longest = _pages(arrays, cache, row, nobody, context, nobody)
    t = ship(arrays, device)
    rows = Rows(t["index"], t["each"], t["position"], t["position"], 1)
    return rows, t["start"], t["context"], _past(t, longest)


def _past(t: Mapping[str, Tensor], longest: Mapping[Kind, int]) -> dict[Kind, Past]:
    first = {"sliding": t["sliding_first"], "global": torch.zeros_like(t["context"])}
    kinds: tuple[Kind, ...] = ("sliding", "global")
    return {kind: Past(t[f"{kind}_table"], first[kind], t[f"{kind}_slots"], longest[kind]) for kind in kinds}


def _row(track: Track) -> int:
    assert track.holding is not None
    return track.holding.row


def _starts(count: Array) -> Array:
    start = np.zeros(len(count) + 1, np.int64)
    np.cumsum(count, out=start[1:])
    return start


def _want(arrays: dict[str, Array], wanted: Array, start: Array, position: Array, skip: bool) -> None:
    """Each request's last `wanted` tokens as the tail's rows."""
    begin = _starts(wanted)
    index = np.arange(int(begin[-1])) + np.repeat(start[1:] - begin[1:], wanted)
    arrays["tail_index"] = index
    if skip:
        arrays["tail_start"] = begin.astype(np.int32)
        arrays["tail_position"] = position[index].astype(np.int32)
        if "see_until" in arrays:
            arrays["tail_until"] = arrays["see_until"][index]


def _pages(
    arrays: dict[str, Array], cache: KVCache, row: Array, owner: Array, context: Array, position: Array
) -> dict[Kind, int]:
    """Tables of the past and slots of the step for both groups; the longest past in each."""
    size, tables = cache.page_size, cache.tables
    page, slot, mine = position // size, position % size, row[owner]
    used = -(-context // size)

    full = tables.page["global"]
    slots = full[mine, page].astype(np.int64) * size + slot
    arrays["global_slots"] = np.where(position >= tables.shared[mine], slots, -1)
    arrays["global_table"] = full[row, : max(1, int(used.max()))]

    near, first = tables.page["sliding"], tables.window_first[row].astype(np.int64)
    at = page - first[owner]
    slots = near[mine, np.maximum(at, 0)].astype(np.int64) * size + slot
    arrays["sliding_slots"] = np.where(page >= tables.window_keep[mine], slots, -1)
    arrays["sliding_table"] = near[row, : max(1, int((used - first).max()))]
    arrays["sliding_first"] = (first * size).astype(np.int32)
    return {"sliding": int((context - first * size).max()), "global": int(context.max())}


# Media ----------------------------------------------------------------------------------------------------------------


def spans_of(item: Item) -> list[SoftSpan]:
    """The media spans that an item's part of the step touches."""
    return [span for span in item.track.request.spans if _part(item, span)]


def _part(item: Item, span: SoftSpan) -> range:
    """Positions of a span that the step computes."""
    return range(max(span.start, item.context), min(span.start + span.length, item.context + item.count))


def _see_until(spans: list[tuple[Item, int, SoftSpan]], position: Array) -> Array:
    """Tokens of a two-way span see to its end on sliding layers.

    Such a span lies whole in the step, unless a prompt that ends with it came before: then only its last token does.
    """
    reach = position.copy()
    for item, base, span in spans:
        if span.two_way:
            part = _part(item, span)
            at = base + part.start - item.context
            reach[at : at + len(part)] = span.start + span.length - 1
    return reach


def _soft(
    spans: list[tuple[Item, int, SoftSpan]], features: Mapping[bytes, Tensor], device: torch.device
) -> SoftTokens:
    index, rows = [], []
    for item, base, span in spans:
        part = _part(item, span)
        index.append(torch.arange(part.start, part.stop) + int(base) - item.context)
        rows.append(features[span.key][part.start - span.start : part.stop - span.start])
    return SoftTokens(torch.cat(index).to(device), torch.cat(rows))


# Transfer -------------------------------------------------------------------------------------------------------------


def ship(arrays: dict[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Host arrays as tensors on `device`: as they are on the CPU, elsewhere through one pinned buffer and one copy."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    starts = _starts(np.fromiter((-(-array.nbytes // 16) * 16 for array in arrays.values()), np.int64, len(arrays)))
    host = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = host.numpy()
    for array, at in zip(arrays.values(), starts, strict=False):
        flat[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    there = host.to(device, non_blocking=True)
    kinds = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32, "bool": torch.bool}
    return {
        name: there[at : at + array.nbytes].view(kinds[array.dtype.name]).view(array.shape)
        for (name, array), at in zip(arrays.items(), starts.tolist(), strict=False)
    }
