"""Transcriptions and translations: OpenAI's two audio endpoints, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile
from starlette.responses import PlainTextResponse, Response

from ..chat.events import Finish, TextDelta, Usage
from . import speech
from .answers import Json, request_id
from .service import Service
from .sse import EventStream, data_event, unless_gone


def speech_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/audio/transcriptions", summary="Speech to text", tags=["OpenAI"])
    async def transcribe(
        request: Request,
        file: Annotated[UploadFile, File(description="Any container and codec that FFmpeg reads.")],
        model: Annotated[str | None, Form()] = None,
        language: Annotated[str | None, Form(description="ISO 639-1; left out, the speech's own.")] = None,
        prompt: Annotated[str | None, Form(description="Style, names, spelling.")] = None,
        response_format: Annotated[str, Form(description="json, text or verbose_json.")] = "json",
        temperature: Annotated[float | None, Form(ge=0, le=2)] = None,
        stream: Annotated[bool, Form()] = False,
    ) -> Response:
        service.model_name(model)
        speech.check_format(response_format)
        question = speech.transcription_prompt(language)
        parts, seconds = await _pieces(service, file)
        heard = _hear(service, request_id(request), question, parts, prompt, temperature)
        if stream:
            return EventStream(_events(heard), service.options.keep_alive)
        text, usage = await unless_gone(request, _whole(heard))
        if response_format == "text":
            return PlainTextResponse(text + "\n")
        name = "" if language is None else speech.language_name(language).lower()
        return Json(speech.answer(text, response_format, "transcribe", name, seconds, usage))

    @routes.post("/v1/audio/translations", summary="Speech in any language to English text", tags=["OpenAI"])
    async def translate(
        request: Request,
        file: Annotated[UploadFile, File(description="Any container and codec that FFmpeg reads.")],
        model: Annotated[str | None, Form()] = None,
        prompt: Annotated[str | None, Form(description="Style, names, spelling.")] = None,
        response_format: Annotated[str, Form(description="json, text or verbose_json.")] = "json",
        temperature: Annotated[float | None, Form(ge=0, le=2)] = None,
    ) -> Response:
        service.model_name(model)
        speech.check_format(response_format)
        parts, seconds = await _pieces(service, file)
        question = speech.translation_prompt()
        texts, total = [], Usage()
        for part in parts:
            heard = _hear(service, request_id(request), question, [part], prompt, temperature)
            text, usage = await unless_gone(request, _whole(heard))
            texts.append(speech.translated(text))
            total = _sum(total, usage)
        joined = " ".join(filter(None, texts))
        if response_format == "text":
            return PlainTextResponse(joined + "\n")
        return Json(speech.answer(joined, response_format, "translate", "english", seconds, total))

    return routes


async def _pieces(service: Service, file: UploadFile) -> tuple[list[bytes], float]:
    data = await file.read()
    assert service.llm.front.senses is not None
    return await asyncio.to_thread(speech.pieces, data, service.llm.front.senses.policy)


Heard = AsyncGenerator[str | Usage]


async def _hear(
    service: Service, identity: str, question: str, parts: list[bytes], hint: str | None, temperature: float | None
) -> Heard:
    """The text of all pieces as it comes, a space between pieces; each piece's usage after its text."""
    for number, part in enumerate(parts):
        chunks = service.chat(speech.ask(question, part, hint, temperature), f"{identity}-{number}")
        begun = number == 0
        async with aclosing(chunks):
            async for chunk in chunks:
                for event in chunk.events:
                    if isinstance(event, TextDelta) and event.text:
                        yield event.text if begun else " " + event.text
                        begun = True
                    elif isinstance(event, Finish):
                        yield event.usage


async def _whole(heard: Heard) -> tuple[str, Usage]:
    texts, total = [], Usage()
    async with aclosing(heard):
        async for piece in heard:
            if isinstance(piece, Usage):
                total = _sum(total, piece)
            else:
                texts.append(piece)
    return "".join(texts).strip(), total


async def _events(heard: Heard) -> AsyncGenerator[bytes]:
    texts, total = [], Usage()
    async with aclosing(heard):
        async for piece in heard:
            if isinstance(piece, Usage):
                total = _sum(total, piece)
            else:
                texts.append(piece)
                yield data_event({"type": "transcript.text.delta", "delta": piece})
    text = "".join(texts).strip()
    yield data_event({"type": "transcript.text.done", "text": text, "usage": speech.usage_object(total)})


def _sum(a: Usage, b: Usage) -> Usage:
    return Usage(
        a.prompt_tokens + b.prompt_tokens,
        a.completion_tokens + b.completion_tokens,
        a.reasoning_tokens + b.reasoning_tokens,
        a.cached_tokens + b.cached_tokens,
    )
