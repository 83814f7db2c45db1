"""What each step does: which tracks, how many tokens each.

Tracks that reply go first, one token each and the guesses after it; what is left of the step's budget goes to prompts
in order of rank, in chunks. When pages run out, the last in rank gives up its pages and begins again later (its tokens
are kept, so the client sees a pause and nothing else).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from ..kv.cache import KVCache
from .track import Track


@dataclass(slots=True)
class Item:
    """One track's part of a step: tokens `context` .. `context + count`."""

    track: Track
    context: int
    count: int
    wanted: int
    """Logits are wanted for the last `wanted` of them."""
    guesses: int
    """The last so many are guesses."""


@dataclass(slots=True)
class Plan:
    """One step. Printable; the engine turns it into a `Batch`."""

    items: list[Item]
    preempted: list[Track]


class Scheduler:
    """Queue and running set of an engine."""

    def __init__(self, cache: KVCache, *, seats: int, budget: int, logit_rows: int) -> None:
        self.cache = cache
        self.seats = seats
        """Most tracks that run at once."""
        self.budget = budget
        """Tokens per step; an atomic span may exceed it."""
        self.logit_rows = logit_rows
        """Most prompt tokens per step and track whose logits are wanted."""
        self.waiting: list[Track] = []
        self.running: list[Track] = []
        self._blocked: tuple[Track, int] | None = None

    def add(self, track: Track) -> None:
        """Let a track wait for its turn."""
        insort(self.waiting, track, key=_rank)

    def remove(self, track: Track, *, broken: bool = False) -> None:
        """Take a track out, wherever it is, and free its pages."""
        if track.holding is not None:
            self.running.remove(track)
            self.cache.close(track.holding, broken=broken)
            track.holding = None
        elif track in self.waiting:
            self.waiting.remove(track)

    def plan(self) -> Plan:
        """The next step; empty when there is nothing to do."""
        self.cache.settle()
        plan = Plan([], [])
        budget = self.budget
        order = sorted(self.running, key=_rank)
        for track in [t for t in order if t.remaining == 1] + [t for t in order if t.remaining > 1]:
            if budget > 0 and track.holding is not None:
                budget -= self._continue(track, budget, plan)
        # Whoever has just made room for others does not take it back in the same step.
        while self.waiting and budget > 0 and not plan.preempted:
            count = self._admit(self.waiting[0], budget, plan)
            if count == 0:
                break
            budget -= count
        return plan

    def _continue(self, track: Track, budget: int, plan: Plan) -> int:
        """Give a running track its part, at the cost of the last in rank if need be; how many tokens it got."""
        assert track.holding is not None
        count = self._count(track, budget)
        guesses = max(0, min(track.guesses, budget - count))
        while not self.cache.grow(track.holding, track.computed, track.computed + count + guesses, guesses):
            if guesses:  # they are not worth anybody's pages
                guesses = 0
                continue
            victim = max(self.running, key=_rank)
            self._preempt(victim, plan)
            if victim is track:
                return 0
        plan.items.append(self._item(track, count, guesses))
        return count + guesses

    def _admit(self, track: Track, budget: int, plan: Plan) -> int:
        """Let the first waiting track in if there is a seat and room for all it has; how many tokens it got."""
        room = self.cache.full.available + self.cache.sliding.available
        if self._blocked is not None and self._blocked[0] is track and room <= self._blocked[1] and self.running:
            return 0
        self._blocked = None
        if len(self.running) >= self.seats and not self._displace(track, plan):
            return 0
        if not plan.items:
            self.cache.settle()
        limit = 0 if track.wants_prompt else track.length - 1
        opened = self.cache.open(track.content, limit, track.salt)
        if opened is None:
            return 0
        track.holding, track.computed = opened
        self._set_boundaries(track)
        count = self._count(track, budget)
        # Room for all its tokens and a page for everybody who runs: else the next page needed throws it out again.
        whole = -(-(track.length + 1) // self.cache.page_size) + len(self.running)
        while not self.cache.room(whole - len(track.holding.pages)) or not self.cache.grow(
            track.holding, track.computed, track.computed + count
        ):
            if not self._displace(track, plan):
                self.cache.close(track.holding)
                track.holding, track.computed = None, 0
                self._blocked = (track, self.cache.full.available + self.cache.sliding.available)
                return 0
        self.waiting.pop(0)
        self.running.append(track)
        if track.generated == 0:
            track.cached = track.computed
        plan.items.append(self._item(track, count))
        return count

    def _set_boundaries(self, track: Track) -> None:
        """Where to keep the window on the way: as the prompt says, and where this text left a known one."""
        assert track.holding is not None
        places = {b for b in track.request.boundaries if b > track.computed}
        if track.computed < track.holding.shared < track.length:
            places.add(track.holding.shared)
        track.boundaries = sorted(places)

    def _displace(self, track: Track, plan: Plan) -> bool:
        """Preempt somebody of lower priority (not merely of later arrival) for a waiting track."""
        if not self.running:
            return False
        victim = max(self.running, key=_rank)
        if victim.request.priority <= track.request.priority:
            return False
        self._preempt(victim, plan)
        return True

    def _preempt(self, victim: Track, plan: Plan) -> None:
        plan.items = [item for item in plan.items if item.track is not victim]
        plan.preempted.append(victim)
        self.remove(victim)
        victim.computed = victim.guesses = 0
        self.add(victim)

    def _count(self, track: Track, budget: int) -> int:
        """How many tokens come next: within the budget, up to the next boundary, and never into a two-way span."""
        end = track.computed + min(track.remaining, budget)
        if track.wants_prompt:
            end = min(end, track.computed + self.logit_rows)
        for boundary in track.boundaries:
            if track.computed < boundary < end:
                end = boundary
                break
        for span in track.request.spans:
            if span.two_way and span.start < end < span.start + span.length:
                end = span.start if span.start > track.computed else span.start + span.length
        return end - track.computed

    def _item(self, track: Track, count: int, guesses: int = 0) -> Item:
        end = track.computed + count
        wanted = min(count, max(0, end - track.scored)) if track.wants_prompt else int(end == track.length)
        return Item(track, track.computed, count + guesses, wanted + guesses, guesses)


def _rank(track: Track) -> tuple[int, int, int]:
    return track.rank
