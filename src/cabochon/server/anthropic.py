"""Anthropic's Messages: their request to an `Ask`, events to their message, whole or in events. Pure functions.

Thinking blocks carry an empty signature: nothing here verifies one, and theirs are accepted and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..chat.events import ArgumentsDelta, Event, Finish, TextDelta, ThinkingDelta, ToolCallDelta, Usage, Warned
from ..chat.messages import Message, Tool
from ..engine.request import SamplingParams
from ..errors import RequestError
from . import wire
from .ask import Ask, Shape, tool_rules, unique_names

# Reading ------------------------------------------------------------------------------------------------------------


def read_anthropic(request: wire.MessagesRequest) -> Ask:
    """What the request asks for. Raises `RequestError` with the field's name."""
    tools = read_tools(request.tools)
    choice = request.tool_choice
    must_call = choice is not None and choice.type in ("any", "tool")
    if must_call and not tools:
        raise RequestError("tool_choice asks for a call, but tools is empty.", "tool_choice")
    if choice is not None and choice.type == "tool" and choice.name is None:
        raise RequestError("tool_choice.name is missing, but type is tool.", "tool_choice.name")
    names = [choice.name] if choice is not None and choice.type == "tool" and choice.name else None
    think = request.thinking
    budget = None if think is None or think.type != "enabled" else think.budget_tokens
    if budget is not None and budget >= request.max_tokens:
        raise RequestError(
            f"thinking.budget_tokens is {budget}, but must be below max_tokens ({request.max_tokens}).",
            "thinking.budget_tokens",
        )
    wanted = request.output_config.format if request.output_config else None
    return Ask(
        messages=read_conversation(request),
        params=SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            max_tokens=request.max_tokens,
            stop=tuple(request.stop_sequences or ()),
        ),
        tools=tools,
        callable=() if choice is not None and choice.type == "none" else tool_rules(tools, names, "tool_choice.name"),
        must_call=must_call,
        many_calls=not (choice is not None and choice.disable_parallel_tool_use),
        shape=None if wanted is None else Shape("json_schema", wanted.schema_, True, "output_config.format.schema"),
        thinking=read_thinking(request),
        budget=budget if budget is not None else (0 if think is not None and think.type == "disabled" else None),
    )


def read_thinking(request: wire.CountRequest) -> bool | None:
    return None if request.thinking is None else request.thinking.type != "disabled"


def read_tools(tools: Sequence[wire.AnthropicTool] | None) -> tuple[Tool, ...]:
    read = []
    for index, tool in enumerate(tools or ()):
        if tool.type not in (None, "custom"):
            raise RequestError(
                f"tools[{index}].type is {tool.type!r}, but only the caller's own tools (custom) can be used here.",
                f"tools[{index}].type",
            )
        read.append(Tool(tool.name, tool.description or "", tool.input_schema, strict=bool(tool.strict)))
    unique_names(read)
    return tuple(read)


def read_conversation(request: wire.CountRequest) -> tuple[Message, ...]:
    """System and turns. A user turn's tool results come before its words, as their protocol orders them."""
    messages: list[Message] = []
    if request.system is not None:
        messages.append(Message.of({"role": "system", "content": _blocks(request.system, "system")}, "system"))
    for index, turn in enumerate(request.messages):
        where = f"messages[{index}]"
        if turn.role == "assistant":
            messages.append(_assistant(turn.content, where))
        else:
            messages += _user(turn.role, turn.content, where)
    return tuple(messages)


def _user(role: str, content: str | list[dict[str, Any]], where: str) -> list[Message]:
    if isinstance(content, str):
        return [Message.of({"role": role, "content": content}, where)]
    results, words = [], []
    for index, block in enumerate(content):
        place = f"{where}.content[{index}]"
        if block.get("type") == "tool_result":
            results.append(
                Message.of(
                    {
                        "role": "tool",
                        "tool_call_id": block.get("tool_use_id"),
                        "content": _blocks(block.get("content") or "", f"{place}.content"),
                    },
                    place,
                )
            )
        else:
            words.append(_block(block, place))
    return [*results, *([Message.of({"role": role, "content": words}, where)] if words else [])]


def _assistant(content: str | list[dict[str, Any]], where: str) -> Message:
    if isinstance(content, str):
        return Message.of({"role": "assistant", "content": content}, where)
    words, thoughts, calls = [], [], []
    for index, block in enumerate(content):
        match block.get("type"):
            case "thinking":
                thoughts.append(str(block.get("thinking") or ""))
            case "redacted_thinking":
                continue
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input")}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case _:
                words.append(_block(block, f"{where}.content[{index}]"))
    plain = {"role": "assistant", "content": words, "tool_calls": calls, "reasoning": "\n".join(thoughts) or None}
    return Message.of(plain, where)


