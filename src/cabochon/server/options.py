"""How a server is set up. The engine's own options are `engine.options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import InputError

MIB = 1 << 20
LEAST = {"max_body_bytes": 1, "max_waiting": 0, "max_output_tokens": 1, "drain": 0, "responses_kept": 0}


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server is set up; times are in seconds."""

    names: tuple[str, ...]
    """Names under which clients may ask for the model; the first is the one in replies."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """Any of them opens the door; none: no door."""
    allowed_origins: tuple[str, ...] = ()
    """Pages of these origins may call from a browser (CORS); none: only our own page."""
    max_body_bytes: int = 64 * MIB
    max_waiting: int = 256
    """Replies that may wait beside the running ones; beyond that a request is refused with 429."""
    max_output_tokens: int | None = None
    """Most tokens that one reply may have, whatever was asked for."""
    request_timeout: float = 3600.0
    """A reply that takes longer is ended."""
    keep_alive: float = 10.0
    """A stream that is silent for so long says so, to keep proxies from closing it."""
    drain: float = 30.0
    """How long running replies may go on after SIGTERM."""
    responses_kept: int = 1000
    """Responses that can be continued or fetched, the latest first to stay."""
    thinking: bool | None = None
    """Whether the model thinks before it answers where a request doesn't say; None: as the template says."""
    preserve_thinking: bool = False
    """Earlier thoughts stay in every conversation."""
    log_prompts: bool = False
    media_limits: Mapping[str, int] = field(default_factory=dict)
    """Most parts of a kind (image, video, audio) in one request; a kind that isn't named has no limit."""

    def __post_init__(self) -> None:
        if self.request_timeout <= 0:
            raise InputError(f"request_timeout is {self.request_timeout:g}, but must be above 0 seconds.")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value:g}, but must be {least} or more.")
