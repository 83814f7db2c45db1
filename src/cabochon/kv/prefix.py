"""What is remembered of finished and running requests, so that a later one need not compute it again.

Global pages are found by the digest of all ids up to their end. A sliding layer's state at position p depends on
everything before p, so it exists only where somebody kept it: a `Snapshot` holds references to the pages of the last
window (no copy; whoever resumes copies the partly filled last page). A hit resumes exactly at a snapshot.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from .pool import PagePool

Content = NDArray[np.int64]
"""The ids of a text, media tokens replaced by hashes of the media's bytes and the token's place in it."""


def digest(before: bytes, page: Content) -> bytes:
    """The name of a page: a hash of the page's content and of the name of the page before it."""
    return blake2b(page.tobytes(), key=before, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after `position` tokens."""

    position: int
    chain: bytes
    """Digest of the last full page before `position` (the request's salt where there is none)."""
    rest: bytes
    """The content after that page."""
    window_first: int
    """Index (position // S) of the first sliding page."""
    window: tuple[int, ...]
    tail: int | None
    """The partly filled global page, if `position` is not at a page's end."""


class Snapshots:
    """Kept windows, least recently used first, holding at most `limit` sliding pages."""

    def __init__(self, sliding: PagePool, full: PagePool, limit: int) -> None:
        self._sliding = sliding
        self._global = full
        self.limit = limit
        self._order: OrderedDict[tuple[bytes, bytes], Snapshot] = OrderedDict()
        self._by_chain: dict[bytes, list[Snapshot]] = {}
        self._held: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._order.values())

    @property
    def pages(self) -> int:
        """Sliding pages that snapshots hold."""
        return len(self._held)

    def keep(self, snapshot: Snapshot) -> None:
        """Remember a snapshot; it gets its own references. One that is known already only counts as used."""
        key = (snapshot.chain, snapshot.rest)
        if key in self._order:
            self._order.move_to_end(key)
            return
        if len(snapshot.window) > self.limit:
            return
        self._sliding.share(snapshot.window)
        if snapshot.tail is not None:
            self._global.share([snapshot.tail])
        self._order[key] = snapshot
        self._by_chain.setdefault(snapshot.chain, []).append(snapshot)
        self._held.update(snapshot.window)
        while self.pages > self.limit:
            self.drop_oldest()

    def find(self, chain: bytes, content: Content, limit: int) -> Snapshot | None:
        """The longest snapshot of at most `limit` tokens after the full page `chain` whose rest begins `content`."""
        best: Snapshot | None = None
        following = content.tobytes()
        for snapshot in self._by_chain.get(chain, ()):
            fits = snapshot.position <= limit and following.startswith(snapshot.rest)
            if fits and (best is None or snapshot.position > best.position):
                best = snapshot
        if best is not None:
            self._order.move_to_end((best.chain, best.rest))
        return best

    def drop_oldest(self) -> bool:
        """Forget the least recently used snapshot; False if there is none."""
        if not self._order:
            return False
        self._drop(next(iter(self._order.values())))
        return True

    def drop_tail(self) -> bool:
        """Forget the least recently used snapshot whose partly filled global page only snapshots hold; False: none."""
        holders = Counter(snapshot.tail for snapshot in self if snapshot.tail is not None)
        for snapshot in self:
            if snapshot.tail is not None and self._global.refs[snapshot.tail] == holders[snapshot.tail]:
                self._drop(snapshot)
                return True
        return False

    def drop_chain(self, chain: bytes) -> None:
        """Forget the snapshots that a lost global page makes unreachable."""
        for snapshot in list(self._by_chain.get(chain, ())):
            self._drop(snapshot)

    def _drop(self, snapshot: Snapshot) -> None:
        del self._order[(snapshot.chain, snapshot.rest)]
        siblings = self._by_chain[snapshot.chain]
        siblings.remove(snapshot)
        if not siblings:
            del self._by_chain[snapshot.chain]
        self._held.subtract(snapshot.window)
        self._held = +self._held
        self._sliding.release(snapshot.window)
        if snapshot.tail is not None:
            self._global.release([snapshot.tail])
