"""Drawing tokens from logits in plain torch, in any dtype and on any device: the definition for `csrc/draw.h`.

Temperature, top-k, top-p, min-p, in this order. A row's uniform number picks from the cumulated masses in descending
order; all masses are in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import largest

NARROW = 1024
"""Rows that need more candidates are sorted apart from the others, which is slow."""


def draw(logits: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of `logits` [L, V] -> ids [L] int64, and the rows' largest logits [L].

    `settings` [5, L] float64, on the host: a uniform number in [0, 1), temperature above 0, top-k of at least 1, top-p,
    min-p. The token means nothing where the largest logit is not finite.
    """
    top_k = settings[2].clamp_max(logits.shape[-1])
    wide = top_k > NARROW
    if wide.any() and not wide.all():
        token = torch.empty(len(wide), dtype=torch.long, device=logits.device)
        best = torch.empty(len(wide), dtype=logits.dtype, device=logits.device)
        for some in (wide, ~wide):
            token[some], best[some] = draw(logits[some], settings[:, some])
        return token, best
    values, ids = largest(logits, int(top_k.max()))
    return _pick(values, ids, settings.to(logits.device)), values[:, 0]


def log_sum(x: Tensor) -> Tensor:
    """ln(sum(e^x)) of the rows of `x` [L, V] -> [L]."""
    return x.logsumexp(-1)


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
