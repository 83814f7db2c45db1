"""The reference implementation around a toy's weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from support.toys import calm_, toy_json, with_dtype


@cache
def oracle(size: str, dtype: torch.dtype = torch.float64, seed: int = 0, media: bool = False) -> nn.Module:
    """`transformers`' network of a toy, with the weights of `toys.toy_model(size, seed=seed, media=media)`."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    raw = with_dtype(toy_json(size, media=media), dtype)
    config = AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the grouped matmul knows no float64
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    network: Any = empty.to_empty(device="cpu")
    network.tie_weights()
    # Buffers that are computed, not stored, have to be computed again after to_empty.
    for module in network.modules():
        if hasattr(network, "_init_weights"):
            network._init_weights(module)
    calm_(network, seed)
    return network.eval()


def oracle_logits(size: str, ids: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """[T, V] in `dtype`."""
    with torch.inference_mode():
        out: Tensor = oracle(size, dtype)(input_ids=torch.tensor([ids])).logits[0]
    return out
