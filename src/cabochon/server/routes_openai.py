"""Chat completions, completions, models, tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..chat.events import Event, Finish, Reply, Usage
from ..engine.request import SamplingParams, TokenLogprob
from ..errors import CabochonError, RequestError
from ..llm import Chunk
from . import wire
from .answers import Json, new_id, now, request_id
from .ask import Ask, Shape, structured
from .completions import CompletionWriter, read_completion
from .completions import usage_object as completion_usage
from .faults import openai_error
from .openai_chat import ChatWriter, read_chat, read_messages, read_tools
from .service import Service
from .sse import DONE, EventStream, data_event, unless_gone


def openai_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", summary="Answer a conversation", tags=["OpenAI"])
    async def chat(body: wire.ChatRequest, request: Request) -> Response:
        model, ask = service.model_name(body.model), read_chat(body)
        shown = body.include_reasoning is not False
        writer = ChatWriter(new_id("chatcmpl"), now(), model, service.tokenizer, reasoning=shown)
        chunks = service.chat(ask, request_id(request))
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(_guarded(_chat_stream(writer, chunks, usage)), service.options.keep_alive)
        return Json(await unless_gone(request, _chat_whole(writer, chunks, ask)))

    @routes.post("/v1/completions", summary="Continue a raw prompt", tags=["OpenAI"])
    async def completions(body: wire.CompletionRequest, request: Request) -> Response:
        model = service.model_name(body.model)
        prompts, params = read_completion(body)
        shape = structured(body.structured_outputs)
        writer = CompletionWriter(new_id("cmpl"), now(), model, service.tokenizer)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            stream = _completion_stream(service, writer, prompts, params, shape, usage)
            return EventStream(_guarded(stream), service.options.keep_alive)
        whole = _completion_whole(service, writer, prompts, params, shape, bool(body.echo))
        return Json(await unless_gone(request, whole))

    @routes.get("/v1/models", summary="What is served", tags=["OpenAI"])
    async def models() -> Response:
        return Json({"object": "list", "data": [_model(service, name) for name in service.options.names]})

    @routes.get("/v1/models/{name:path}", summary="One model", tags=["OpenAI"])
    async def model(name: str) -> Response:
        return Json(_model(service, service.model_name(name)))

    @routes.post("/tokenize", summary="Text or a conversation to token ids", tags=["Tokens"])
    async def tokenize(body: wire.TokenizeRequest) -> Response:
        service.model_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Exactly one of prompt and messages must be given.", "prompt")
        if body.prompt is not None:
            bare = body.add_special_tokens is False
            ids = service.tokenizer.encode(body.prompt) if bare else service.llm.front.encode(body.prompt)
        else:
            kwargs = body.chat_template_kwargs or wire.TemplateKwargs()
            ask = Ask(
                messages=read_messages(body.messages or ()),
                params=SamplingParams(),
                tools=read_tools(body.tools),
                thinking=kwargs.enable_thinking,
            )
            ids = list((await service.render(ask)).token_ids)
        spelt = [service.tokenizer.decode([i], special=True) for i in ids] if body.return_token_strs else None
        return Json({"tokens": ids, "count": len(ids), "max_model_len": service.llm.max_model_len, "token_strs": spelt})

    @routes.post("/detokenize", summary="Token ids to text", tags=["Tokens"])
    async def detokenize(body: wire.DetokenizeRequest) -> Response:
        service.model_name(body.model)
        size = service.llm.config.text.vocab_size
        if strange := [i for i in body.tokens if i >= size]:
            raise RequestError(f"tokens holds {strange[0]}, but ids end at {size - 1}.", "tokens")
        return Json({"prompt": service.tokenizer.decode(body.tokens, special=True)})

    return routes


def _model(service: Service, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "cabochon",
        "root": service.llm.name,
        "max_model_len": service.llm.max_model_len,
        "modalities": ["text", *service.kinds],
    }


async def _guarded(stream: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """A fault in mid-stream becomes the stream's last event; before the first event it keeps its status."""
    begun = False
    async with aclosing(stream):
        try:
            async for event in stream:
                begun = True
                yield event
        except CabochonError as error:
            if not begun:
                raise
            yield data_event(openai_error(error))


# Chat ---------------------------------------------------------------------------------------------------------------


