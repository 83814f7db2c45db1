"""Speculative decoding: somebody guesses what comes next, and the next step computes the guesses along.

A guess decides only whether a token's logits are there already. Tokens are drawn from the target's own logits, in
order, each with the random number of its place in the reply; the first that is not what was guessed ends the run. So
replies, sampled ones too, are those that the engine gives without guesses.

How many guesses a step gets is settled by time: what a step costs with so many rows and what a guess costs (both timed
as they run), against the share of guesses that came true.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .guessers import Guesser
from .stats import Stats
from .track import Track

log = logging.getLogger(__name__)
PROBE = 32
"""One step in so many does the other thing, a guess where none would pay or none where they do: costs change."""
WIDEST = 128
"""Rows of a step with guesses: every row has its logits, 1 MiB in this family."""
DOUBT = 500
"""Guesses of which none came true, after which somebody should be told."""
SLOW, FAST = 0.98, 0.9
"""What a step's timing, and what a guess's luck, still counts one step later."""


@dataclass(slots=True)
class Line:
    """Seconds of a decode step over its rows: a straight line through the latest, by least squares."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, rows: int, seconds: float) -> None:
        sums = (self.n, self.x, self.y, self.xx, self.xy)
        new = (1.0, rows, seconds, rows * rows, rows * seconds)
        self.n, self.x, self.y, self.xx, self.xy = (SLOW * a + b for a, b in zip(sums, new, strict=True))

    def __call__(self, rows: int) -> float:
        """What `rows` rows would take; a slope below zero is noise."""
        spread = self.n * self.xx - self.x * self.x
        slope = max(0.0, (self.n * self.xy - self.x * self.y) / spread) if spread > 1e-9 * self.n * self.xx else 0.0
        return max(1e-9, (self.y - slope * self.x) / self.n) + slope * rows


class Speculator:
    """Has `guesser` guess for the replies of one engine; at most `most` tokens per reply and step."""

    def __init__(self, guesser: Guesser, most: int, stats: Stats, clock: Callable[[], float]) -> None:
        self.guesser, self.most, self.stats, self.clock = guesser, most, stats, clock
        self.steps = Line()
        self._guess_seconds = 0.0
        self._rounds = 0

    def learn(self, track: Track, offered: int) -> None:
        """Note how the guesses of a step fared, of which `offered` were computed."""
        if not offered:
            return
        track.hits = FAST * track.hits + track.matched
        track.tries = FAST * track.tries + track.matched + (track.matched < offered)
        stats = self.stats
        stats.accepted += track.matched
        if stats.accepted == 0 and stats.drafted < DOUBT <= stats.drafted + offered:
            log.warning("none of the first %d guesses came true: %s", DOUBT, self.guesser.doubt)
        stats.drafted += offered

    def count(self, tracks: list[Track]) -> int:
        """How many guesses per reply make the most tokens per second."""
        most = min(self.most, WIDEST // len(tracks) - 1)
        if most < 1:
            return 0
        rates, best = [track.hits / track.tries for track in tracks], (0.0, 0)
        for count in range(most + 1):
            tokens = sum(sum(rate**k for k in range(count + 1)) for rate in rates)
            cost = self.steps(len(tracks) * (count + 1)) + count * self._guess_seconds if self.steps.n else 1.0
            best = max(best, (tokens / cost, count))
        self._rounds += 1
        return best[1] if self._rounds % PROBE != 2 else int(best[1] == 0)

    @torch.inference_mode()
    def guess(self, tracks: list[Track], hidden: Tensor) -> None:
        """Guesses for replies that go on; `hidden` [Q, D] are the target's states of their last computed tokens."""
        count = self.count(tracks)
        left = [(track.request.params.max_tokens or 1) - track.generated - 1 for track in tracks]
        count = min(count, max(left))
        if count < 1:
            return
        begin = self.clock()
        guesses = self.guesser(tracks, hidden, count)
        for track, tokens, most in zip(tracks, guesses, left, strict=True):
            track.guess(tokens[: max(0, most)])
        seconds = (self.clock() - begin) / count
        self._guess_seconds += (1 - FAST if self._guess_seconds else 1.0) * (seconds - self._guess_seconds)
