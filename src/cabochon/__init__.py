"""Cabochon runs, serves, sizes, quantises and checks the Gemma 4 models on your own machine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat.events import Event, Reply
    from .chat.messages import Message
    from .engine.request import Completion, SamplingParams
    from .llm import LLM, AsyncLLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "Completion", "Event", "Message", "Reply", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": ".llm",
    "AsyncLLM": ".llm",
    "Completion": ".engine.request",
    "SamplingParams": ".engine.request",
    "Event": ".chat.events",
    "Message": ".chat.messages",
    "Reply": ".chat.events",
}


def __getattr__(name: str) -> Any:
    # Names are fetched on first use so that `cabochon --help` starts without torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
