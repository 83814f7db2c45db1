"""Responses: events to OpenAI's response object and to the stream of events that leads there. Pure functions.

Thinking is an output item of type `reasoning` whose content is the text itself (`reasoning_text`); it is not encrypted
and may be sent back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..chat.events import ArgumentsDelta, Event, Finish, TextDelta, ThinkingDelta, ToolCallDelta, Usage, Warned
from ..chat.messages import Message
from ..chat.tokenizer import Tokenizer
from ..engine.request import TokenLogprob
from . import wire
from .answers import logprob_entries
from .responses import read_input, thoughts

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
        reasoning = [item for item in self.output if item["type"] == "reasoning"]
        return Message("assistant", text, thoughts(reasoning[0]) if reasoning else None, calls)

    def start(self) -> list[dict[str, Any]]:
        return [
            self._event("response.created", response=self.object()),
            self._event("response.in_progress", response=self.object()),
        ]

    def events(self, events: Iterable[Event], spoken: Iterable[TokenLogprob] = ()) -> list[dict[str, Any]]:
        """The stream's events for one step, `spoken` as in a `Chunk`; the response's state moves along."""
        written: list[dict[str, Any]] = []
        self._waiting += spoken
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

    def _say(self, text: str) -> list[dict[str, Any]]:
        part, entries = self.output[-1]["content"][0], logprob_entries(self._tokenizer, self._waiting)
        self._waiting.clear()
        part["text"] += text
        part["logprobs"] += entries
        return [self._event("response.output_text.delta", **self._place(), delta=text, logprobs=entries)]

    def _think(self, text: str) -> list[dict[str, Any]]:
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
