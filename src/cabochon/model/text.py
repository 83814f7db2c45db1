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
from ..config import Kind, TextConfig
from .batch import Batch
from .decoder import Layer, angles_by_kind, residual_type
from .fused import Calls, run_layer
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
        self.ple_width = config.hidden_size_per_layer_input
        if self.ple_width:
            self.embed_tokens_per_layer = Embedding(
                config.vocab_size_per_layer_input, len(config.layers) * self.ple_width
            )
            self.per_layer_model_projection = Linear(width, len(config.layers) * self.ple_width)
            self.per_layer_projection_norm = RMSNorm(self.ple_width, eps)

    def embed(self, batch: Batch) -> Tensor:
        """The residual stream before the first layer [T, D]; soft tokens take their places unscaled."""
        kind = residual_type(self.norm.weight.dtype)
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
        x, kind = self.embed(batch), self.norm.weight.dtype
        ple = self.per_layer_inputs(x, batch)
        angles = angles_by_kind(self.config.layers, batch.rows.position, kind)
        step: dict[int, Tensor] = {}
        calls, skip = Calls(), False
        for i, layer in enumerate(self.layers):
            spec = layer.spec
            if not spec.owns_kv and not skip and batch.tail.index is not None:
                calls.make()
                x = x[batch.tail.index]
                ple = None if ple is None else ple[batch.tail.index]
                angles = angles_by_kind(self.config.layers, batch.tail.position, kind)
                skip = True
            of_layer = None if ple is None else ple[:, i]
            k_weight = self.layers[spec.reads_kv_of].self_attn.k_norm.weight if spec.k_eq_v else None
            x = run_layer(calls, layer, x, of_layer, step, batch.view(spec, skip), angles[spec.kind], k_weight)
            if self.last_reader[spec.reads_kv_of] == i:
                rows = step.pop(spec.reads_kv_of)
                calls.then(partial(self._store, spec.reads_kv_of, spec.kind, rows, batch))
                if kept is not None:
                    kept[spec.kind] = rows
        calls.make()
        if batch.tail.index is not None and not skip:
            x = x[batch.tail.index]
        return self.norm(x if batch.wanted is None else x[batch.wanted])

    def _store(self, index: int, kind: Kind, rows: Tensor, batch: Batch) -> None:
        # Only now: new rows may lie in the slots of rows that leave the window, which every reader had to see first.
        if index in batch.pages:
            ops.store(batch.pages[index], rows, batch.past[kind].slots)

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, D] -> [L, V] float32."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return ops.head(hidden, head.weight, self.config.final_logit_softcapping)
