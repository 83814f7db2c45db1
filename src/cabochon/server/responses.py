"""Responses: OpenAI's request to an `Ask`, events to a response object and its stream of events. Pure functions.

Thinking is an output item of type `reasoning` whose content is the text itself (`reasoning_text`); it is not encrypted
and may be sent back, where it counts while the tool loop lasts, as in a chat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..chat.events import ArgumentsDelta, Event, Finish, TextDelta, ThinkingDelta, ToolCallDelta, Usage, Warned
from ..chat.messages import Message, Tool
from ..chat.tokenizer import Tokenizer
from ..engine.request import SamplingParams, TokenLogprob
from ..errors import RequestError
from . import wire
from .answers import logprob_entries
from .ask import Ask, Shape, thinking, tool_rules, unique_names

LOGPROBS = "message.output_text.logprobs"
"""What `include` holds for logprobs of the text; `top_logprobs` asks for them as well."""

# Reading ------------------------------------------------------------------------------------------------------------


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
        params=SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_output_tokens,
            logprobs=request.top_logprobs if request.top_logprobs or LOGPROBS not in (request.include or ()) else 0,
        ),
        tools=tools,
        callable=() if request.tool_choice == "none" else tool_rules(tools, names, "tool_choice"),
        must_call=must_call,
        many_calls=request.parallel_tool_calls is not False,
        shape=_format(request.text.format if request.text else None),
        thinking=think,
        budget=budget,
    )


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
                _assistant(plain, where, fresh=True)["reasoning"] = _thoughts(item)
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


def _thoughts(item: Mapping[str, Any]) -> str | None:
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


# Writing ------------------------------------------------------------------------------------------------------------

Named = Callable[[str], str]
"""Makes an identity with the given prefix."""


class ResponseWriter:
    """Writes one response: its object at any moment, and the stream of events that leads there."""

    def __init__(
        self,
        identity: str,
        created: int,
        model: str,
        request: wire.ResponsesRequest,
        named: Named,
        tokenizer: Tokenizer,
    ) -> None:
        self.identity = identity
        self.output: list[dict[str, Any]] = []
        self.status = "in_progress"
        self._created = created
        self._model = model
        self._request = request
        self._named = named
        self._tokenizer = tokenizer
        self._waiting: list[TokenLogprob] = []
        """Of tokens whose text is still held back."""
        self._usage: Usage | None = None
        self._details: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._warnings: list[str] = []
        self._sequence = -1
        self._open: str | None = None

    def object(self) -> dict[str, Any]:
        """The response as it stands."""
        request = self._request
        text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
        whole = {
            "id": self.identity,
            "object": "response",
            "created_at": self._created,
            "status": self.status,
            "background": bool(request.background),
            "error": self._error,
            "incomplete_details": self._details,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": [dict(item) for item in self.output],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": request.store is not False,
            "temperature": request.temperature,
            "text": text or {"format": {"type": "text"}},
            "tool_choice": _dumped(request.tool_choice) or "auto",
            "tools": [_dumped(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None if self._usage is None else usage_object(self._usage),
        }
        return whole | ({"warnings": self._warnings} if self._warnings else {})

    def message(self) -> Message:
        """The finished output as the conversation's next message."""
        said = [item for item in self.output if item["type"] != "reasoning" and item["status"] == "completed"]
        joined = read_input(said)
        text = tuple(part for message in joined for part in message.content)
        calls = tuple(call for message in joined for call in message.tool_calls)
        thoughts = [item for item in self.output if item["type"] == "reasoning"]
        return Message("assistant", text, _thoughts(thoughts[0]) if thoughts else None, calls)

    def start(self) -> list[dict[str, Any]]:
        return [
            self._event("response.created", response=self.object()),
            self._event("response.in_progress", response=self.object()),
        ]

    def events(self, events: Iterable[Event], logprobs: Sequence[TokenLogprob] = ()) -> list[dict[str, Any]]:
        """The stream's events for one step; the response's state moves along."""
        written: list[dict[str, Any]] = []
        self._wait(logprobs)
        for event in events:
            match event:
                case TextDelta(text):
                    written += self._item("message") + self._say(text)
                case ThinkingDelta(text):
                    written += self._item("reasoning") + self._think(text)
                case ArgumentsDelta():
                    written += self._argue(event)
                case ToolCallDelta():
                    written += self._end_call("completed")
                case Warned(text):
                    self._warnings.append(text)
                case Finish():
                    written += [*self._close(), self._finish(event)]
        return written

    def stop(self, status: str, error: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """End without a `Finish`: cancelled or failed."""
        written = self._close()
        self.status, self._error = status, error
        return [*written, self._event(f"response.{status}", response=self.object())]

    # Items ----------------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence, **fields}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, "content_index": 0}

    def _item(self, kind: str) -> list[dict[str, Any]]:
        """Open an item of text or thinking unless one is open."""
        if self._open == kind:
            return []
        written = self._close()
        self._open = kind
        if kind == "message":
            item: dict[str, Any] = {
                "id": self._named("msg"),
                "type": kind,
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": self._named("rs"), "type": kind, "summary": [], "status": "in_progress", "content": []}
            part = {"type": "reasoning_text", "text": ""}
        self.output.append(item)
        written.append(self._event("response.output_item.added", output_index=len(self.output) - 1, item=dict(item)))
        item["content"] = [part]
        return [*written, self._event("response.content_part.added", **self._place(), part=dict(part))]

    def _wait(self, logprobs: Iterable[TokenLogprob]) -> None:
        """Keep those of the answer's tokens, not those of thoughts, calls and turn ends."""
        tokens = self._tokenizer
        for one in logprobs:
            if one.token_id in (tokens.channel_open, tokens.channel_close, tokens.tool_call_open):
                self._waiting.clear()
            elif one.token_id not in tokens.control:
                self._waiting.append(one)

    def _say(self, text: str) -> list[dict[str, Any]]:
        part, entries = self.output[-1]["content"][0], logprob_entries(self._tokenizer, self._waiting)
        self._waiting.clear()
        part["text"] += text
        part["logprobs"] += entries
        return [self._event("response.output_text.delta", **self._place(), delta=text, logprobs=entries)]

    def _think(self, text: str) -> list[dict[str, Any]]:
        self._waiting.clear()
        self.output[-1]["content"][0]["text"] += text
        return [self._event("response.reasoning_text.delta", **self._place(), delta=text)]

    def _close(self) -> list[dict[str, Any]]:
        """Close the open item."""
        if self._open is None:
            return []
        if self._open == "function_call":
            return self._break_call()
        item, part = self.output[-1], self.output[-1]["content"][0]
        kind = "response.output_text.done" if self._open == "message" else "response.reasoning_text.done"
        more = {"logprobs": part["logprobs"]} if self._open == "message" else {}
        self._open = None
        item["status"] = "completed"
        return [
            self._event(kind, **self._place(), text=part["text"], **more),
            self._event("response.content_part.done", **self._place(), part=dict(part)),
            self._event("response.output_item.done", output_index=len(self.output) - 1, item=dict(item)),
        ]

    def _argue(self, event: ArgumentsDelta) -> list[dict[str, Any]]:
        """A piece of a call, which it opens if need be."""
        self._waiting.clear()
        written: list[dict[str, Any]] = []
        if self._open != "function_call":
            written += self._close()
            self._open = "function_call"
            item = {"id": self._named("fc"), "type": "function_call", "call_id": event.id, "name": event.name}
            self.output.append({**item, "arguments": "", "status": "in_progress"})
            opened = {"output_index": len(self.output) - 1, "item": dict(self.output[-1])}
            written.append(self._event("response.output_item.added", **opened))
        self.output[-1]["arguments"] += event.text
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        return [*written, self._event("response.function_call_arguments.delta", **place, delta=event.text)]

    def _break_call(self) -> list[dict[str, Any]]:
        """The reply ended within a call: who saw it begin is told; whole replies leave it out."""
        if self._request.stream:
            return self._end_call("incomplete")
        self._open = None
        self.output.pop()
        return []

    def _end_call(self, status: str) -> list[dict[str, Any]]:
        self._open, item = None, self.output[-1]
        item["status"] = status
        place = {"item_id": item["id"], "output_index": len(self.output) - 1}
        spelt = {"name": item["name"], "arguments": item["arguments"]}
        return [
            self._event("response.function_call_arguments.done", **place, **spelt),
            self._event("response.output_item.done", output_index=place["output_index"], item=dict(item)),
        ]

    def _finish(self, finish: Finish) -> dict[str, Any]:
        self._usage = finish.usage
        if finish.reason in ("length", "loop"):
            self.status = "incomplete"
            self._details = {"reason": "max_output_tokens" if finish.reason == "length" else "loop"}
        else:
            self.status = "completed"
        return self._event(f"response.{self.status}", response=self.object())


def _dumped(value: Any) -> Any:
    return value.model_dump(exclude_none=True, by_alias=True) if isinstance(value, wire.Wire) else value


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
