"""Pages: who holds them (host side) and where they lie (device side).

A page belongs to one group (sliding or global) and holds S tokens of all the group's layers. Pages are counted
references, so that requests and snapshots share them. A full global page may carry a name, the digest of everything up
to its end: when nobody holds it any more it stays, idle, until its place is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import Kind
from ..ops.cpu import prefer_huge_pages
from ..ops.views import Pages, ScaledPages
from .layout import CacheDtype, KVPlan


class PagePool:
    """The pages of one group. `forget` is told the digest of a named page whose place is taken."""

    def __init__(self, count: int, forget: Callable[[bytes], None] | None = None) -> None:
        self.count = count
        self.refs = np.zeros(count, dtype=np.int32)
        self.free = list(range(count - 1, -1, -1))
        self.recent: list[int] = []
        """Free pages that the step being planned may still read: rows may be stored there, but nothing copied."""
        self.page_of: dict[bytes, int] = {}
        self.name_of: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Named pages that nobody holds, longest unused first."""
        self._forget = forget

    @property
    def available(self) -> int:
        """Pages that can be had without taking one from a holder."""
        return len(self.free) + len(self.recent) + len(self.idle)

    @property
    def settled(self) -> int:
        """Those of them that may be written before the step that is being planned."""
        return len(self.free) + len(self.idle)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.count - self.available

    def take(self, count: int) -> list[int]:
        """`count` pages for one holder; the caller has made sure that they are available."""
        pages = []
        for _ in range(count):
            page = self.recent.pop() if self.recent else self._settled_page()
            self.refs[page] = 1
            pages.append(page)
        return pages

    def take_settled(self) -> int:
        """One page that nothing in flight reads; the caller has made sure that there is one."""
        page = self._settled_page()
        self.refs[page] = 1
        return page

    def settle(self) -> None:
        """No step is in flight: what was released may be written at once."""
        self.free += self.recent
        self.recent.clear()

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            if self.refs[page] == 0:
                del self.idle[page]
            self.refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each page. Give pages in order: the end of a text is forgotten before its beginning."""
        for page in reversed(pages):
            self.refs[page] -= 1
            if self.refs[page] == 0:
                if page in self.name_of:
                    self.idle[page] = None
                else:
                    self.recent.append(page)

    def name(self, page: int, digest: bytes) -> None:
        """Make a full page findable, unless another page with the same content already is."""
        if digest not in self.page_of:
            self.page_of[digest] = page
            self.name_of[page] = digest

    def unname(self, pages: Iterable[int]) -> None:
        """Make pages that somebody holds unfindable."""
        for page in pages:
            name = self.name_of.pop(page, None)
            if name is not None:
                del self.page_of[name]

    def _settled_page(self) -> int:
        if not self.free:
            page, _ = self.idle.popitem(last=False)
            digest = self.name_of.pop(page)
            del self.page_of[digest]
            self.free.append(page)
            if self._forget is not None:
                self._forget(digest)
        return self.free.pop()

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Assert that the books are right, given the pages of every holder."""
        counted = np.zeros(self.count, dtype=np.int32)
        for pages in holders:
            np.add.at(counted, np.fromiter(pages, dtype=np.int64), 1)
        wrong = np.flatnonzero(counted != self.refs)
        assert wrong.size == 0, (
            f"pages {wrong[:8]} have {self.refs[wrong[:8]]} references, {counted[wrong[:8]]} holders"
        )
        unheld = set(self.free) | set(self.recent) | set(self.idle)
        assert len(unheld) == self.available, "a page is free twice"
        assert unheld == set(np.flatnonzero(self.refs == 0).tolist()), "a page is lost or free while held"
        assert all(page in self.name_of for page in self.idle), "an idle page has no name"
        assert {digest: page for page, digest in self.name_of.items()} == self.page_of, "names and pages disagree"


class PageStore:
    """The memory: one tensor [layers, pages, S, K, W] per group, and [layers, pages, S, K, 2] for scales."""

    def __init__(self, plan: KVPlan, dtype: torch.dtype, device: torch.device, formats: dict[Kind, CacheDtype]) -> None:
        self.codes: dict[Kind, Tensor] = {}
        self.scales: dict[Kind, Tensor] = {}
        self.by_layer: dict[int, Pages] = {}
        kinds = {"auto": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
        for kind, group in plan.groups.items():
            shape = (len(group.layers), plan.pages[kind], plan.page_size, group.kv_heads)
            # Zeros, not empty: a masked slot must not hold a NaN that a kernel multiplies by zero.
            codes = torch.zeros(*shape, group.row_width, dtype=kinds[formats[kind]], device=device)
            if codes.is_cpu:
                prefer_huge_pages(codes)
            self.codes[kind] = codes
            if formats[kind] != "auto":
                self.scales[kind] = torch.zeros(*shape, 2, dtype=torch.float32, device=device)
            for i, layer in enumerate(group.layers):
                scaled = kind in self.scales
                self.by_layer[layer] = (
                    ScaledPages(codes[i], self.scales[kind][i], group.head_dim) if scaled else codes[i]
                )

    def copy(self, kind: Kind, source: int, target: int) -> None:
        """Copy one page, all layers."""
        for memory in self._memory(kind):
            memory[:, target] = memory[:, source]

    def clear(self, kind: Kind, pages: Sequence[int]) -> None:
        """Zero pages that a broken request may have filled with NaN."""
        for memory in self._memory(kind):
            memory[:, list(pages)] = 0

    def _memory(self, kind: Kind) -> list[Tensor]:
        codes = self.codes[kind]
        parts = [codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes]
        return [*parts, self.scales[kind]] if kind in self.scales else parts

    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in (*self.codes.values(), *self.scales.values()))
