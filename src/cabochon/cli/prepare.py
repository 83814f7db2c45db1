"""Before a model is loaded: does it fit, in which format, with how much room for conversations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import hub
from ..config import ModelConfig
from ..errors import InputError
from ..formats import QUANTIZED
from ..sizing import Hardware, Start, hardware, start


def prepare(
    model: str | None,
    device: str = "auto",
    *,
    dtype: str = "auto",
    quantization: str = "auto",
    max_model_len: int | None = None,
    engine: dict[str, Any] | None = None,
) -> Start:
    """What to load and how, from what was asked for and what is free. `engine` holds options that the user set.

    Raises:
        InputError: it can't fit; the message has the numbers and what would help.
    """
    config, name = _config(model)
    wishes = engine or {}
    stored = config.quantization or {}
    if quantization == "auto" and stored.get("quant_method") == "cabochon":
        quantization = stored["format"]  # matrices stay in the format that our own folders hold
    return start(
        config,
        _device(device),
        name=name,
        dtype=None if dtype == "auto" else dtype,
        formats={"auto": (None, *QUANTIZED), "none": (None,)}.get(quantization, (quantization,)),
        context=max_model_len,
        users=wishes.get("max_num_seqs"),
        kv_cache_dtype=wishes.get("kv_cache_dtype", "auto"),
    )


def _config(model: str | None) -> tuple[ModelConfig, str]:
    from ..weights.checkpoint import open_checkpoint
    from ..weights.random import is_random, open_random

    if model is not None and is_random(model):
        return open_random(model)[0], model
    path = hub.locate(model)
    return open_checkpoint(path).config, path.name


def _device(device: str) -> Hardware:
    """The device with what is free of its memory now."""
    from ..llm.loading import pick_device

    there = pick_device(device)
    if there.type != "cuda":
        return hardware.this_machine()
    import torch

    free, _ = torch.cuda.mem_get_info(there)
    name = torch.cuda.get_device_name(there)
    try:
        return replace(hardware.find(name), memory=free)
    except InputError:  # an unknown card: its memory is known, its rates are not
        return Hardware(name, "gpu", free, 300e9, 50e12, 100e12, "no data for this device: a cautious guess")
