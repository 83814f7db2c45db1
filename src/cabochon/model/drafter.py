"""The drafter of multi-token prediction: four small layers that guess the tokens after the last one.

Unusual: it has no keys and values. Its sliding layers read the rows that the target's last sliding owner stored, its
global layer those of the last global owner, so a burst of guesses stores nothing, advances nothing, and asks from one
place: the position of the newest token, which the target has not read yet.

On sliding layers a guess sees the last `window` stored rows. (The reference implementation's mask lets one more through
where its cache still holds it; a guess gets no better or worse by that, and no page has to be kept for it.)

Letters: Q query rows (one per request when serving), D the drafter's width, B the target's, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..config import READS_TARGET, DrafterConfig, Kind, ModelConfig
from ..ops.views import Pages, Past, Rows, View
from .decoder import Angles, Layer, angles_by_kind
from .fused import Step, run_layers
from .layers import Embedding, Linear, RMSNorm
from .text import Text


@dataclass(slots=True)
class Stored:
    """What a drafter sees of its target: rows of this step, pages of what came before, or both."""

    rows: Rows
    """`position` [Q] is the last stored token of each request; the newest token stands one place further."""
    start: Tensor
    """[R + 1] int32, request r owns rows start[r] .. of `step`."""
    context: Tensor
    """[R] int32, tokens of each request that lie in pages."""
    step: Mapping[Kind, Tensor]
    """[T, K, W] of the target's last owner of each kind; T may be 0."""
    pages: Mapping[Kind, Pages] = field(default_factory=dict)
    past: Mapping[Kind, Past] = field(default_factory=dict)
    k_weight: Mapping[Kind, Tensor] = field(default_factory=dict)
    """The key norm's weight of the owner, for targets whose value is the key (see `Attention.queries`)."""

    def view(self, kind: Kind) -> View:
        return View(self.rows, self.start, self.context, self.pages.get(kind), self.past.get(kind))


class OrderedEmbedding(nn.Module):
    """A head in two steps: the nearest clusters of tokens, then only the tokens in them."""

    token_ordering: Tensor

    def __init__(self, config: DrafterConfig, vocab_size: int, width: int) -> None:
        super().__init__()
        self.nearest = config.centroid_intermediate_top_k
        self.centroids = Linear(width, config.num_centroids)
        self.register_buffer("token_ordering", torch.zeros(vocab_size, dtype=torch.long))

    def candidates(self, x: Tensor, table: ops.Weight) -> tuple[Tensor, Tensor]:
        """[Q, D] -> token ids [Q, C] of the nearest clusters, and their logits [Q, C]."""
        scores = ops.head(x, self.centroids.weight, None)
        clusters = self.token_ordering.view(scores.shape[-1], -1)
        places = ops.largest(scores, self.nearest)[1]
        # Indexing would wake a team of torch's threads, which then stay awake for a while and hold up the kernels'.
        ids = clusters.index_select(0, places.flatten()).view(len(x), -1)
        return ids, ops.head_at(x, table, ids)


class Drafter(nn.Module):
    """An assistant checkpoint. Attribute names are its file's without the leading `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.drafter is not None
        text, width, backbone = config.text, config.text.hidden_size, config.drafter.backbone_hidden_size
        self.config = config
        self.embed_tokens = Embedding(text.vocab_size, width)
        self.layers = cast(Sequence[Layer], nn.ModuleList(Layer(s, width, text.rms_norm_eps) for s in text.layers))
        self.norm = RMSNorm(width, text.rms_norm_eps)
        self.pre_projection = Linear(2 * backbone, width, wide=True)
        self.post_projection = Linear(width, backbone)
        self.masked_embedding: OrderedEmbedding | None = None
        if config.drafter.use_ordered_embeddings:
            self.masked_embedding = OrderedEmbedding(config.drafter, text.vocab_size, width)

    def forward(self, embedded: Tensor, hidden: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
        """The scaled embeddings of the newest tokens and the hidden states before them, each [Q, B].

        The first guess takes the target's normed hidden state of the last stored token, later ones the second result
        of the one before. Returns the normed state [Q, D] for `logits`, and the hidden state [Q, B] for the next guess.
        """
        return self._run(embedded, hidden, stored, self._angles(stored))

    def _run(
        self, embedded: Tensor, hidden: Tensor, stored: Stored, angles: Mapping[Kind, Angles]
    ) -> tuple[Tensor, Tensor]:
        x = self.pre_projection(torch.cat([embedded, hidden], -1))
        for kind, layers in groupby(self.layers, lambda layer: layer.spec.kind):
            rows = stored.step[kind]
            step = Step(
                rows.shape[0], lambda spec: stored.view(spec.kind), angles, lambda spec: stored.k_weight.get(spec.kind)
            )
            step.rows[READS_TARGET] = rows
            x = run_layers(tuple(layers), x, None, step)
        x = self.norm(x)
        return x, self.post_projection(x)

    def _angles(self, stored: Stored) -> dict[Kind, Angles]:
        """All guesses of a burst ask from one place."""
        return angles_by_kind(self.config.text.layers, stored.rows.position + 1)

    def logits(self, x: Tensor) -> Tensor:
        """[Q, D] -> [Q, V]; tokens outside the nearest clusters get one less than the least of those inside."""
        table = self.embed_tokens.weight
        if self.masked_embedding is None:
            return ops.head(x, table, None)
        ids, scores = self.masked_embedding.candidates(x, table)
        out = (scores.amin(-1, keepdim=True) - 1.0).expand(-1, table.shape[0])
        return out.scatter(-1, ids, scores)

    def likeliest(self, x: Tensor) -> Tensor:
        """[Q, D] -> token ids [Q]."""
        table = self.embed_tokens.weight
        if self.masked_embedding is None:
            return ops.largest(ops.head(x, table, None), 1)[1].squeeze(-1)
        ids, scores = self.masked_embedding.candidates(x, table)
        return ids.gather(-1, ops.largest(scores, 1)[1]).squeeze(-1)

    def burst(self, target: Text, newest: Tensor, hidden: Tensor, stored: Stored, count: int) -> Tensor:
        """`count` greedy guesses [Q, count] after the `newest` tokens [Q]; `hidden` [Q, B] as in `forward`."""
        scale, guesses = math.sqrt(target.config.hidden_size), []
        angles = self._angles(stored)
        for _ in range(count):
            x, hidden = self._run(target.embed_tokens(newest, scale), hidden, stored, angles)
            newest = self.likeliest(x)
            guesses.append(newest)
        return torch.stack(guesses, -1)
