"""`transformers` on the same weights and prompts, for `cabochon bench --baseline transformers`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..hub import locate
from ..weights.load import save
from ..weights.random import is_random

if TYPE_CHECKING:
    from ..llm import LLM


class Transformers:
    """The weights of `llm` in the network of `transformers`, in the same type and on the same device."""

    def __init__(self, model: str | None, llm: LLM) -> None:
        try:
            from transformers import AutoModelForImageTextToText
        except ImportError:
            raise InputError("--baseline transformers needs that library: pip install transformers") from None
        ours = llm.front.engine.runner.model
        weight = ours.language_model.norm.weight
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if model is not None and is_random(model):
                save(folder, ours, llm.front.config)
            else:
                folder = locate(model)
            theirs: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=weight.dtype)  # in eval mode
        self.network = theirs.to(str(weight.device))
        self.device = weight.device

    def together(self, prompts: list[list[int]], length: int) -> float:
        """Seconds until all prompts, one batch, have replies of `length` tokens; warmed up."""
        self._generate(prompts, 2)
        begin = time.perf_counter()
        self._generate(prompts, length)
        return time.perf_counter() - begin

    def in_turn(self, arrivals: Sequence[tuple[float, list[int], int]]) -> tuple[list[float], float]:
        """Play arrivals (second, prompt, reply length) in real time, one after another as `generate` serves them.

        Returns each one's seconds to the first token, and the seconds in all.
        """
        self._generate([arrivals[0][1]], 2)
        begin, first = time.perf_counter(), []
        for at, prompt, length in arrivals:
            time.sleep(max(0.0, at + begin - time.perf_counter()))
            ticks = Ticks()
            self._generate([prompt], length, ticks)
            first.append(ticks.times[1] - begin - at)  # the prompt itself comes first
        return first, time.perf_counter() - begin

    def _generate(self, prompts: list[list[int]], length: int, streamer: Ticks | None = None) -> None:
        ids = torch.tensor(prompts, device=self.device)
        with torch.inference_mode():
            self.network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=True,
                temperature=1.0,
                top_k=64,
                top_p=0.95,
                pad_token_id=0,
                streamer=streamer,
            ).cpu()


class Ticks:
    """When `generate` handed out what."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""