def _blocks(content: Any, where: str) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of blocks.", where)
    return [_block(block, f"{where}[{index}]") for index, block in enumerate(content)]


def _block(block: Any, where: str) -> dict[str, Any]:
    """A content block in OpenAI's words."""
    if not isinstance(block, Mapping):
        raise RequestError(f"{where} must be a block, that is, an object with a type.", where)
    source = block.get("source") if isinstance(block.get("source"), Mapping) else {}
    match block.get("type"), source.get("type") if source else None:
        case "text", _:
            return {"type": "text", "text": block.get("text")}
        case "image", "base64":
            url = f"data:{source.get('media_type', 'image/png')};base64,{source.get('data', '')}" if source else ""
            return {"type": "image_url", "image_url": {"url": url}}
        case "image", "url":
            return {"type": "image_url", "image_url": {"url": source.get("url") if source else None}}
        case "document", "text":
            return {"type": "text", "text": source.get("data") if source else None}
        case kind, _:
            raise RequestError(
                f"{where}.type is {kind!r}, but must be text, image, document (text), thinking, tool_use, tool_result.",
                f"{where}.type",
            )


# Writing ------------------------------------------------------------------------------------------------------------


class MessageWriter:
    """Writes one message, whole or as a stream of (event name, data)."""

    def __init__(self, identity: str, model: str) -> None:
        self._head = {"id": identity, "type": "message", "role": "assistant", "model": model}
        self._index = -1
        self._open: str | None = None

    def start(self, usage: Usage) -> list[tuple[str, dict[str, Any]]]:
        message = {**self._head, "content": [], **_stop(None), "usage": usage_object(usage)}
        return [("message_start", {"type": "message_start", "message": message})]

    def events(self, events: Iterable[Event]) -> list[tuple[str, dict[str, Any]]]:
        """The stream's events for one step."""
        written: list[tuple[str, dict[str, Any]]] = []
        for event in events:
            match event:
                case TextDelta(text):
                    written += self._block("text", {"type": "text", "text": ""})
                    written.append(self._delta({"type": "text_delta", "text": text}))
                case ThinkingDelta(text):
                    written += self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                    written.append(self._delta({"type": "thinking_delta", "thinking": text}))
                case ArgumentsDelta():
                    written += self._block(
                        "tool_use", {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                    )
                    written.append(self._delta({"type": "input_json_delta", "partial_json": event.text}))
                case ToolCallDelta():
                    written += self._close()
                case Finish():
                    written += self._close()
                    usage = usage_object(event.usage)
                    written.append(("message_delta", {"type": "message_delta", "delta": _stop(event), "usage": usage}))
                    written.append(("message_stop", {"type": "message_stop"}))
                case Warned():
                    continue
        return written

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The message that the stream's events join to."""
        content: list[dict[str, Any]] = []
        ending: dict[str, Any] = {}
        finished = {event.call.id for event in events if isinstance(event, ToolCallDelta)}
        kept = [event for event in events if not isinstance(event, ArgumentsDelta) or event.id in finished]
        for name, data in self.events(kept):
            if name == "content_block_start":
                content.append(dict(data["content_block"]))
            elif name == "content_block_delta":
                _join(content[-1], data["delta"])
            elif name == "content_block_stop" and content[-1]["type"] == "tool_use":
                content[-1]["input"] = json.loads(content[-1]["input"])
            elif name == "message_delta":
                ending = {**data["delta"], "usage": data["usage"]}
        warnings = [event.text for event in events if isinstance(event, Warned)]
        return {**self._head, "content": content, **ending, **({"warnings": warnings} if warnings else {})}

    def _block(self, kind: str, head: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        if self._open == kind:
            return []
        written = self._close()
        self._index += 1
        self._open = kind
        start = {"type": "content_block_start", "index": self._index, "content_block": head}
        return [*written, ("content_block_start", start)]

    def _delta(self, delta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "content_block_delta", {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[tuple[str, dict[str, Any]]]:
        if self._open is None:
            return []
        self._open = None
        return [("content_block_stop", {"type": "content_block_stop", "index": self._index})]


def _join(block: dict[str, Any], delta: Mapping[str, Any]) -> None:
    match delta["type"]:
        case "text_delta":
            block["text"] += delta["text"]
        case "thinking_delta":
            block["thinking"] += delta["thinking"]
        case "input_json_delta":
            block["input"] = (block["input"] or "") + delta["partial_json"]


def _stop(finish: Finish | None) -> dict[str, Any]:
    if finish is None:
        return {"stop_reason": None, "stop_sequence": None}
    reasons = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens", "loop": "max_tokens"}
    if finish.stop is not None and finish.reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop}
    return {"stop_reason": reasons.get(finish.reason, "end_turn"), "stop_sequence": None}


def usage_object(usage: Usage) -> dict[str, Any]:
    """Their `input_tokens` are those that no cache had."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
