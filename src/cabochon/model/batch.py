"""What one step of the model reads: packed tokens of several requests, and where their past lies.

Letters: T tokens of the step, R requests, Q query rows, K KV heads, W row width, P pages of a table, S slots per page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import Kind, LayerSpec
from ..ops.views import Pages, Past, Rows, View


@dataclass(slots=True)
class SoftTokens:
    """Features that take the place of token embeddings (images, video frames, sound)."""

    index: Tensor
    """[M] int64, token of the step."""
    features: Tensor
    """[M, D] in the model's type, unscaled."""


@dataclass(slots=True)
class Batch:
    """One step. Positions within a request are contiguous: context[r] + (0, 1, ...)."""

    token_ids: Tensor
    """[T] int64."""
    start: Tensor
    """[R + 1] int32, request r owns tokens start[r] .. start[r + 1]."""
    context: Tensor
    """[R] int32, tokens of each request before this step."""
    rows: Rows
    """All tokens as query rows."""
    tail: Rows
    """The rows for which KV-shared layers, final norm and head run; the same object as `rows` if nothing is skipped."""
    wanted: Tensor | None
    """[L] int64, which of the tail rows get logits, in order; None means all."""
    past: Mapping[Kind, Past] = field(default_factory=dict)
    """Empty in training: nothing came before and nothing is stored."""
    pages: Mapping[int, Pages] = field(default_factory=dict)
    """Owning layer -> its pages [pages, S, K, W], written in place by the step after the last layer that reads them:
    the rows of this step may take the slots of rows that leave the window with it."""
    soft: SoftTokens | None = None

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[0]

    def view(self, spec: LayerSpec, skip: bool) -> View:
        """What the layer `spec` sees; `skip`: it runs for the tail only."""
        rows = self.tail if skip else self.rows
        return View(rows, self.start, self.context, self.pages.get(spec.reads_kv_of), self.past.get(spec.kind))


def whole_sequences(sequences: list[Tensor], device: torch.device | str = "cpu") -> Batch:
    """A batch without past: every sequence from its first token, logits for every token. What training uses."""
    lengths = torch.tensor([len(s) for s in sequences])
    start = torch.zeros(len(sequences) + 1, dtype=torch.int32)
    start[1:] = lengths.cumsum(0)
    position = torch.cat([torch.arange(len(s), dtype=torch.int32) for s in sequences]).to(device)
    rows = Rows(None, start.to(device), position, position, int(lengths.max()))
    context = torch.zeros(len(sequences), dtype=torch.int32, device=device)
    return Batch(torch.cat(sequences).to(device), rows.start, context, rows, rows, None)
