"""`LLM`: the engine in the caller's thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..chat.events import Event, Reply
from ..chat.messages import Conversation
from ..engine.request import Completion, Request, SamplingParams, StepOutput
from ..errors import InputError
from .face import Face
from .front import Ask, ConstraintMaker, Front, Tools
from .replies import Chunk, failure


class LLM(Face):
    """A model to generate and chat with; arguments as `Face` has them.

    Several threads may use one `LLM`; their requests are batched.
    """

    def _start(self, front: Front) -> None:
        self.front = front
        self._lock = threading.Lock()
        self._mail: dict[str, deque[StepOutput]] = {}
        self._left: deque[str] = deque()
        """Requests whose caller has turned away, over or not."""

    # Verbs ------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | None = None,
        *,
        special_tokens: bool = False,
        constraint: ConstraintMaker | None = None,
    ) -> list[Completion]:
        """Continue raw prompts, all in one batch; with `params.n` > 1 each has n completions, next to each other.

        Text gets BOS unless it has one; control tokens in text count only with `special_tokens`. Raises `RequestError`
        before anything runs if one of the prompts can't be served, `EngineError` if one fails.
        """
        if isinstance(prompts, str):
            raise InputError("prompts is a string, but must be a list; write [prompt] for a single one.")
        front = self.front
        asks = [front.raw(p, params, special_tokens=special_tokens, constraint=constraint) for p in prompts]
        for _ in self._serve(asks):
            pass
        return [reply.completion() for ask in asks for reply in ask.replies]

    def chat(
        self,
        messages: Conversation,
        *,
        tools: Tools | None = None,
        thinking: bool | None = None,
        params: SamplingParams | None = None,
        constraint: ConstraintMaker | None = None,
        media_options: Mapping[str, Any] | None = None,
    ) -> Reply:
        """The reply to a conversation. `thinking` None: what the system prompt says, else off.

        `media_options` (`max_soft_tokens`, `fps`, ...) hold for media parts that don't say themselves.
        """
        return Reply.of(
            self.stream(
                messages,
                tools=tools,
                thinking=thinking,
                params=params,
                constraint=constraint,
                media_options=media_options,
            )
        )

    def stream(
        self,
        messages: Conversation,
        *,
        tools: Tools | None = None,
        thinking: bool | None = None,
        params: SamplingParams | None = None,
        constraint: ConstraintMaker | None = None,
        media_options: Mapping[str, Any] | None = None,
    ) -> Iterator[Event]:
        """The reply's events as they come, `Finish` last. Closing the iterator ends the reply."""
        if params is not None and params.n != 1:
            raise InputError(f"n is {params.n}, but a chat with events has one reply; call it {params.n} times.")
        ask = self.front.chat(
            messages,
            tools=tools,
            thinking=thinking,
            params=params,
            constraint=constraint,
            media_options=media_options,
        )
        return (event for chunk in self._serve([ask]) for event in chunk.events)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The logits after each of `token_ids`: float32 [T, V], through the engine's own paged path."""
        rows: list[torch.Tensor] = []
        params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1)
        ask = self.front.raw(token_ids, params)
        request = ask.request
        sunk = Request(
            request.id, request.token_ids, params, keep_end=False, sink=lambda _, part: rows.append(part.clone())
        )
        for _ in self._serve([Ask(sunk, ask.replies)]):
            pass
        return torch.cat(rows).float().cpu()

    # Work -------------------------------------------------------------------------------------------------------------

    def _serve(self, asks: Sequence[Ask[Any]]) -> Iterator[Chunk]:
        """Run requests to their ends; whatever is not over when the caller turns away is aborted."""
        engine = self.front.engine
        for ask in asks:
            engine.validate(ask.request)
        with self._lock:
            for ask in asks:
                self._mail[ask.request.id] = deque()
                engine.add(ask.request)
        try:
            while not all(ask.over for ask in asks):
                for ask in asks:
                    box = self._mail[ask.request.id]
                    while box:
                        yield from self._read(ask, box.popleft())
                if not all(ask.over for ask in asks):
                    self._step([ask.request.id for ask in asks])
        finally:
            self._left.extend(ask.request.id for ask in asks)
            self._clear()

    def _clear(self) -> None:
        """Free what nobody reads any more; if a step is running, it is done after that.

        Waiting for it could be for ever: an iterator that is thrown away may end up here inside this thread's own step.
        """
        while self._left and self._lock.acquire(blocking=False):
            try:
                while self._left:
                    name = self._left.popleft()
                    self.front.engine.abort(name)
                    del self._mail[name]
            finally:
                self._lock.release()

    def _read(self, ask: Ask[Any], output: StepOutput) -> Iterator[Chunk]:
        reply = ask.replies[output.index]
        if reply.over:
            return
        if output.finish_reason == "error":
            raise failure(output)
        chunk = reply.push(output)
        if chunk.finish_reason is not None and output.finish_reason is None:
            with self._lock:  # a stop string: the engine does not know yet
                self.front.engine.abort(output.request_id, output.index)
        yield chunk

    def _step(self, mine: list[str]) -> None:
        """One step for everybody, unless another thread's has just brought something for us."""
        with self._lock:
            if any(self._mail[name] for name in mine):
                return
            for output in self.front.engine.step():
                if output.request_id in self._mail:
                    self._mail[output.request_id].append(output)
        self._clear()
