"""The text network: one implementation that trains and serves.

Unusual here: tokens are packed [T, D] without a batch axis; attention reads the step's own keys and values plus pages
of what came before, so training is simply the case without pages; layers that share keys and values are handed those of
their source by data flow, and run only for the rows whose logits somebody wants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from .. import ops
from ..config import Kind, LayerSpec, TextConfig
from .batch import Batch
from .decoder import Layer, angles_by_kind
from .fused import Step, neighbours, run_layers
from .layers import Embedding, Linear, RMSNorm


class Text(nn.Module):
    """Embedding, layers, final norm and the head, which is the embedding again unless the config has them apart."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, width)
        self.layers = cast(Sequence[Layer], nn.ModuleList(Layer(spec, width, eps) for spec in config.layers))
        self.norm = RMSNorm(width, eps)
        self.lm_head = None if config.tied else Linear(width, config.vocab_size)
        self.last_reader = {spec.reads_kv_of: spec.index for spec in config.layers}
        self.parts = [slice(part[0].spec.index, part[-1].spec.index + 1) for part in neighbours(self.layers)]
        self.ple_width = config.hidden_size_per_layer_input
        if self.ple_width:
            self.embed_tokens_per_layer = Embedding(
                config.vocab_size_per_layer_input, len(config.layers) * self.ple_width
            )
            self.per_layer_model_projection = Linear(width, len(config.layers) * self.ple_width, wide=True)
            self.per_layer_projection_norm = RMSNorm(self.ple_width, eps)

    def embed(self, batch: Batch) -> Tensor:
        """The residual stream before the first layer [T, D]; soft tokens take their places unscaled."""
        kind = ops.widened(self.norm.weight.dtype)
        x = self.embed_tokens(batch.token_ids, math.sqrt(self.config.hidden_size), kind)
        if batch.soft is not None:
            x = x.index_copy(0, batch.soft.index, batch.soft.features.to(x.dtype))
        return x

    def per_layer_inputs(self, x: Tensor, batch: Batch) -> Tensor | None:
        """[T, layers, ple_width]; soft tokens count as padding in the table."""
        if not self.ple_width:
            return None
        ids = batch.token_ids if batch.soft is None else batch.token_ids.index_fill(0, batch.soft.index, 0)
        token = self.embed_tokens_per_layer(ids, math.sqrt(self.ple_width))
        shape, norm = (len(self.layers), self.ple_width), self.per_layer_projection_norm
        context = self.per_layer_model_projection(x.to(token.dtype)).unflatten(-1, shape)
        return ops.per_layer_inputs(
            context, token.unflatten(-1, shape), norm.weight, norm.eps, self.config.hidden_size**-0.5
        )

    def hidden(self, batch: Batch, kept: dict[Kind, Tensor] | None = None) -> Tensor:
        """The normed hidden state of every wanted row: [L, D].

        `kept` gets what the last owner of each kind stores of this step's tokens [T, K, W]: what a drafter reads.
        """
        x = self.embed(batch)
        ple = self.per_layer_inputs(x, batch)
        layers, skip = tuple(self.layers), False
        angles = angles_by_kind(self.config.layers, batch.rows.position)
        step = Step(batch.tokens, partial(batch.view, skip=False), angles, self._k_weight)
        step.last_reader, step.kept = self.last_reader, kept
        for part in self.parts:
            if not layers[part.start].spec.owns_kv and not skip and batch.tail.index is not None:
                x = x[batch.tail.index]
                ple = None if ple is None else ple[batch.tail.index]
                step.angles = angles_by_kind(self.config.layers, batch.tail.position)
                step.see, skip = partial(batch.view, skip=True), True
            x = run_layers(layers[part], x, None if ple is None else ple[:, part], step)
        if batch.tail.index is not None and not skip:
            x = x[batch.tail.index]
        return self.norm(x if batch.wanted is None else x[batch.wanted])

    def _k_weight(self, spec: LayerSpec) -> Tensor | None:
        return self.layers[spec.reads_kv_of].self_attn.k_norm.weight if spec.k_eq_v else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, D] -> [L, V] float32."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return ops.head(hidden, head.weight, self.config.final_logit_softcapping)
