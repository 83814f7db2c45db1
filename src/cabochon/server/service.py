"""Between the protocols and the engine: names, admission, limits, constraints. Knows neither HTTP nor anyone's JSON."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial

from ..chat.messages import Media, Prompt
from ..chat.tokenizer import Tokenizer
from ..engine.request import SamplingParams
from ..errors import BusyError, InputError, RequestError, UnknownModelError
from ..llm import AsyncLLM, Chunk
from .ask import Ask, Shape
from .faults import DrainingError, TooSlowError
from .options import ServerOptions
from .rules import Constrainer

log = logging.getLogger("cabochon.server")


class Service:
    """One engine as the protocols see it."""

    def __init__(self, llm: AsyncLLM, options: ServerOptions) -> None:
        if llm.tokenizer is None:
            raise InputError(f"{llm.name} has no tokenizer, so it can't be served; use the library with token ids.")
        self.llm = llm
        self.options = options
        self.tokenizer: Tokenizer = llm.tokenizer
        self.constrainer = Constrainer(self.tokenizer, llm.config.text.vocab_size)
        self.replies = 0
        """Running or waiting."""
        self._clocks: set[asyncio.Timeout] = set()
        self._closed = False
        self._most = llm.front.engine.scheduler.seats + options.max_waiting

    @property
    def kinds(self) -> list[str]:
        """The media that the model takes and the limits leave."""
        senses = self.llm.front.senses
        known = sorted(senses.kinds) if senses else []
        return [kind for kind in known if self.options.media_limits.get(kind) != 0]

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises `UnknownModelError` for a model that isn't served."""
        if asked is None:
            return self.options.names[0]
        if asked not in self.options.names:
            served = ", ".join(self.options.names)
            raise UnknownModelError(f"The model {asked!r} is not served here; there is {served}.")
        return asked

    async def render(self, ask: Ask) -> Prompt:
        """The conversation as token ids, media as placeholders."""
        ask = self._settled(ask)
        render = partial(
            self.llm.render,
            ask.messages,
            tools=ask.tools or None,
            thinking=ask.thinking,
            preserve_thinking=ask.preserve_thinking,
        )
        return await asyncio.to_thread(render)

    async def chat(self, ask: Ask, identity: str) -> AsyncGenerator[Chunk]:
        """The chunks of all replies; closing the iterator frees their pages at the next step."""
        ask = self._settled(ask)
        self._check_media(ask)
        with self._admitted(ask.params.n):
            rules, afterwards = await asyncio.to_thread(self.constrainer.rules, ask)
            if self.options.log_prompts:
                log.info("%s asks %s", identity, [message.as_dict() for message in ask.messages])
            chunks = self.llm.chat_stream(
                ask.messages,
                tools=ask.tools or None,
                thinking=ask.thinking,
                preserve_thinking=ask.preserve_thinking,
                params=self._bounded(ask.params),
                constraint=rules.begin,
                media_options=ask.media_options,
            )
            async with aclosing(self._timed(chunks)) as timed:
                async for chunk in timed:
                    yield replace(chunk, events=tuple(afterwards.checked(chunk.index, chunk.events)))

    async def complete(
        self, prompt: str | Sequence[int], params: SamplingParams, shape: Shape | None
    ) -> AsyncGenerator[Chunk]:
        """The chunks of all continuations of a raw prompt."""
        with self._admitted(params.n):
            constraint = None
            if shape is not None:
                grammar = await asyncio.to_thread(self.constrainer.shape, shape)
                constraint = self.constrainer.text_rules(grammar).begin
            chunks = self.llm.generate_stream(prompt, self._bounded(params), constraint=constraint)
            async with aclosing(self._timed(chunks)) as timed:
                async for chunk in timed:
                    yield chunk

    def cut(self) -> None:
        """End every reply now; its client learns that the server is leaving."""
        self._closed = True
        for clock in self._clocks:
            if not clock.expired():
                clock.reschedule(0.0)

    async def _timed(self, chunks: AsyncGenerator[Chunk]) -> AsyncGenerator[Chunk]:
        """`chunks`, for as long as a request may take."""
        clock = asyncio.timeout(self.options.request_timeout)
        try:
            async with clock, aclosing(chunks):
                self._clocks.add(clock)
                async for chunk in chunks:
                    yield chunk
        except TimeoutError:
            if self._closed:
                raise DrainingError("The server had to leave before the reply was finished; ask again.") from None
            raise TooSlowError(
                f"The request took longer than {self.options.request_timeout:g} seconds; ask for fewer tokens."
            ) from None
        finally:
            self._clocks.discard(clock)

    def _check_media(self, ask: Ask) -> None:
        kinds: list[str] = [
            part.kind for message in ask.messages for part in message.content if isinstance(part, Media)
        ]
        for kind, most in self.options.media_limits.items():
            count = kinds.count(kind)
            if count > most:
                raise RequestError(f"messages hold {count} {kind} parts, but {most} is the most.", "messages")

    def _settled(self, ask: Ask) -> Ask:
        """With this server's defaults where the request doesn't say."""
        thinking = self.options.thinking if ask.thinking is None else ask.thinking
        return replace(
            ask, thinking=thinking, preserve_thinking=ask.preserve_thinking or self.options.preserve_thinking
        )

    def _bounded(self, params: SamplingParams) -> SamplingParams:
        most = self.options.max_output_tokens
        if most is None:
            return params
        return replace(params, max_tokens=min(most, params.max_tokens or most))

    @contextmanager
    def _admitted(self, replies: int) -> Iterator[None]:
        if self.replies + replies > self._most:
            raise BusyError(
                f"{self.replies} replies are running or waiting and {self._most} is the most; try again shortly."
            )
        self.replies += replies
        try:
            yield
        finally:
            self.replies -= replies
