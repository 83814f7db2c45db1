"""`AsyncLLM`: the engine in a thread of its own, asyncio around it.

Only ids and settled requests cross the border: requests are made and text is read on the caller's side, so a slow
client or a long prompt holds nobody up. Requests that can't be served are refused before they cross.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from types import TracebackType
from typing import Any

from ..chat.events import Event, Reply
from ..chat.messages import Conversation
from ..engine.request import Completion, SamplingParams, StepOutput
from ..engine.stats import Gauges, Stats
from ..errors import EngineError
from .face import Face
from .front import Ask, ConstraintMaker, Front, Tools
from .replies import Chunk, failure

log = logging.getLogger("cabochon")
CLOSED = "The engine has been closed."


class AsyncLLM(Face):
    """The verbs of `LLM`, awaited. Arguments as there. Use it as an async context manager, or call `close`."""

    def _start(self, front: Front) -> None:
        self.front = front
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._closing = False
        self._mail: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[StepOutput]]] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> Stats:
        """The engine's counters (being written to; read them, don't keep them)."""
        return self.front.engine.stats

    @property
    def alive(self) -> bool:
        """False once the engine has been closed or has stopped on a fault of its own."""
        return not self._closing

    def gauges(self) -> Gauges:
        """What the engine holds at the moment."""
        return self.front.engine.gauges()

    # Verbs ------------------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | None = None,
        *,
        special_tokens: bool = False,
        constraint: ConstraintMaker | None = None,
        priority: int = 0,
    ) -> list[Completion]:
        """See `LLM.generate`."""
        asks = [
            self.front.raw(p, params, special_tokens=special_tokens, constraint=constraint, priority=priority)
            for p in prompts
        ]
        for ask in asks:
            self.front.engine.validate(ask.request)

        async def finish(ask: Ask[Any]) -> None:
            async for _ in self._serve(ask):
                pass

        try:
            async with asyncio.TaskGroup() as group:
                for ask in asks:
                    group.create_task(finish(ask))
        except BaseExceptionGroup as failed:  # the first failure ends them all and speaks for them
            raise failed.exceptions[0] from None
        return [reply.completion() for ask in asks for reply in ask.replies]

    async def generate_stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        special_tokens: bool = False,
        constraint: ConstraintMaker | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Chunk]:
        """The chunks of all n replies to a raw prompt as they come, each with its `index`."""
        ask = self.front.raw(prompt, params, special_tokens=special_tokens, constraint=constraint, priority=priority)
        async with aclosing(self._serve(ask)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def chat(self, messages: Conversation, **options: Any) -> Reply:
        """See `LLM.chat`; options as for `stream`."""
        return Reply.of([event async for event in self.stream(messages, **options)])

    async def stream(self, messages: Conversation, **options: Any) -> AsyncGenerator[Event]:
        """The events of the (first) reply; options as for `chat_stream`."""
        async with aclosing(self.chat_stream(messages, **options)) as chunks:
            async for chunk in chunks:
                if chunk.index == 0:
                    for event in chunk.events:
                        yield event

    async def chat_stream(
        self,
        messages: Conversation,
        *,
        tools: Tools | None = None,
        thinking: bool | None = None,
        preserve_thinking: bool = False,
        params: SamplingParams | None = None,
        constraint: ConstraintMaker | None = None,
        priority: int = 0,
        media_options: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[Chunk]:
        """The chunks of all n replies to a conversation: events, token ids and logprobs together.

        Closing the iterator ends the replies. Media are fetched in a thread.
        """
        ask = await asyncio.to_thread(
            self.front.chat,
            messages,
            tools=tools,
            thinking=thinking,
            preserve_thinking=preserve_thinking,
            params=params,
            constraint=constraint,
            priority=priority,
            media_options=media_options,
        )
        async with aclosing(self._serve(ask)) as chunks:
            async for chunk in chunks:
                yield chunk

    def abort(self, request_id: str) -> None:
        """End a request at the next step."""
        with suppress(EngineError):  # an engine that has stopped runs nothing
            self._post(lambda: self.front.engine.abort(request_id))

    # The border -------------------------------------------------------------------------------------------------------

    async def _serve(self, ask: Ask[Any]) -> AsyncGenerator[Chunk]:
        engine, request = self.front.engine, ask.request
        engine.validate(request)
        queue: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._mail[request.id] = (asyncio.get_running_loop(), queue)
        try:
            self._post(lambda: engine.add(request))
            while not ask.over:
                output = await queue.get()
                reply = ask.replies[output.index]
                if reply.over:
                    continue
                if output.finish_reason == "error":
                    raise failure(output)
                chunk = reply.push(output)
                if chunk.finish_reason is not None and output.finish_reason is None:
                    # A stop string: the engine does not know yet.
                    self._post(partial(engine.abort, request.id, output.index))
                yield chunk
        finally:
            del self._mail[request.id]
            if not ask.over:
                self.abort(request.id)

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._closing:
                raise EngineError(CLOSED)
            self._inbox.append(command)
            self._wake.notify()

    def _work(self) -> None:
        """The engine's thread: take commands, run a step, hand out what it brought."""
        try:
            while self._wait():
                if self.front.engine.busy:
                    self._deliver(self.front.engine.step())
        except Exception:
            log.critical("The engine has stopped; start the program anew.", exc_info=True)
        finally:
            self._closing = True
            ended = [StepOutput(name, 0, (), finish_reason="error", error=CLOSED) for name in list(self._mail)]
            self._deliver(ended)

    def _wait(self) -> bool:
        """Sleep until there is something to do and take the commands that came in; False when it is time to go."""
        with self._wake:
            while not (self._inbox or self._closing or self.front.engine.busy):
                self._wake.wait()
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        return not self._closing

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """One call into each event loop per step, however many requests it serves."""
        parcels: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[StepOutput], StepOutput]]] = defaultdict(list)
        for output in outputs:
            box = self._mail.get(output.request_id)
            if box is not None:
                parcels[box[0]].append((box[1], output))
        for loop, parcel in parcels.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_unpack, parcel)

    def close(self) -> None:
        """Stop the engine's thread; what still runs is dropped."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


def _unpack(parcel: list[tuple[asyncio.Queue[StepOutput], StepOutput]]) -> None:
    for queue, output in parcel:
        queue.put_nowait(output)
