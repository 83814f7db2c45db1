"""Runs the model on a batch. The only place between scheduler and sampler that touches the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.batch import Batch
from ..model.gemma4 import Gemma4
from .request import SoftSpan


class Runner:
    """A model on its device. `encoded` media features are kept so that a prompt's chunks share one run of the tower."""

    def __init__(self, model: Gemma4, device: torch.device, *, encoder_cache: int = 16) -> None:
        self.model = model
        self.device = device
        self._encoded: OrderedDict[bytes, Tensor] = OrderedDict()
        self._encoder_cache = encoder_cache

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """The wanted rows' logits [L, V] float32 (float64 for a float64 model)."""
        logits: Tensor = self.model(batch)
        return logits

    @torch.inference_mode()
    def encode(self, spans: Sequence[SoftSpan]) -> list[Tensor]:
        """The soft tokens [length, D] of every span."""
        new = {span.key: span for span in spans if span.key not in self._encoded}
        fresh = self.model.encode([span.item for span in new.values()])
        known = {span.key: self._encoded[span.key] for span in spans if span.key not in new}
        known |= zip(new, fresh, strict=True)
        for key, features in known.items():
            self._encoded[key] = features
            self._encoded.move_to_end(key)
        while len(self._encoded) > self._encoder_cache:
            self._encoded.popitem(last=False)
        return [known[span.key] for span in spans]
