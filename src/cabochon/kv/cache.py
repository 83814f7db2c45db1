"""The cache of one engine: every request's pages in both groups, the prefix cache, and the tables that a step reads.

A request holds all its global pages and the sliding pages of its last window. Growing by a step drops the pages that
leave the window *before* it takes new ones: attention of a layer has read them by the time the layer's new rows are
stored, so a window never needs a second set of pages, however long the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import Kind
from .layout import CacheDtype, KVPlan, request_pages
from .pool import PagePool, PageStore
from .prefix import Content, Snapshot, Snapshots, digest

Ints = NDArray[np.int32]


@dataclass(slots=True)
class Holding:
    """The pages of one running request."""

    row: int
    """Its row in the tables."""
    chain: list[bytes]
    """Digests of its full global pages, as far as they are known."""
    salt: bytes
    pages: list[int] = field(default_factory=list)
    """Global pages in order."""
    window_first: int = 0
    """Index (position // S) of the first sliding page held."""
    window: list[int] = field(default_factory=list)
    shared: int = 0
    """Tokens whose global rows lie in pages found by content: they are not stored again."""


class Tables:
    """Page tables of all running requests, one row each, kept up to date in place."""

    def __init__(self, rows: int, widths: dict[Kind, int]) -> None:
        self.page: dict[Kind, Ints] = {kind: np.zeros((rows, width), np.int32) for kind, width in widths.items()}
        self.window_first: Ints = np.zeros(rows, np.int32)
        """Page index of the sliding table's first entry."""
        self.window_keep: Ints = np.zeros(rows, np.int32)
        """Page index from which on this step's sliding rows are stored."""
        self.shared: Ints = np.zeros(rows, np.int32)


class KVCache:
    """Pages for up to `rows` running requests whose steps have at most `step_tokens` tokens."""

    def __init__(
        self,
        plan: KVPlan,
        dtype: torch.dtype,
        device: torch.device,
        formats: dict[Kind, CacheDtype],
        *,
        rows: int,
        max_tokens: int,
        step_tokens: int,
        snapshot_pages: int,
        share: bool = True,
    ) -> None:
        self.plan = plan
        self.page_size = plan.page_size
        window = plan.groups["sliding"].window
        assert window is not None
        self.window = window
        self.share = share
        self.sliding = PagePool(plan.pages["sliding"])
        self.full = PagePool(plan.pages["global"], self._forget)
        self.snapshots = Snapshots(self.sliding, self.full, snapshot_pages if share else 0)
        self.store = PageStore(plan, dtype, device, formats)
        whole = -(-(max_tokens + step_tokens) // self.page_size) + 1
        near = min(whole, (window + step_tokens) // self.page_size + 3)
        self.tables = Tables(rows, {"sliding": near, "global": whole})
        self._rows = list(range(rows - 1, -1, -1))

    def needs(self, tokens: int) -> dict[Kind, int]:
        """Pages per group that a request of `tokens` tokens holds at most."""
        return {kind: request_pages(group, tokens, self.page_size) for kind, group in self.plan.groups.items()}

    # A request's life -------------------------------------------------------------------------------------------------

    def open(self, content: Content, limit: int, salt: bytes = b"") -> tuple[Holding, int] | None:
        """Begin a request: what of `content` is known, of which at most `limit` tokens may be skipped.

        Returns the holding and the number of tokens that need not be computed. `holding.shared` may be more: that far
        the text is known, but its window is not, so texts branch there. None: no room now for the copy of a partly
        filled page; try again with the next step.
        """
        size = self.page_size
        chain, found = [salt], None
        if self.share and limit > 0:
            for start in range(0, len(content) - size + 1, size):
                name = digest(chain[-1], content[start : start + size])
                if name not in self.full.page_of:
                    break
                chain.append(name)
            for k in range(len(chain) - 1, -1, -1):
                found = self.snapshots.find(chain[k], content[k * size : (k + 1) * size], limit + 1)
                if found is not None:
                    break
        known = chain[1:]
        holding = Holding(self._rows.pop(), known, salt, [self.full.page_of[name] for name in known])
        holding.shared = len(known) * size
        self.full.share(holding.pages)
        # A snapshot right at the end of the same text serves as well: windows are kept one token longer than need be.
        computed = 0 if found is None else min(found.position, limit)
        if found is not None and not self._resume(holding, found, computed):
            if self.sliding.recent or self.full.recent:
                self.close(holding)
                return None
            # Nothing will come free: the snapshot itself holds what its copy would need.
            self.sliding.release(holding.window)
            holding.window, holding.window_first, computed = [], 0, 0
        self.tables.shared[holding.row] = holding.shared
        self._write_row(holding)
        return holding, computed

    def _resume(self, holding: Holding, snapshot: Snapshot, computed: int) -> bool:
        """Take over a snapshot's window; last pages that are not full are copied, as others write on in them."""
        beyond = [] if snapshot.tail is None or snapshot.position <= holding.shared else [snapshot.tail]
        holding.window, holding.window_first = list(snapshot.window), snapshot.window_first
        self.sliding.share(snapshot.window)
        if computed % self.page_size == 0 and not beyond:
            return True
        self.full.share(beyond)
        room = self._settled(self.sliding, self.snapshots.drop_oldest) and (
            not beyond or self._settled(self.full, self.snapshots.drop_tail)
        )
        if room:
            holding.window[-1] = self._copy("sliding", self.sliding, holding.window[-1])
            self.sliding.release([snapshot.window[-1]])
            holding.pages += [self._copy("global", self.full, page) for page in beyond]
        self.full.release(beyond)
        return room

    def _settled(self, pool: PagePool, drop: Callable[[], bool]) -> bool:
        """Is there a page to copy into? If not, one is freed that can be copied into once the next step is planned."""
        if pool.settled:
            return True
        if pool.available == 0:
            drop()
        return False

    def _copy(self, kind: Kind, pool: PagePool, source: int) -> int:
        page = pool.take_settled()
        self.store.copy(kind, source, page)
        return page

    def room(self, pages: int) -> bool:
        """Can so many global pages be had, if need be at the cost of snapshots?"""
        while self.full.available < pages:
            if not self.snapshots.drop_tail():
                return False
        return True

    def settle(self) -> None:
        """To be called between steps, before the next one is planned."""
        self.sliding.settle()
        self.full.settle()

    def grow(self, holding: Holding, context: int, end: int, unverified: int = 0) -> bool:
        """Make room for tokens `context` .. `end`, of which the last `unverified` may be taken back.

        False: there is none. On success the tables describe the step; a failure changes nothing but what the prefix
        cache remembers.
        """
        size = self.page_size
        last = -(-end // size)
        need = last - len(holding.pages)
        if not self.room(need):
            return False
        old_first, old = holding.window_first, holding.window
        first = max(0, end - unverified - self.window) // size
        # A window page that another step has dropped stays dropped: `first` never moves back.
        first = max(first, old_first)
        dropped = old[: first - old_first]
        have = old_first + len(old)
        fresh = last - max(have, first)
        if fresh > 0:
            while self.sliding.available + sum(self.sliding.refs[page] == 1 for page in dropped) < fresh:
                if not self.snapshots.drop_oldest():
                    return False
        if need > 0:
            at = len(holding.pages)
            holding.pages += self.full.take(need)
            self.tables.page["global"][holding.row, at:last] = holding.pages[at:last]
        if fresh > 0 or dropped or self.tables.window_first[holding.row] != old_first:
            self._grow_window(holding, first, dropped, max(fresh, 0), last)
        self.tables.window_keep[holding.row] = first
        return True

    def _grow_window(self, holding: Holding, first: int, dropped: list[int], fresh: int, last: int) -> None:
        """The row keeps the dropped pages for this step's reading; the next step's begins behind them."""
        row = self.tables.page["sliding"][holding.row]
        old_first, old = holding.window_first, holding.window
        if self.tables.window_first[holding.row] != old_first:
            self.tables.window_first[holding.row] = old_first
            row[: len(old)] = old
        self.sliding.release(dropped)
        new = self.sliding.take(fresh)
        if new:
            row[last - fresh - old_first : last - old_first] = new
        holding.window = old[len(dropped) :] + new
        holding.window_first = first if holding.window else last

    def _write_row(self, holding: Holding) -> None:
        self.tables.page["global"][holding.row, : len(holding.pages)] = holding.pages
        self.tables.page["sliding"][holding.row, : len(holding.window)] = holding.window
        self.tables.window_first[holding.row] = holding.window_first

    def commit(self, holding: Holding, content: Content, computed: int) -> None:
        """Name the global pages that are full now that `computed` tokens of `content` are stored."""
        size = self.page_size
        for index in range(len(holding.chain), computed // size if self.share else 0):
            before = holding.chain[-1] if holding.chain else holding.salt
            name = digest(before, content[index * size : (index + 1) * size])
            holding.chain.append(name)
            self.full.name(holding.pages[index], name)

    def snapshot(self, holding: Holding, content: Content, position: int) -> None:
        """Keep the window as it is after `position` tokens, all of which are computed and none after."""
        if not self.share or position < 1:
            return
        whole = position // self.page_size
        chain = holding.chain[whole - 1] if whole else holding.salt
        rest = content[whole * self.page_size : position].tobytes()
        tail = holding.pages[whole] if position % self.page_size else None
        window = holding.window[: -(-position // self.page_size) - holding.window_first]
        self.snapshots.keep(Snapshot(position, chain, rest, holding.window_first, tuple(window), tail))

    def fork(self, holding: Holding, computed: int) -> Holding | None:
        """A second request with the same `computed` tokens; only partly filled last pages are copied.

        Between steps only. None: no room now.
        """
        self.settle()
        whole, partial = divmod(computed, self.page_size)
        if not self._rows or (partial and not (self.full.settled and self.sliding.settled)):
            return None
        near = whole - holding.window_first
        twin = Holding(self._rows.pop(), holding.chain[:whole], holding.salt, holding.pages[:whole])
        twin.window_first, twin.window = holding.window_first, holding.window[:near]
        twin.shared = min(holding.shared, computed)
        self.full.share(twin.pages)
        self.sliding.share(twin.window)
        if partial:
            twin.pages.append(self._copy("global", self.full, holding.pages[whole]))
            twin.window.append(self._copy("sliding", self.sliding, holding.window[near]))
        self.tables.shared[twin.row] = twin.shared
        self._write_row(twin)
        return twin

    def close(self, holding: Holding, *, broken: bool = False) -> None:
        """Give everything back. What a `broken` request stored, which may be NaN, is zeroed and found by nobody."""
        if broken:
            own = holding.pages[holding.shared // self.page_size :]
            self.full.unname(own)
            self.store.clear("global", [page for page in own if self.full.refs[page] == 1])
            self.store.clear("sliding", [page for page in holding.window if self.sliding.refs[page] == 1])
        self.full.release(holding.pages)
        self.sliding.release(holding.window)
        self._rows.append(holding.row)

    def _forget(self, name: bytes) -> None:
        self.snapshots.drop_chain(name)

    def check(self, holdings: Iterable[Holding]) -> None:
        """Assert that every page is accounted for."""
        held = list(holdings)
        kept = list(self.snapshots)
        self.full.check([*(h.pages for h in held), *([s.tail] for s in kept if s.tail is not None)])
        self.sliding.check([*(h.window for h in held), *(s.window for s in kept)])
        rows = [h.row for h in held]
        assert sorted([*rows, *self._rows]) == list(range(len(self.tables.shared))), "a table row is lost"
