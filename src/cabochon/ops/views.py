"""What attention needs to know about a step: which rows ask, and where the past of each request lies.

Letters: T tokens of the step, R requests, Q query rows, K KV heads, W row width, P pages of a table, S slots per page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Rows:
    """The query rows of a step, in request order: all tokens, or only those that the KV-shared layers must run for."""

    index: Tensor | None
    """[Q] int64, which tokens of the step these rows are; None means all of them."""
    start: Tensor
    """[R + 1] int32, request r owns rows start[r] .. start[r + 1]."""
    position: Tensor
    """[Q] int32, absolute position in the request."""
    see_until: Tensor
    """[Q] int32, last position that the row may see on sliding layers: its own, or the end of its two-way span."""
    longest: int
    """Most rows that one request has in this step (host side, for launch sizes)."""


@dataclass(slots=True)
class Past:
    """Where the tokens before this step lie, for one KV group."""

    table: Tensor
    """[R, P] int32 page numbers; entries past the end are 0."""
    first: Tensor
    """[R] int32, absolute position of slot 0 of the table's first page (a multiple of S; 0 for the global group)."""
    slots: Tensor
    """[T] int64, page * S + slot where each token of this step is stored, -1 for tokens that are not stored."""
    longest: int
    """Most past tokens of one request that lie in pages of this group (host side)."""


@dataclass(slots=True)
class ScaledPages:
    """Pages whose rows are kept in 8 bits, each with one scale for `row[:split]` and one for `row[split:]`.

    `split` is the head width: the first part is the key (or the shared vector n), the second the value (or the turned
    quarter of the key); their magnitudes differ by an order, hence two scales. See `kv.layout`.
    """

    codes: Tensor
    """[pages, S, K, W] int8 or float8_e4m3fn."""
    scales: Tensor
    """[pages, S, K, 2] float32."""
    split: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def read(self, page: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of pages `page` [n] -> [n, S, K, W]."""
        codes, scales = self.codes[page] if self.codes.dtype == torch.int8 else self._float8(page), self.scales[page]
        wide = codes.to(scales.dtype)
        first, second = wide[..., : self.split] * scales[..., :1], wide[..., self.split :] * scales[..., 1:]
        return torch.cat([first, second], -1).to(dtype)

    def _float8(self, page: Tensor) -> Tensor:
        # Indexing is not implemented for 8-bit floats everywhere; their bytes can be indexed.
        return self.codes.view(torch.uint8)[page].view(torch.float8_e4m3fn)

    def write(self, rows: Tensor, slots: Tensor) -> None:
        """Round `rows` [n, K, W] to 8 bits and put them at `slots` [n] (page * S + slot)."""
        parts, scales = [], []
        integer = self.codes.dtype == torch.int8
        top = 127.0 if integer else torch.finfo(torch.float8_e4m3fn).max
        for part in (rows[..., : self.split].float(), rows[..., self.split :].float()):
            scale = (part.abs().amax(-1, keepdim=True) / top).clamp_min(1e-20)
            scaled = part / scale
            parts.append(scaled.round().to(torch.int8) if integer else scaled.to(torch.float8_e4m3fn).view(torch.uint8))
            scales.append(scale)
        flat = self.codes if integer else self.codes.view(torch.uint8)
        flat.view(-1, *flat.shape[2:])[slots] = torch.cat(parts, -1)
        self.scales.view(-1, *self.scales.shape[2:])[slots] = torch.cat(scales, -1)


Pages = Tensor | ScaledPages
"""What a layer's stored rows look like: [pages, S, K, W] in the model's type, or the same in 8 bits."""


@dataclass(slots=True)
class View:
    """What the query rows of a layer see beside the rows that their step stores."""

    rows: Rows
    """Who asks."""
    start: Tensor
    """[R + 1] int32, request r's tokens of the step are start[r] .. start[r + 1]."""
    context: Tensor
    """[R] int32, tokens of each request before the step."""
    pages: Pages | None = None
    """Of the layer whose rows are read; None where nothing came before, as in training."""
    past: Past | None = None
