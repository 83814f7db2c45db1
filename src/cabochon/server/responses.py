"""Responses: OpenAI's request to an `Ask`. Pure functions; `response_writer` writes the answer.

Thinking comes back as an item of type `reasoning` and counts while the tool loop lasts, as in a chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..chat.messages import Message, Tool
from ..errors import RequestError
from . import wire
from .ask import Ask, Shape, params, thinking, tool_rules, unique_names

LOGPROBS = "message.output_text.logprobs"
"""What `include` holds for logprobs of the text; `top_logprobs` asks for them as well."""


def read_response(request: wire.ResponsesRequest, earlier: Sequence[Message] = ()) -> Ask:
    """What the request asks for, after the `earlier` messages of the response that it continues."""
    tools = read_tools(request.tools)
    names, must_call = _tool_choice(request.tool_choice)
    if must_call and not tools:
        raise RequestError("tool_choice asks for a call, but tools is empty.", "tool_choice")
    effort = request.reasoning.effort if request.reasoning else None
    think, budget = thinking(effort, None, None)
    system = [Message.of({"role": "system", "content": request.instructions}, "instructions")]
    return Ask(
        messages=(*(system if request.instructions else ()), *earlier, *read_input(input_items(request.input))),
        params=params(request, max_tokens=request.max_output_tokens, n=None, logprobs=_logprobs(request)),
        tools=tools,
        callable=() if request.tool_choice == "none" else tool_rules(tools, names, "tool_choice"),
        must_call=must_call,
        many_calls=request.parallel_tool_calls is not False,
        shape=_format(request.text.format if request.text else None),
        thinking=think,
        budget=budget,
    )


def _logprobs(request: wire.ResponsesRequest) -> int | None:
    wanted = request.top_logprobs or LOGPROBS in (request.include or ())
    return (request.top_logprobs or 0) if wanted else None


def read_tools(tools: Sequence[wire.ResponseTool] | None) -> tuple[Tool, ...]:
    read = []
    for index, tool in enumerate(tools or ()):
        if tool.type != "function":
            raise RequestError(
                f"tools[{index}].type is {tool.type!r}, but only function tools can be used here.",
                f"tools[{index}].type",
            )
        if not tool.name:
            raise RequestError(f"tools[{index}].name is missing.", f"tools[{index}].name")
        read.append(Tool(tool.name, tool.description or "", tool.parameters, strict=bool(tool.strict)))
    unique_names(read)
    return tuple(read)


def _tool_choice(choice: Any) -> tuple[list[str] | None, bool]:
    if choice == "required":
        return None, True
    if not isinstance(choice, wire.ResponseToolChoice):
        return None, False
    if choice.type == "function":
        if choice.name is None:
            raise RequestError("tool_choice.name is missing, but type is function.", "tool_choice.name")
        return [choice.name], True
    return [str(tool.get("name")) for tool in choice.tools or ()], choice.mode == "required"


def _format(wanted: wire.ResponseTextFormat | None) -> Shape | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Shape("json_object", field="text.format")
    if wanted.schema_ is None:
        raise RequestError("text.format.schema is missing, but type is json_schema.", "text.format.schema")
    return Shape("json_schema", wanted.schema_, bool(wanted.strict), "text.format.schema")


def input_items(given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input as a list of items."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [dict(item) for item in given]


def read_input(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages of a list of items. Reasoning and calls that follow one another are one assistant message."""
    plain: list[tuple[str, dict[str, Any]]] = []
    for index, item in enumerate(items):
        where = f"input[{index}]"
        match item.get("type", "message"):
            case "message":
                plain.append((where, {"role": item.get("role"), "content": _content(item.get("content"), where)}))
            case "reasoning":
                _assistant(plain, where, fresh=True)["reasoning"] = thoughts(item)
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}
                _assistant(plain, where, fresh=False).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                answer = _content(item.get("output"), where)
                plain.append((where, {"role": "tool", "tool_call_id": item.get("call_id"), "content": answer}))
            case kind:
                raise RequestError(
                    f"{where}.type is {kind!r}, but must be message, reasoning, function_call or function_call_output.",
                    f"{where}.type",
                )
    return [Message.of(_joined(message), where) for where, message in plain]


def _assistant(plain: list[tuple[str, dict[str, Any]]], where: str, *, fresh: bool) -> dict[str, Any]:
    """The assistant message that the next item belongs to."""
    if not fresh and plain and plain[-1][1]["role"] == "assistant":
        return plain[-1][1]
    plain.append((where, {"role": "assistant", "content": None}))
    return plain[-1][1]


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def thoughts(item: Mapping[str, Any]) -> str | None:
    parts = item.get("content") or item.get("summary") or ()
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping)) or None


def _content(content: Any, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}.content must be text or a list of parts.", f"{where}.content")
    return [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    match kind:
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": part.get("text")}
        case "refusal":
            return {"type": "text", "text": part.get("refusal")}
        case "input_image":
            detail = {"detail": part["detail"]} if part.get("detail") else {}
            return {"type": "image_url", "image_url": {"url": part.get("image_url")}, **detail}
        case "input_audio":
            return {"type": "input_audio", "input_audio": part.get("input_audio")}
        case _:
            raise RequestError(
                f"{where}.type is {kind!r}, but must be input_text, output_text, input_image or input_audio.",
                f"{where}.type",
            )
