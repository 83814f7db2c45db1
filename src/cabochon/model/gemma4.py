"""The whole model. Attribute names are the checkpoint's without the leading `model.`."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import ModelConfig
from .batch import Batch
from .text import Text


class Gemma4(nn.Module):
    """Text in every size; towers where the config has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = Text(config.text)

    def forward(self, batch: Batch) -> Tensor:
        """The logits [L, V] float32 of the rows that `batch` wants."""
        return self.language_model.logits(self.language_model.hidden(batch))
