"""OpenAI's Responses: create (whole, streamed, in the background), fetch, list the input, cancel, delete."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import CabochonError, RequestError
from ..llm import Chunk
from . import wire
from .answers import Json, new_id, now, request_id
from .faults import sentence
from .response_writer import ResponseWriter
from .responses import input_items, read_input, read_response
from .service import Service
from .sse import EventStream, named_event, unless_gone
from .store import ResponseStore, Stored


def responses_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["OpenAI Responses"])
    store = ResponseStore(service.options.responses_kept)

    @routes.post("/v1/responses", summary="Answer an input")
    async def create(body: wire.ResponsesRequest, request: Request) -> Response:
        model = service.model_name(body.model)
        if body.background and (body.store is False or body.stream):
            raise RequestError("background needs store and can't be streamed here; poll the response.", "background")
        earlier = store.earlier(body.previous_response_id)
        ask = read_response(body, earlier)
        writer = ResponseWriter(new_id("resp"), now(), model, body, new_id, service.tokenizer)
        items = input_items(body.input)
        stored = Stored(writer, items, (*earlier, *read_input(items)))
        if body.store is not False:
            store.put(stored)
        chunks = service.chat(ask, request_id(request))
        if body.background:
            stored.task = asyncio.create_task(_work(writer, chunks))
            return Json(writer.object())
        if body.stream:
            return EventStream(_stream(writer, chunks), service.options.keep_alive)
        await unless_gone(request, _whole(writer, chunks))
        return Json(writer.object())

    @routes.get("/v1/responses/{identity}", summary="A response as it stands")
    async def retrieve(identity: str) -> Response:
        return Json(store.get(identity).writer.object())

    @routes.delete("/v1/responses/{identity}", summary="Forget a response")
    async def delete(identity: str) -> Response:
        await _cancel(store.get(identity))
        store.drop(identity)
        return Json({"id": identity, "object": "response", "deleted": True})

    @routes.post("/v1/responses/{identity}/cancel", summary="End a response in the background")
    async def cancel(identity: str) -> Response:
        stored = store.get(identity)
        if stored.task is None:
            raise RequestError(f"The response {identity!r} does not run in the background; close its stream instead.")
        await _cancel(stored)
        return Json(stored.writer.object())

    @routes.get("/v1/responses/{identity}/input_items", summary="What a response answered")
    async def items(identity: str) -> Response:
        kept = [{"id": f"item_{index}", **item} for index, item in enumerate(store.get(identity).items)]
        first, last = (kept[0]["id"], kept[-1]["id"]) if kept else (None, None)
        return Json({"object": "list", "data": kept, "first_id": first, "last_id": last, "has_more": False})

    return routes


async def _cancel(stored: Stored) -> None:
    if stored.task is not None and not stored.task.done():
        stored.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stored.task


async def _whole(writer: ResponseWriter, chunks: AsyncGenerator[Chunk]) -> None:
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                writer.events(chunk.events, chunk.spoken)
    finally:
        if writer.status == "in_progress":
            writer.stop("cancelled")


async def _work(writer: ResponseWriter, chunks: AsyncGenerator[Chunk]) -> None:
    """A response in the background: what goes wrong is told to whoever polls."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                writer.events(chunk.events, chunk.spoken)
    except CabochonError as error:
        writer.stop("failed", _fault(error))
    finally:
        if writer.status == "in_progress":
            writer.stop("cancelled")


async def _stream(writer: ResponseWriter, chunks: AsyncGenerator[Chunk]) -> AsyncGenerator[bytes]:
    begun = False
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                events = (
                    writer.events(chunk.events, chunk.spoken)
                    if begun
                    else [*writer.start(), *writer.events(chunk.events, chunk.spoken)]
                )
                begun = True
                for event in events:
                    yield named_event(event["type"], event)
    except CabochonError as error:
        if not begun:
            raise
        for event in writer.stop("failed", _fault(error)):
            yield named_event(event["type"], event)
    finally:
        if writer.status == "in_progress":
            writer.stop("cancelled")


def _fault(error: CabochonError) -> dict[str, Any]:
    code = "invalid_prompt" if error.status < 500 else "server_error"
    return {"code": code, "message": sentence(error)}
