"""From logits to tokens, for all rows of a step at once.

Order, as the reference has it: penalties, bias and constraint, temperature, top-k, top-p, min-p. A row's draw depends
on its logits, its parameters, its seed and the place in its reply, and on nothing else: one uniform number per token
comes from a hash of seed and place, and picks from the cumulated probabilities in descending order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import RequestError
from .request import TokenLogprob
from .track import Track

WORD = 2**64 - 1


@dataclass(slots=True)
class Drawn:
    """One row's token, or the reason why there is none."""

    token: int
    logprob: TokenLogprob | None = None
    error: str | RequestError | None = None


def draw(logits: Tensor, tracks: list[Track], suppress: Tensor | None = None) -> list[Drawn]:
    """One token for each row of `logits` [L, V], which may be written to; `suppress` [n] ids are never drawn."""
    scored = [i for i, track in enumerate(tracks) if track.request.params.logprobs is not None]
    adjusted = [i for i, track in enumerate(tracks) if _adjusted(track)]
    untouched = suppress is None and not adjusted and len(scored) == len(tracks)
    raw = logits if untouched or not scored else logits[scored]
    if suppress is not None:
        logits[:, suppress] = -torch.inf
    errors = {i: error for i in adjusted if (error := _adjust(logits[i], tracks[i]))}
    token, largest = ops.draw(logits, _settings(tracks, logits.shape[-1]))
    ids, best = token.tolist(), largest.tolist()  # the step's only wait for the device
    out = []
    for i in range(len(tracks)):
        error = errors.get(i)
        if error is None and not math.isfinite(best[i]):
            stuck = best[i] == -math.inf
            error = "Every token is forbidden here." if stuck else "The logits of this request are not numbers."
        out.append(Drawn(ids[i], error=error))
    if scored:
        tops = [tracks[i].request.params.logprobs or 0 for i in scored]
        for i, entry in zip(scored, score(raw, [ids[i] for i in scored], tops), strict=True):
            out[i].logprob = entry
    return out


def score(logits: Tensor, tokens: list[int], tops: list[int]) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` [L] under untouched `logits` [L, V], each with its `tops` best alternatives."""
    norm = ops.log_sum(logits)
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0] - norm
    most = max(tops, default=0)
    values, ids = ops.largest(logits, most) if most else (logits[:, :0], torch.zeros(0, dtype=torch.long))
    pairs = zip(own.tolist(), (values - norm[:, None]).tolist(), ids.tolist() or [[]] * len(tokens), strict=True)
    return [
        TokenLogprob(token, mine, tuple(zip(alternatives[:top], logprobs[:top], strict=True)))
        for token, top, (mine, logprobs, alternatives) in zip(tokens, tops, pairs, strict=True)
    ]


# Penalties, bias, constraint ------------------------------------------------------------------------------------------


def _adjusted(track: Track) -> bool:
    """Is there anything for `_adjust` to do?"""
    params = track.request.params
    penalties = params.presence_penalty or params.frequency_penalty or (params.repetition_penalty or 1.0) != 1.0
    return bool(penalties or params.logit_bias or track.constraint is not None)


def _adjust(row: Tensor, track: Track) -> str | RequestError | None:
    """Apply what concerns one row alone, in place; why its constraint failed, if it did."""
    params = track.request.params
    if params.repetition_penalty is not None and params.repetition_penalty != 1.0:
        seen = torch.from_numpy(track.ids).to(row.device)  # a token that came twice gets the same value twice
        value = row[seen]
        row[seen] = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        tokens, counts = np.unique(track.ids[track.prompt_length :], return_counts=True)
        if len(tokens):
            amount = params.presence_penalty + params.frequency_penalty * counts
            row[torch.from_numpy(tokens).to(row.device)] -= torch.from_numpy(amount).to(row)
    if params.logit_bias:
        at = torch.tensor(list(params.logit_bias), device=row.device)
        row[at] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
    if track.constraint is not None:
        try:
            track.constraint.mask(row)
        except RequestError as error:
            return error
        except Exception as error:  # whatever a foreign object raises must end this request only
            return f"The constraint of this request failed: {error}"
    return None


# Drawing --------------------------------------------------------------------------------------------------------------


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) from seed and place: the SplitMix64 finaliser (Steele, Lea, Flood 2014)."""
    x = (seed + (place + 1) * 0x9E3779B97F4A7C15) & WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


def _settings(tracks: list[Track], vocab: int) -> Tensor:
    """What `ops.draw` wants to know of each track: [5, L] float64. To take the best is to draw from one candidate."""
    rows = [
        (
            uniform(track.seed, track.generated),
            p.temperature,
            p.top_k or vocab,
            1.0 if p.top_p is None else p.top_p,
            p.min_p or 0.0,
        )
        if p.temperature
        else (0.0, 1.0, 1, 1.0, 0.0)
        for track in tracks
        for p in (track.request.params,)
    ]
    return torch.tensor(rows, dtype=torch.float64).T
