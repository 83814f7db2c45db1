"""The facade: the only place where text, media and engine meet.

`LLM` runs the engine in the caller's thread, `AsyncLLM` in one of its own for asyncio. Both go through `Front`, which
turns what people say into requests, and the engine's tokens into text and events.
"""

from .asynchronous import AsyncLLM
from .front import Front
from .replies import Chunk
from .sync import LLM

__all__ = ["LLM", "AsyncLLM", "Chunk", "Front"]
