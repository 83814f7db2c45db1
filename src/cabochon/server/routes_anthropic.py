"""Anthropic's Messages and the counting of their tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..chat.events import Event, Usage
from ..engine.request import SamplingParams
from ..errors import CabochonError
from ..llm import Chunk
from . import wire
from .answers import Json, new_id, request_id
from .anthropic import MessageWriter, read_anthropic, read_conversation, read_thinking, read_tools
from .ask import Ask
from .faults import anthropic_error
from .service import Service
from .sse import EventStream, named_event, unless_gone

PING = named_event("ping", {"type": "ping"})


def anthropic_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Anthropic"])

    @routes.post("/v1/messages", summary="Answer a conversation")
    async def messages(body: wire.MessagesRequest, request: Request) -> Response:
        model, ask = service.model_name(body.model), read_anthropic(body)
        writer = MessageWriter(new_id("msg"), model)
        chunks = service.chat(ask, request_id(request))
        if body.stream:
            tokens = len((await service.render(ask)).token_ids)
            return EventStream(_stream(writer, chunks, tokens), service.options.keep_alive, PING)
        return Json(await unless_gone(request, _whole(writer, chunks)))

    @routes.post("/v1/messages/count_tokens", summary="How many tokens a conversation has")
    async def count_tokens(body: wire.CountRequest) -> Response:
        service.model_name(body.model)
        ask = Ask(read_conversation(body), SamplingParams(), read_tools(body.tools), thinking=read_thinking(body))
        return Json({"input_tokens": len((await service.render(ask)).token_ids)})

    return routes


async def _stream(writer: MessageWriter, chunks: AsyncGenerator[Chunk], tokens: int) -> AsyncGenerator[bytes]:
    begun = False
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                if not begun:
                    begun = True
                    for name, payload in writer.start(Usage(tokens, 0, 0, chunk.cached_tokens)):
                        yield named_event(name, payload)
                for name, payload in writer.events(chunk.events):
                    yield named_event(name, payload)
        except CabochonError as error:
            if not begun:
                raise
            yield named_event("error", anthropic_error(error))


async def _whole(writer: MessageWriter, chunks: AsyncGenerator[Chunk]) -> dict[str, object]:
    events: list[Event] = []
    async with aclosing(chunks):
        async for chunk in chunks:
            events += chunk.events
    return writer.whole(events)
