"""Runs the model on a batch. The only place between scheduler and sampler that touches the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.batch import Batch
from ..model.gemma4 import Gemma4
from .graphs import Recorder, takes


class Runner:
    """A model on its device; `record`: decode steps are replayed from CUDA graphs where there is CUDA."""

    def __init__(self, model: Gemma4, device: torch.device, *, record: bool = False) -> None:
        self.model = model
        self.device = device
        self.recorder = Recorder(model.step) if record and device.type == "cuda" else None

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The wanted rows' logits [L, V] float32 (float64 for a float64 model) and hidden states [L, D]."""
        if self.recorder is not None and takes(batch):
            return self.recorder.run(batch)
        return self.model.step(batch)
