"""One reply while the engine works on it. A request with n > 1 has n tracks that part after the prompt."""

from __future__ import annotations

import os
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..kv.cache import Holding
from ..kv.prefix import Content
from .request import Constraint, EngineFinish, Request, SoftSpan, TokenLogprob


class Track:
    """The tokens of one reply with its prompt, how many of them are computed, and the pages they hold."""

    __slots__ = (
        "_content",
        "_ids",
        "arrival",
        "boundaries",
        "cached",
        "computed",
        "constraint",
        "error",
        "finish",
        "guesses",
        "hits",
        "holding",
        "index",
        "last_token_at",
        "length",
        "matched",
        "prompt_length",
        "prompt_scores",
        "request",
        "salt",
        "scored",
        "seed",
        "started_at",
        "stop_reason",
        "tries",
    )

    def __init__(self, request: Request, arrival: int, now: float) -> None:
        self.request = request
        self.index = 0
        self.arrival = arrival
        self.prompt_length = self.length = len(request.token_ids)
        self._ids: NDArray[np.int64] = np.zeros(self.length + 64, np.int64)
        self._ids[: self.length] = request.token_ids
        self._content = _with_media(self._ids, request.spans) if request.spans else self._ids
        self.salt = blake2b(request.salt, digest_size=16).digest() if request.salt else b""
        self.computed = 0
        self.holding: Holding | None = None
        self.constraint: Constraint | None = request.constraint() if request.constraint else None
        self.seed = _seed(request.params.seed, 0)
        self.boundaries: list[int] = []
        """Positions still ahead at which the window is to be kept."""
        self.cached = 0
        self.guesses = 0
        """Tokens after the last one that somebody expects; the next step computes them along with it."""
        self.matched = 0
        """How many guesses have come true since they were made."""
        self.hits, self.tries = 1.4, 2.0
        """Guesses that came true, of those that were put to the test; the older, the less they count."""
        self.scored = 0
        """Prompt tokens whose logits somebody wanted and got."""
        self.prompt_scores: list[TokenLogprob | None] = []
        self.finish: EngineFinish | None = None
        self.stop_reason: int | None = None
        self.error: str | RequestError | None = None
        self.started_at = now
        self.last_token_at: float | None = None

    def twin(self, index: int) -> Track:
        """Another reply to the same prompt, with a seed and a constraint of its own."""
        other = Track(self.request, self.arrival, self.started_at)
        other.index = index
        other.seed = _seed(self.request.params.seed, index)
        other.cached = self.cached
        other.scored = self.prompt_length
        return other

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first: by priority, then by arrival."""
        return (self.request.priority, self.arrival, self.index)

    @property
    def ids(self) -> NDArray[np.int64]:
        """All tokens, prompt first."""
        return self._ids[: self.length]

    @property
    def content(self) -> Content:
        """The ids as the prefix cache compares them: a media token stands for the media's bytes."""
        return self._content[: self.length]

    @property
    def generated(self) -> int:
        return self.length - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens not yet computed; 1 while replying."""
        return self.length - self.computed

    @property
    def wants_prompt(self) -> bool:
        """Are logits of prompt tokens wanted that nobody has got yet?"""
        request = self.request
        asked = request.sink is not None or request.params.prompt_logprobs is not None
        return asked and self.scored < self.prompt_length

    def span(self, begin: int, end: int) -> NDArray[np.int64]:
        """Tokens `begin` .. `end`, of which the last may be guesses."""
        return self._ids[begin:end]

    def append(self, token: int) -> None:
        """One more token of the reply. Guesses stay as long as what comes is what they said."""
        self._reserve(1)
        came_true = self.guesses > 0 and int(self._ids[self.length]) == token
        self.guesses = self.guesses - 1 if came_true else 0
        self.matched += came_true
        self._ids[self.length] = self._content[self.length] = token
        self.length += 1

    def guess(self, tokens: list[int]) -> None:
        """Expect `tokens` after the last one."""
        self._reserve(len(tokens))
        self._ids[self.length : self.length + len(tokens)] = tokens
        self.guesses, self.matched = len(tokens), 0

    def _reserve(self, more: int) -> None:
        if self.length + more > len(self._ids):
            shared = self._content is self._ids
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._content = self._ids if shared else np.concatenate([self._content, np.zeros_like(self._content)])

    def end(self, reason: EngineFinish, *, stop: int | None = None, error: str | RequestError | None = None) -> None:
        """The reply is over, and why."""
        self.finish, self.stop_reason, self.error = reason, stop, error


def _seed(seed: int | None, index: int) -> int:
    """Each reply draws from its own stream; without a seed, from one that nobody knows."""
    if seed is None:
        return int.from_bytes(os.urandom(8), "little")
    return (seed + index * 0x9E3779B97F4A7C15) % 2**64


def _with_media(ids: NDArray[np.int64], spans: tuple[SoftSpan, ...]) -> Content:
    content = ids.copy()
    for span in spans:
        key = int.from_bytes(blake2b(span.key, digest_size=8).digest(), "little") >> 1
        # Negative, so that no token id is like it; the low bits hold the place in the span.
        content[span.start : span.start + span.length] = -np.arange(1, span.length + 1, dtype=np.int64) ^ key
    return content
