"""`transformers` on the same weights and prompts, for `cabochon bench --baseline transformers`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..hub import locate
from ..weights.load import save
from ..weights.random import is_random

if TYPE_CHECKING:
    from ..llm import LLM


def seconds(model: str | None, llm: LLM, prompts: list[list[int]], length: int) -> float:
    """Seconds of `generate` for all prompts in one batch, in the type and on the device of `llm`; warmed up."""
    try:
        from transformers import AutoModelForImageTextToText
    except ImportError:
        raise InputError("--baseline transformers needs that library: pip install transformers") from None
    network = llm.front.engine.runner.model
    weight = network.language_model.norm.weight
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if model is not None and is_random(model):
            save(folder, network, llm.front.config)
        else:
            folder = locate(model)
        theirs: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=weight.dtype)  # in eval mode
    theirs.to(str(weight.device))
    ids = torch.tensor(prompts, device=weight.device)

    def run(new: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=64,
                top_p=0.95,
                pad_token_id=0,
            ).cpu()
        return time.perf_counter() - begin

    run(2)
    return run(length)
