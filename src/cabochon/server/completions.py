"""Completions of raw prompts, and tokens in and out. Pure functions.

A raw prompt's control tokens are text here, as everywhere: a client can't forge a turn. Who wants turns uses the chat
endpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..chat.tokenizer import Tokenizer
from ..engine.request import SamplingParams, TokenLogprob
from ..errors import RequestError
from . import wire
from .ask import params
from .openai_chat import ending


def read_completion(request: wire.CompletionRequest) -> tuple[list[str | list[int]], SamplingParams]:
    """The prompts and how to continue them."""
    prompts = _prompts(request.prompt)
    if request.echo and request.stream:
        raise RequestError("echo and stream can't be combined; leave one of them out.", "echo")
    wanted = params(request, max_tokens=request.max_tokens, n=request.n, logprobs=request.logprobs)
    return prompts, wanted


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list, but must be text, token ids or a list of these.", "prompt")
    if isinstance(prompt[0], int):
        return [list(prompt)]
    if len(prompt) > 128:
        raise RequestError(f"prompt holds {len(prompt)} prompts, but 128 is the most; send several requests.", "prompt")
    if any(not one for one in prompt if isinstance(one, list)):
        raise RequestError("prompt holds an empty list of token ids.", "prompt")
    return list(prompt)


class CompletionWriter:
    """Writes one completion object, whole or in chunks."""

    def __init__(self, identity: str, created: int, model: str, tokenizer: Tokenizer) -> None:
        self._head = {"id": identity, "object": "text_completion", "created": created, "model": model}
        self._tokenizer = tokenizer
        self._offsets: dict[int, int] = {}

    def choice(
        self, index: int, text: str, reason: str | None, logprobs: Sequence[TokenLogprob | None] | None
    ) -> dict[str, Any]:
        last = {"finish_reason": None, "stop_reason": None} if reason is None else ending(reason)
        shown = None if logprobs is None else self._logprobs(index, logprobs)
        return {"index": index, "text": text, "logprobs": shown, **last}

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": list(choices)}

    def whole(self, choices: Sequence[dict[str, Any]], prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        return {**self._head, "choices": list(choices), "usage": usage_object(prompt_tokens, completion_tokens)}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """OpenAI's older columns; the first token of an echoed prompt has no logprob."""
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in logprobs:
            spelt = "" if one is None else self._spelt(one.token_id)
            columns["tokens"].append(spelt)
            columns["token_logprobs"].append(None if one is None else max(one.logprob, -9999.0))
            top = None if one is None else {self._spelt(token): max(value, -9999.0) for token, value in one.top}
            columns["top_logprobs"].append(top)
            columns["text_offset"].append(self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + len(spelt)
        return columns

    def _spelt(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def usage_object(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
