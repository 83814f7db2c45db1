"""The reference implementation, in the state in which it can be trusted, made fresh or loaded from a folder.

Its traps: constants are rounded to the config's dtype when the module is made, however it is cast later; and float64
needs the plain loop over experts.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma4 import Gemma4ForConditionalGeneration
from transformers.models.gemma4_unified import Gemma4UnifiedForConditionalGeneration

from .toys import calm_, toy_json, with_dtype


def reference(size: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, **text: Any) -> PreTrainedModel:
    """The reference network for `toy_json(size, **text)` with the toy's calm weights."""
    raw = with_dtype(toy_json(size, **text), dtype)
    kind = _class_of(raw)
    model = kind(kind.config_class.from_dict(raw)).to(dtype).eval()
    model.set_experts_implementation("eager")
    calm_(model, seed)
    return model


def load_reference(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The reference network with the weights of a checkpoint folder."""
    kind = _class_of(json.loads((folder / "config.json").read_text()))
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def reference_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """[T, V] of one text sequence."""
    return model(torch.tensor([ids])).logits[0]


@cache
def oracle(size: str, dtype: torch.dtype = torch.float64, *, media: bool = False) -> PreTrainedModel:
    """One `reference` for all tests of a process, which therefore leave it as it is."""
    return reference(size, dtype, media=media)


def oracle_logits(size: str, ids: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """[T, V] in `dtype`."""
    return reference_logits(oracle(size, dtype), ids)


def _class_of(raw: dict[str, Any]) -> type[PreTrainedModel]:
    unified = raw["model_type"] == "gemma4_unified"
    return Gemma4UnifiedForConditionalGeneration if unified else Gemma4ForConditionalGeneration