async def _chat_stream(writer: ChatWriter, chunks: AsyncGenerator[Chunk], usage: bool) -> AsyncGenerator[bytes]:
    used: list[Usage] = []
    async with aclosing(chunks):
        async for chunk in chunks:
            for payload in writer.chunks(chunk.index, chunk.events, chunk.logprobs):
                yield data_event({**payload, "usage": None} if usage else payload)
            used += [event.usage for event in chunk.events if isinstance(event, Finish)]
    if usage:
        yield data_event(writer.usage_chunk(used))
    yield DONE


async def _chat_whole(writer: ChatWriter, chunks: AsyncGenerator[Chunk], ask: Ask) -> dict[str, object]:
    events: list[list[Event]] = [[] for _ in range(ask.params.n)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(ask.params.n)]
    async with aclosing(chunks):
        async for chunk in chunks:
            events[chunk.index] += chunk.events
            logprobs[chunk.index] += chunk.logprobs
    replies = [Reply.of(one) for one in events]
    return writer.whole(replies, logprobs if ask.params.logprobs is not None else None)


# Completions --------------------------------------------------------------------------------------------------------

Prompts = Sequence[str | list[int]]


async def _completion_stream(
    service: Service,
    writer: CompletionWriter,
    prompts: Prompts,
    params: SamplingParams,
    shape: Shape | None,
    usage: bool,
) -> AsyncGenerator[bytes]:
    """The choices of all prompts, numbered through."""
    completion_tokens = 0
    async with aclosing(side_by_side([service.complete(prompt, params, shape) for prompt in prompts])) as chunks:
        async for number, chunk in chunks:
            completion_tokens += len(chunk.token_ids)
            if chunk.text or chunk.finish_reason or chunk.logprobs:
                logprobs = chunk.logprobs if params.logprobs is not None else None
                index = number * params.n + chunk.index
                yield data_event(writer.chunk(writer.choice(index, chunk.text, chunk.finish_reason, logprobs)))
    if usage:
        yield data_event({**writer.chunk(), "usage": completion_usage(_lengths(service, prompts), completion_tokens)})
    yield DONE


async def _completion_whole(
    service: Service,
    writer: CompletionWriter,
    prompts: Prompts,
    params: SamplingParams,
    shape: Shape | None,
    echo: bool,
) -> dict[str, object]:
    if echo and params.logprobs is not None:
        params = replace(params, prompt_logprobs=params.logprobs)
    texts = [_spelt(service, prompt) if echo else "" for prompt in prompts for _ in range(params.n)]
    scores: list[list[TokenLogprob | None]] = [[] for _ in texts]
    reasons = ["stop"] * len(texts)
    completion_tokens = 0
    async with aclosing(side_by_side([service.complete(prompt, params, shape) for prompt in prompts])) as chunks:
        async for number, chunk in chunks:
            completion_tokens += len(chunk.token_ids)
            first = number * params.n
            texts[first + chunk.index] += chunk.text
            if chunk.prompt_logprobs is not None:
                for score in scores[first : first + params.n]:
                    score[:0] = chunk.prompt_logprobs
            scores[first + chunk.index] += chunk.logprobs
            reasons[first + chunk.index] = chunk.finish_reason or reasons[first + chunk.index]
    shown = scores if params.logprobs is not None else [None] * len(texts)
    choices = [writer.choice(i, *choice) for i, choice in enumerate(zip(texts, reasons, shown, strict=True))]
    return writer.whole(choices, _lengths(service, prompts), completion_tokens)


async def side_by_side(streams: Sequence[AsyncGenerator[Chunk]]) -> AsyncGenerator[tuple[int, Chunk]]:
    """The chunks of all `streams` as they come, with the stream's number. The first failure ends them all."""
    queue: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()

    async def forward(number: int, stream: AsyncGenerator[Chunk]) -> None:
        async with aclosing(stream):
            async for chunk in stream:
                queue.put_nowait((number, chunk))

    async def forward_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for numbered in enumerate(streams):
                    group.create_task(forward(*numbered))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            queue.put_nowait(None)

    work = asyncio.create_task(forward_all())
    try:
        while (found := await queue.get()) is not None:
            yield found
        await work
    finally:
        if work.cancel():
            with suppress(asyncio.CancelledError):
                await work


def _lengths(service: Service, prompts: Prompts) -> int:
    return sum(len(service.llm.front.encode(p)) if isinstance(p, str) else len(p) for p in prompts)


def _spelt(service: Service, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)
