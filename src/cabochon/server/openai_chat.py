"""Chat completions: OpenAI's request to an `Ask`, events to OpenAI's reply, whole or in chunks. Pure functions.

A call's arguments stream as they are written; what was streamed of a call that the reply's length cut off is no call,
which `finish_reason: "length"` and a warning say. Beyond OpenAI's words: thinking stands under both `reasoning` and
`reasoning_content`; a choice may carry `warnings`; a reply that the loop guard ended has `finish_reason: "length"` and
`stop_reason: "loop"`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ..chat.events import ArgumentsDelta, Event, Finish, Reply, TextDelta, ThinkingDelta, Usage, Warned
from ..chat.messages import Message, Tool, ToolCall
from ..chat.tokenizer import Tokenizer
from ..engine.request import TokenLogprob
from ..errors import RequestError
from . import wire
from .answers import logprob_entries
from .ask import Ask, Shape, params, plain_parts, structured, thinking, tool_rules, unique_names

# Reading ------------------------------------------------------------------------------------------------------------


def read_chat(request: wire.ChatRequest) -> Ask:
    """What the request asks for. Raises `RequestError` with the field's name."""
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs is given, but logprobs is not true.", "top_logprobs")
    tools = read_tools(request.tools)
    names, must_call = read_tool_choice(request.tool_choice)
    if must_call and not tools:
        raise RequestError("tool_choice asks for a call, but tools is empty.", "tool_choice")
    kwargs = request.chat_template_kwargs or wire.TemplateKwargs()
    think, budget = thinking(request.reasoning_effort, request.thinking_token_budget, kwargs.enable_thinking)
    shape = read_format(request.response_format) or structured(request.structured_outputs)
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    return Ask(
        messages=read_messages(request.messages),
        params=params(
            request,
            max_tokens=limit,
            n=request.n,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        ),
        tools=tools,
        callable=() if request.tool_choice == "none" else tool_rules(tools, names, "tool_choice"),
        must_call=must_call,
        many_calls=request.parallel_tool_calls is not False,
        shape=shape,
        thinking=think,
        budget=budget,
        preserve_thinking=bool(kwargs.preserve_thinking),
        media_options=request.mm_processor_kwargs.model_dump(exclude_none=True) if request.mm_processor_kwargs else {},
    )


def read_messages(messages: Sequence[wire.ChatMessage]) -> tuple[Message, ...]:
    read = []
    for index, message in enumerate(messages):
        plain = message.model_dump(exclude_none=True)
        plain["content"] = plain_parts(message.content)
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls or ()]
        read.append(Message.of(plain, f"messages[{index}]"))
    return tuple(read)


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """Clients send their own marks along; only what makes the call is kept."""
    function = call.get("function")
    kept: dict[str, Any] = {key: call[key] for key in ("id", "type") if key in call}
    if isinstance(function, dict):
        kept["function"] = {key: function[key] for key in ("name", "arguments") if key in function}
    return kept


def read_tools(tools: Sequence[wire.FunctionTool] | None) -> tuple[Tool, ...]:
    read = tuple(
        Tool(
            name=tool.function.name,
            description=tool.function.description or "",
            parameters=tool.function.parameters,
            strict=bool(tool.function.strict),
        )
        for tool in tools or ()
    )
    unique_names(read)
    return read


def read_tool_choice(choice: Any) -> tuple[list[str] | None, bool]:
    """The names that may be called (None: all) and whether a call is required."""
    match choice:
        case "required":
            return None, True
        case wire.NamedTool():
            return [choice.function.name], True
        case wire.AllowedToolsChoice():
            names = [tool.function.name for tool in choice.allowed_tools.tools]
            return names, choice.allowed_tools.mode == "required"
        case _:
            return None, False


def read_format(wanted: wire.ResponseFormat | None) -> Shape | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Shape("json_object", field="response_format")
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise RequestError(
            "response_format.json_schema.schema is missing, but type is json_schema.", "response_format.json_schema"
        )
    strict = bool(wanted.json_schema.strict)
    return Shape("json_schema", wanted.json_schema.schema_, strict, "response_format.json_schema.schema")


