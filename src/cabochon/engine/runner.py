"""Runs the model on a batch. The only place between scheduler and sampler that touches the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.batch import Batch
from ..model.gemma4 import Gemma4


class Runner:
    """A model on its device."""

    def __init__(self, model: Gemma4, device: torch.device) -> None:
        self.model = model
        self.device = device

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """The wanted rows' logits [L, V] float32 (float64 for a float64 model)."""
        logits: Tensor = self.model(batch)
        return logits
