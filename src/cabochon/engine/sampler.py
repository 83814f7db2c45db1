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
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RequestError
from ..ops import largest
from .request import TokenLogprob
from .track import Track

NARROW = 1024
"""Rows that need more candidates than this are sorted whole, which is slow."""


@dataclass(slots=True)
class Drawn:
    """One row's token, or the reason why there is none."""

    token: int
    logprob: TokenLogprob | None = None
    error: str | RequestError | None = None


def draw(logits: Tensor, tracks: list[Track], suppress: Tensor | None = None) -> list[Drawn]:
    """One token for each row of `logits` [L, V], which may be written to; `suppress` [n] ids are never drawn."""
    scored = [i for i, track in enumerate(tracks) if track.request.params.logprobs is not None]
    raw = logits[scored] if scored else None
    if suppress is not None:
        logits[:, suppress] = -torch.inf
    errors = {i: error for i, track in enumerate(tracks) if (error := _adjust(logits[i], track))}
    ids, best = _choose(logits, tracks)
    out = []
    for i in range(len(tracks)):
        error = errors.get(i)
        if error is None and not math.isfinite(best[i]):
            stuck = best[i] == -math.inf
            error = "Every token is forbidden here." if stuck else "The logits of this request are not numbers."
        out.append(Drawn(ids[i], error=error))
    if raw is not None:
        tops = [tracks[i].request.params.logprobs or 0 for i in scored]
        for i, entry in zip(scored, score(raw, [ids[i] for i in scored], tops), strict=True):
            out[i].logprob = entry
    return out


def _choose(logits: Tensor, tracks: list[Track]) -> tuple[list[int], list[float]]:
    """The rows' tokens and their largest logits; reading them is the step's only wait for the device."""
    sampled = [i for i, track in enumerate(tracks) if track.request.params.temperature]
    if len(sampled) == len(tracks):
        token, best = _sample(logits, tracks)
    else:
        best, token = (column[:, 0] for column in largest(logits, 1))
        if sampled:
            at = torch.tensor(sampled, device=logits.device)
            token[at] = _sample(logits[at], [tracks[i] for i in sampled])[0]
    both = torch.stack([token.double(), best.double()]).tolist()
    return [int(t) for t in both[0]], both[1]


def score(logits: Tensor, tokens: list[int], tops: list[int]) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` [L] under untouched `logits` [L, V], each with its `tops` best alternatives."""
    norm = logits.logsumexp(-1)
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0] - norm
    most = max(tops, default=0)
    values, ids = largest(logits, most) if most else (logits[:, :0], torch.zeros(0, dtype=torch.long))
    pairs = zip(own.tolist(), (values - norm[:, None]).tolist(), ids.tolist() or [[]] * len(tokens), strict=True)
    return [
        TokenLogprob(token, mine, tuple(zip(alternatives[:top], logprobs[:top], strict=True)))
        for token, top, (mine, logprobs, alternatives) in zip(tokens, tops, pairs, strict=True)
    ]


# Penalties, bias, constraint ------------------------------------------------------------------------------------------


def _adjust(row: Tensor, track: Track) -> str | RequestError | None:
    """Apply what concerns one row alone, in place; why its constraint failed, if it did."""
    params = track.request.params
    if params.repetition_penalty is not None and params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(track.ids)).to(row.device)
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


def uniforms(seeds: NDArray[np.uint64], places: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) per row from its seed and place: the SplitMix64 finaliser (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = seeds + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    numbers: NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _sample(logits: Tensor, tracks: list[Track]) -> tuple[Tensor, Tensor]:
    """A token for each row [L, V] -> [L] int64, and the row's largest logit [L]."""
    params = [track.request.params for track in tracks]
    seeds = np.fromiter((track.seed for track in tracks), np.uint64, len(tracks))
    places = np.fromiter((track.generated for track in tracks), np.uint64, len(tracks))
    vocab = logits.shape[-1]
    top_k = [p.top_k if p.top_k and p.top_k < vocab else vocab for p in params]
    columns = [
        uniforms(seeds, places).tolist(),
        [p.temperature or 0.0 for p in params],
        top_k,
        [1.0 if p.top_p is None else p.top_p for p in params],
        [p.min_p or 0.0 for p in params],
    ]
    settings = torch.tensor(columns, dtype=torch.float64).to(logits.device)
    wide = [i for i, k in enumerate(top_k) if k > NARROW]
    narrow = [i for i, k in enumerate(top_k) if k <= NARROW]
    if not wide:
        values, ids = largest(logits, max(top_k))
        return _pick(values, ids, settings), values[:, 0]
    token = torch.empty(len(tracks), dtype=torch.long, device=logits.device)
    best = torch.empty(len(tracks), dtype=logits.dtype, device=logits.device)
    if narrow:
        values, ids = largest(logits[narrow], max(top_k[i] for i in narrow))
        token[narrow], best[narrow] = _pick(values, ids, settings[:, narrow]), values[:, 0]
    for i in wide:
        row = logits[i : i + 1]
        values, ids = largest(row, NARROW)
        if not _enough(row, values, settings[:, i]):
            values, ids = largest(row, vocab)
        token[i], best[i] = _pick(values, ids, settings[:, i : i + 1])[0], values[0, 0]
    return token, best


def _enough(row: Tensor, values: Tensor, settings: Tensor) -> bool:
    """Do top-p or min-p end within the candidates `values` [1, k], whatever the rest of the row is like?"""
    if values.shape[-1] == row.shape[-1]:
        return True
    _, temperature, top_k, top_p, min_p = settings.tolist()
    top = values[0, 0].double()
    mass = ((values.double() - top) / temperature).exp()
    total = ((row.double() - top) / temperature).exp().sum()
    by_top_p = top_k >= row.shape[-1] and bool(mass.sum() >= top_p * total) and top_p < 1
    return by_top_p or bool(mass[0, -1] < min_p)


def _pick(values: Tensor, ids: Tensor, settings: Tensor) -> Tensor:
    """Draw from candidates `values` [L, k] in descending order, `settings` [5, L] -> ids [L]."""
    uniform, temperature, top_k, top_p, min_p = (row[:, None] for row in settings)
    mass = ((values.double() - values[:, :1].double()) / temperature).exp()  # the best has 1
    place = torch.arange(values.shape[-1], device=values.device)
    mass = mass * (place < top_k)
    total = mass.cumsum(-1)
    kept = (total - mass < top_p * total[:, -1:]) & (mass >= min_p) & (mass > 0)
    # Candidates descend, so those kept come first; the sum up to the last of them is the mass to draw from.
    reach = (mass * kept).cumsum(-1)
    chosen = (reach <= uniform * reach[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(1, chosen.clamp_max(values.shape[-1] - 1))[:, 0]
