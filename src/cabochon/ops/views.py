"""What attention needs to know about a step: which rows ask, and where the past of each request lies.

Letters: T tokens of the step, R requests, Q query rows, K KV heads, W row width, P pages of a table, S slots per page.
"""

from __future__ import annotations

from dataclasses import dataclass

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
