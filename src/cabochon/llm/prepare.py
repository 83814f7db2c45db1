"""Before a model is loaded: does it fit, in which format, with how much room for conversations."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import hub, modelfile
from ..config import ModelConfig
from ..errors import InputError
from ..formats import QUANTIZED
from ..sizing import Hardware, Start, hardware, start
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.params import own_format
from ..weights.random import is_random, open_random
from .loading import check_media, open_drafter, pick_device, pick_dtype


def prepare(
    model: str | Path | None,
    device: str = "auto",
    *,
    dtype: str = "auto",
    quantization: str = "auto",
    max_model_len: int | None = None,
    engine: dict[str, Any] | None = None,
    drafter: str | Path | None = None,
    media: Collection[str] | None = None,
) -> Start:
    """What to load and how, from what was asked for and what is free. `engine` holds options that the user set.

    `drafter` and `media` are as `load` takes them.

    Raises:
        InputError: it can't fit; the message has the numbers and what would help.
    """
    formats = {"auto": (None, *QUANTIZED), "none": (None,)} | {name: (name,) for name in QUANTIZED}
    if quantization not in formats:
        raise InputError(f"quantization is {quantization!r}, but must be one of {', '.join(formats)}.")
    pick_dtype(dtype)
    config, name, kept, folder = _config(model)
    check_media(media)
    if media is not None:
        config = config.taking(media)
    recipe = modelfile.made(model) if isinstance(model, str) else None
    if max_model_len is None and recipe is not None and "num_ctx" in recipe.parameters:
        max_model_len = int(recipe.parameters["num_ctx"])
    wishes = engine or {}
    pair = open_drafter(drafter, config, folder)
    return start(
        config,
        _device(device, wishes.get("gpu_memory_utilization")),
        name=name,
        drafter=pair.config if isinstance(pair, Checkpoint) else None,
        dtype=None if dtype == "auto" else dtype,
        formats=(stored,) if (stored := own_format(config)) else formats[quantization],
        kept=kept,
        context=max_model_len,
        users=wishes.get("max_num_seqs"),
        kv_cache_dtype=wishes.get("kv_cache_dtype", "auto"),
    )


def _config(model: str | Path | None) -> tuple[ModelConfig, str, frozenset[str], Path | None]:
    if isinstance(model, str) and is_random(model):
        return open_random(model)[0], model, frozenset(), None
    path = hub.locate(model)
    opened = open_checkpoint(path)
    return opened.config, path.name, opened.kept, opened.folder


def _device(device: str, share: float | None) -> Hardware:
    """The device with what may be taken of its memory: what is free now, and at most `share` of all there is."""
    there = pick_device(device)
    if share is not None and not 0 < share <= 1:
        raise InputError(f"gpu_memory_utilization is {share:g}, but must be above 0 and at most 1.")
    if there.type != "cuda":
        machine, total = hardware.this_machine(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return replace(machine, memory=min(machine.memory, int((share or 1) * total)))

    free, total = torch.cuda.mem_get_info(there)
    memory = min(free, int((share or 1) * total))
    name = torch.cuda.get_device_name(there)
    try:
        return replace(hardware.find(name), memory=memory)
    except InputError:  # an unknown card: its memory is known, its rates are not
        return Hardware(name, "gpu", memory, 300e9, 50e12, 100e12, "no data for this device: a cautious guess")
