"""Who guesses the next tokens of replies: the model's drafter, or nobody but the conversation itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import Kind
from ..errors import InputError
from ..kv.cache import KVCache
from ..model.drafter import Drafter, Stored
from ..model.text import Text
from . import batching
from .track import Track


class Guesser(Protocol):
    """Guesses for replies that go on, all of whose tokens but the newest are computed."""

    doubt: ClassVar[str]
    """What to ask the user when no guess ever comes true."""

    def __call__(self, tracks: Sequence[Track], hidden: Tensor, count: int) -> list[list[int]]:
        """At most `count` tokens per reply; `hidden` [Q, D] are the target's states of their last computed tokens."""
        ...


class Drafting:
    """The drafter, which reads the pages of its target."""

    doubt: ClassVar[str] = "is the drafter this model's?"

    def __init__(self, drafter: Drafter, target: Text, cache: KVCache) -> None:
        self.drafter, self.target, self.cache = drafter, target, cache
        owners = {spec.kind: spec for spec in target.config.layers if spec.owns_kv}  # the last of each kind
        self._pages = {kind: cache.store.by_layer[spec.index] for kind, spec in owners.items()}
        self._k_weight = {
            kind: target.layers[spec.index].self_attn.k_norm.weight for kind, spec in owners.items() if spec.k_eq_v
        }

    def __call__(self, tracks: Sequence[Track], hidden: Tensor, count: int) -> list[list[int]]:
        newest = torch.tensor([int(track.ids[-1]) for track in tracks], device=hidden.device)
        guesses = self.drafter.burst(self.target, newest, hidden, self._stored(tracks, hidden), count)
        return cast(list[list[int]], guesses.tolist())

    def _stored(self, tracks: Sequence[Track], hidden: Tensor) -> Stored:
        rows, start, context, past = batching.last_rows(tracks, self.cache, hidden.device)
        shapes: dict[Kind, tuple[int, ...]] = {kind: pages.shape for kind, pages in self._pages.items()}
        step = {kind: hidden.new_empty(0, *shape[2:]) for kind, shape in shapes.items()}
        return Stored(rows, start, context, step, self._pages, past, self._k_weight)


@dataclass(frozen=True, slots=True)
class Lookup:
    """Prompt lookup: a reply that repeats what was said before goes on as that did.

    Costs no weights and no arithmetic, and helps where replies quote: edited code, extracted data, summaries.
    """

    doubt: ClassVar[str] = "do the replies repeat anything that was said? Where they don't, leave ngram out."
    longest: int = 5
    """Tokens at the end that are looked for; where they are not found, fewer."""
    shortest: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise InputError(
                f"Prompt lookup was asked for tails of {self.shortest} to {self.longest} tokens; give two numbers from "
                "1 up, the smaller first, like ngram:3-5."
            )

    @staticmethod
    def named(name: str) -> Lookup | None:
        """What `ngram`, `ngram:5` (five tokens, no fewer) or `ngram:3-5` ask for; None for any other name."""
        found = re.fullmatch(r"ngram(?::(?:([0-9]{1,4})-)?([0-9]{1,4}))?", name)
        if found is None:
            return None
        return Lookup() if found[2] is None else Lookup(int(found[2]), int(found[1] or found[2]))

    def __call__(self, tracks: Sequence[Track], hidden: Tensor, count: int) -> list[list[int]]:
        return [self.continuation(track.ids, count) for track in tracks]

    def continuation(self, ids: NDArray[np.int64], count: int) -> list[int]:
        """What followed where the longest tail of `ids` occurred last; nothing where none did."""
        found = np.flatnonzero(ids[:-1] == ids[-1]) + 1  # where an occurrence of the last token ends
        best = 0
        for tail in range(1, min(self.longest, len(ids) - 1) + 1):
            found = found[(found >= tail) & (ids[found - tail] == ids[-tail])]
            if not len(found):
                break
            best = int(found[-1]) if tail >= self.shortest else 0
        # What repeats itself right up to the end goes round once more.
        return np.resize(ids[best:], count).tolist() if best else []
