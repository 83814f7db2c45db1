"""Decode steps recorded as CUDA graphs: one launch replays a whole step instead of a thousand small ones.

A recording fixes every address and every size. So a step is copied into tensors that never move, padded to the next
size in a short list: padding requests see only themselves and store nothing. What the kernels need to know of true
lengths they read on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Kind
from ..model.batch import Batch
from ..ops.views import Past, Rows

Forward = Callable[[Batch], tuple[Tensor, Tensor]]
"""From a batch to its rows' logits and hidden states."""
WIDEST = 256
"""Most requests of a recorded step."""


def takes(batch: Batch) -> bool:
    """Is this a step that can be recorded: one token for each request, all of which get logits, and no media?"""
    one_each = batch.rows.longest == 1 and batch.tokens == batch.context.shape[0] <= WIDEST
    return one_each and batch.tail is batch.rows and batch.wanted is None and batch.soft is None and bool(batch.past)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a recording fixes: requests, and pages in the table of each group."""

    requests: int
    pages: tuple[tuple[Kind, int], ...]

    @classmethod
    def of(cls, batch: Batch) -> Shape:
        """The smallest shape of the list that holds `batch`."""
        count = batch.context.shape[0]
        requests = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
        # Few shapes: a table that grows with every page would be recorded anew each time.
        pages = ((kind, max(64, 1 << (past.table.shape[1] - 1).bit_length())) for kind, past in batch.past.items())
        return cls(requests, tuple(pages))


class Frame:
    """The tensors of a recorded step: a `Batch` whose contents change and whose addresses don't."""

    def __init__(self, shape: Shape, like: Batch) -> None:
        count, device = shape.requests, like.context.device
        self.shape = shape
        position = torch.zeros(count, dtype=torch.int32, device=device)
        start = torch.arange(count + 1, dtype=torch.int32, device=device)
        rows = Rows(None, start, position, position, 1)
        size = next(iter(like.pages.values())).shape[1]  # slots per page, the same in all groups
        past = {kind: _empty_past(count, pages, size, device) for kind, pages in shape.pages}
        ids = torch.zeros(count, dtype=torch.int64, device=device)
        self.batch = Batch(ids, start, torch.zeros_like(position), rows, rows, None, past, like.pages)

    def fill(self, batch: Batch) -> None:
        """Copy a step into the frame; the requests beyond it become padding."""
        mine = self.batch
        _copy(mine.token_ids, batch.token_ids, 0)
        _copy(mine.context, batch.context, 0)
        _copy(mine.rows.position, batch.rows.position, 0)
        for kind, past in mine.past.items():
            _copy(past.first, batch.past[kind].first, 0)
            _copy(past.slots, batch.past[kind].slots, -1)
            count, width = batch.past[kind].table.shape
            past.table[:count, :width].copy_(batch.past[kind].table)


def _empty_past(count: int, pages: int, size: int, device: torch.device) -> Past:
    table = torch.zeros(count, pages, dtype=torch.int32, device=device)
    slots = torch.full((count,), -1, dtype=torch.int64, device=device)
    return Past(table, torch.zeros(count, dtype=torch.int32, device=device), slots, pages * size)


def _copy(target: Tensor, source: Tensor, padding: int) -> None:
    count = source.shape[0]
    target[:count].copy_(source)
    target[count:].fill_(padding)


class Recorder:
    """Replays the step of a batch, recording it on first sight."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.recorded: dict[Shape, tuple[Frame, torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits [R, V] and hidden states [R, D] of a batch that `takes` accepts; the next call overwrites them."""
        shape = Shape.of(batch)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(shape, batch)
        frame, graph, (logits, hidden) = self.recorded[shape]
        frame.fill(batch)
        graph.replay()
        return logits[: batch.tokens], hidden[: batch.tokens]

    def _record(self, shape: Shape, like: Batch) -> tuple[Frame, torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        frame = Frame(shape, like)
        side = torch.cuda.Stream(like.context.device)
        side.wait_stream(torch.cuda.current_stream(like.context.device))
        with torch.cuda.stream(side):  # compiles kernels and fills caches; a frame of padding stores nothing
            self.forward(frame.batch)
        torch.cuda.current_stream(like.context.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = self.forward(frame.batch)
        return frame, graph, out