# Writing ------------------------------------------------------------------------------------------------------------


class ChatWriter:
    """Writes one completion, whole or in chunks. The identity and the date are given, so that output is a function."""

    def __init__(
        self, identity: str, created: int, model: str, tokenizer: Tokenizer, *, reasoning: bool = True
    ) -> None:
        self._reasoning = reasoning
        self._head = {"id": identity, "created": created, "model": model, "system_fingerprint": None}
        self._tokenizer = tokenizer
        self._opened: set[int] = set()
        self._called: set[str] = set()
        """Calls whose names have gone out."""
        self._warnings: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[TokenLogprob]] = {}

    def chunks(
        self, index: int, events: Iterable[Event], logprobs: Sequence[TokenLogprob] = ()
    ) -> list[dict[str, Any]]:
        """The chunks of one step of one choice."""
        written = []
        if index not in self._opened:
            self._opened.add(index)
            written.append(self._chunk(index, {"role": "assistant", "content": ""}))
        self._logprobs.setdefault(index, []).extend(logprobs)
        for event in events:
            match event:
                case TextDelta(text):
                    written.append(self._chunk(index, {"content": text}))
                case ThinkingDelta(text) if self._reasoning:
                    written.append(self._chunk(index, {"reasoning": text, "reasoning_content": text}))
                case ArgumentsDelta():
                    written.append(self._chunk(index, {"tool_calls": [self._piece(event)]}))
                case Warned(text):
                    self._warnings.setdefault(index, []).append(text)
                case Finish():
                    written.append(self._last(index, event))
        return written

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk after the last, for `stream_options.include_usage`."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_object(usages)}

    def whole(self, replies: Sequence[Reply], logprobs: Sequence[Sequence[TokenLogprob]] | None) -> dict[str, Any]:
        """The whole completion."""
        choices = []
        for index, reply in enumerate(replies):
            content = reply.text or (None if reply.tool_calls else "")
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            thought = reply.thinking if self._reasoning else None
            message |= {"reasoning": thought, "reasoning_content": thought}
            if reply.tool_calls:
                message["tool_calls"] = [call_object(call) for call in reply.tool_calls]
            shown = (
                None
                if logprobs is None
                else {"content": logprob_entries(self._tokenizer, logprobs[index]), "refusal": None}
            )
            choice = {"index": index, "message": message, "logprobs": shown, **ending(reply.finish_reason)}
            choices.append(choice | ({"warnings": list(reply.warnings)} if reply.warnings else {}))
        usage = usage_object([reply.usage for reply in replies])
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        waiting = self._logprobs.pop(index, [])
        shown = {"content": logprob_entries(self._tokenizer, waiting), "refusal": None} if waiting else None
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": None, **more}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _piece(self, event: ArgumentsDelta) -> dict[str, Any]:
        """A piece of a call. Id and name come with the first one only: clients join what they see."""
        if event.id in self._called:
            return {"index": event.index, "function": {"arguments": event.text}}
        self._called.add(event.id)
        function = {"name": event.name, "arguments": event.text}
        return {"index": event.index, "id": event.id, "type": "function", "function": function}

    def _last(self, index: int, finish: Finish) -> dict[str, Any]:
        warnings = self._warnings.get(index)
        return self._chunk(index, {}, **ending(finish.reason), **({"warnings": warnings} if warnings else {}))


def ending(reason: str) -> dict[str, Any]:
    """`finish_reason` in OpenAI's words; `stop_reason` says what they have no word for."""
    match reason:
        case "stop" | "length" | "tool_calls":
            return {"finish_reason": reason, "stop_reason": None}
        case "loop":
            return {"finish_reason": "length", "stop_reason": "loop"}
        case _:
            return {"finish_reason": "stop", "stop_reason": reason}


def call_object(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def usage_object(usages: Sequence[Usage]) -> dict[str, Any]:
    """Choices share their prompt, which counts once."""
    prompt = max((usage.prompt_tokens for usage in usages), default=0)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": max((usage.cached_tokens for usage in usages), default=0)},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)},
    }
