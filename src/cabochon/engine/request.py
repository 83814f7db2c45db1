"""What the engine is asked for and what it gives back. Token ids only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from ..errors import RequestError

EngineFinish = Literal["stop", "length", "abort", "loop", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the reply is drawn.

    None for temperature, top_p, top_k, min_p and repetition_penalty means what the checkpoint's generation_config says
    (Gemma 4: 1.0, 0.95, 64, off, off). Out-of-range values raise `RequestError` that names the field.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    """None: as many as the context leaves."""
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    """Alternatives per generated token (0: the chosen token's only); None: no logprobs."""
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)!r}, but must be {allowed}.", name)

        need(self.temperature is None or 0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        need(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(self.top_k is None or self.top_k >= 0, "top_k", "0 (off) or more")
        need(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or more")
        need(self.n >= 1, "n", "1 or more")
        need(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20")
        need(self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "prompt_logprobs", "between 0 and 20")
        need(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        need(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        repetition = self.repetition_penalty
        need(repetition is None or 0.01 <= repetition <= 100, "repetition_penalty", "between 0.01 and 100")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token and its best alternatives, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What the next token may be. One per running reply; the engine calls `mask`, samples, then calls `advance`."""

    def mask(self, row: torch.Tensor) -> None:
        """Set the forbidden tokens of `row` [V] float32 to -inf, in place."""

    def advance(self, token_id: int) -> None:
        """Take note of the token that was chosen."""

    def forced(self) -> Sequence[int]:
        """Tokens that must come next whatever the logits say; the engine may append them without sampling."""

    def done(self) -> bool:
        """True when the reply is complete and must end."""


@dataclass(frozen=True, slots=True)
class SoftSpan:
    """A run of soft tokens in a prompt: media features that take the place of embeddings."""

    start: int
    length: int
    key: bytes
    """Hash of the media bytes and the budget: what the prefix cache and the encoder cache compare."""
    item: Any
    """What `model.encode` takes (patches, mel frames, ...)."""
    two_way: bool
    """The tokens see each other on sliding layers; such a span is never split over steps."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the engine is asked to continue. Everything in it is settled: no defaults are looked up later."""

    id: str
    token_ids: Sequence[int]
    params: SamplingParams
    """With nothing left to the checkpoint, and max_tokens filled in."""
    eos_ids: Collection[int] = ()
    """Tokens that end the reply unless `params.ignore_eos`; the one that did is part of the reply."""
    spans: tuple[SoftSpan, ...] = ()
    boundaries: tuple[int, ...] = ()
    """Token counts after which the window is kept for later requests (see `chat.messages.Prompt`)."""
    keep_end: bool = True
    """Keep the window at the end of the reply as well: the next turn goes on from there."""
    priority: int = 0
    """Lower goes first; equal ones in order of arrival."""
    constraint: Callable[[], Constraint] | None = None
    """Called once per reply, so n > 1 makes n of them."""
    loop_guard: int = 0
    """End the reply with "loop" when its last so many tokens repeat a cycle of at most a quarter of them; 0: never."""
    salt: bytes = b""
    """Requests share cached prefixes only with those of the same salt (another adapter: another salt)."""
    sink: Callable[[int, torch.Tensor], None] | None = None
    """Called with (position, logits [n, V]) for all tokens of the prompt, in order; bypasses the prefix cache."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished reply to a raw prompt."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: EngineFinish
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    stop_reason: int | str | None = None
    """The stop id or stop string that ended it."""
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """New tokens of one running reply after a step."""

    request_id: str
    index: int
    """Which of the n replies."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: EngineFinish | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    error: str | RequestError | None = None
    """When finish_reason is "error": one sentence about a fault of ours, or what was wrong with the request."""
