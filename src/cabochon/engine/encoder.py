"""Media spans to features. Every item runs through its tower once; its features are kept until others need the room.

Features are checked here, before they stand in the stream: as many as there are placeholders, finite, none of them
zero. A bad item ends its own request, with a sentence that names it, and nobody else's.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.gemma4 import Gemma4
from .request import SoftSpan

log = logging.getLogger(__name__)

Features = dict[bytes, Tensor]
Faults = dict[bytes, str]


class Encoder:
    """A model's towers behind a cache, least recently used out first, bounded in soft tokens."""

    def __init__(self, model: Gemma4, capacity: int) -> None:
        self.model = model
        self.capacity = capacity
        self.runs = 0
        """Items that went through a tower."""
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._held = 0

    def encode(self, spans: Sequence[SoftSpan]) -> tuple[Features, Faults]:
        """By key: the soft tokens [length, D] of every span, or why it has none."""
        new = {span.key: span for span in spans if span.key not in self._kept}
        features, faults = self._run(list(new.values()))
        for span in spans:
            if span.key in self._kept:
                features[span.key] = self._kept[span.key]
                self._kept.move_to_end(span.key)
        for key in new.keys() & features.keys():
            self._kept[key] = features[key]
            self._held += len(features[key])
        while self._held > self.capacity:
            self._held -= len(self._kept.popitem(last=False)[1])
        return features, faults

    @torch.inference_mode()
    def _run(self, spans: list[SoftSpan]) -> tuple[Features, Faults]:
        """All together; one by one if that fails, to find the culprit."""
        if not spans:
            return {}, {}
        try:
            encoded = self.model.encode([span.item for span in spans])
        except Exception as error:
            if len(spans) == 1:
                log.exception("an encoder failed")
                return {}, {spans[0].key: f"{name(spans[0])} could not be encoded: {error}"}
            apart = [self._run([span]) for span in spans]
            return {k: v for good, _ in apart for k, v in good.items()}, {
                k: v for _, bad in apart for k, v in bad.items()
            }
        self.runs += len(spans)
        features: Features = {}
        faults: Faults = {}
        for span, rows in zip(spans, encoded, strict=True):
            fault = inspect(span, rows)
            if fault:
                faults[span.key] = fault
            else:
                features[span.key] = rows
        return features, faults


def inspect(span: SoftSpan, rows: Tensor) -> str | None:
    """What is wrong with the features of a span."""
    if len(rows) != span.length:
        return f"{name(span)} gave {len(rows)} features for {span.length} placeholders."
    norms = rows.float().norm(dim=-1)
    if not bool(torch.isfinite(norms).all()):
        return f"{name(span)} gave features that are not finite numbers."
    if not bool((norms > 0).all()):
        return f"{name(span)} gave features that are all zero."
    return None


def name(span: SoftSpan) -> str:
    """How a message calls an item."""
    return f"The media item at tokens {span.start} to {span.start + span.length - 1} of the prompt"
