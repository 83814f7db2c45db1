"""What `LLM` and `AsyncLLM` have in common: how they come about, and what they tell of their model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import torch

from ..chat.messages import Conversation, Prompt
from ..chat.tokenizer import Tokenizer
from ..config import ModelConfig
from .front import Front, Tools
from .loading import Loaded, load
from .prepare import prepare


class Face(ABC):
    """A loaded model behind a `Front`.

    Args:
        model: a folder, a GGUF file, a repository in the Hugging Face cache, a short name like `E2B`, or
            `random:E2B?layers=4&seed=1` for calm random weights; None for the bundled demonstration model.
        device: `auto`, `cpu`, `cuda`, `mps`.
        dtype: `auto` (as the checkpoint was saved), `bfloat16`, `float32`, ...
        max_model_len: context in tokens, prompt and reply together; None: as much as the model has and fits.
        quantization: int8 or int4 rounds the matrices while they are loaded, None leaves them as they are stored;
            `auto` takes the finest that fits into the memory which is free, with the context and seats that then fit.
        drafter: a checkpoint that guesses next tokens, which the model then need not find one by one: the assistant
            that was published with the model, or `auto` for the one in its folder; or `ngram`, which needs none and
            guesses that a text which repeats itself goes on as before. Replies stay the same.
        media: the kinds (image, video, audio) that it will be shown, `()` for text only; None: all that it takes.
            Towers that none of them needs are not loaded.
        engine_options: see `Front` and `engine.options.EngineOptions`.
    """

    front: Front

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        max_model_len: int | None = None,
        quantization: str | None = None,
        drafter: str | Path | None = None,
        media: Collection[str] | None = None,
        **engine_options: Any,
    ) -> None:
        if quantization == "auto":
            name = str(dtype).removeprefix("torch.")
            begin = prepare(
                model,
                device,
                dtype=name,
                max_model_len=max_model_len,
                engine=engine_options,
                drafter=drafter,
                media=media,
            )
            quantization, max_model_len = begin.quantization, begin.context
            room = {"max_num_seqs": begin.users, "kv_cache_memory_bytes": begin.cache_bytes}
            engine_options = room | engine_options
        loaded = load(model, device, dtype, quantization=quantization, drafter=drafter, media=media)
        self._start(Front(loaded, max_model_len=max_model_len, **engine_options))

    @classmethod
    def of(cls, loaded: Loaded, *, max_model_len: int | None = None, **engine_options: Any) -> Self:
        """One around a network that is in memory already, for example one that is being trained."""
        self = cls.__new__(cls)
        self._start(Front(loaded, max_model_len=max_model_len, **engine_options))
        return self

    @abstractmethod
    def _start(self, front: Front) -> None:
        """Take over `front`, whose engine nobody else will run."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.front.name

    @property
    def config(self) -> ModelConfig:
        return self.front.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a checkpoint that serves token ids only."""
        return self.front.tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its reply together."""
        return self.front.max_model_len

    def render(
        self,
        messages: Conversation,
        *,
        tools: Tools | None = None,
        thinking: bool | None = None,
        preserve_thinking: bool = False,
    ) -> Prompt:
        """A conversation as token ids; media parts are still single placeholders."""
        return self.front.render(messages, tools=tools, thinking=thinking, preserve_thinking=preserve_thinking)
