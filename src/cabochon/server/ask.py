"""What a client asked for in our own values, whatever protocol it came by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..chat.messages import Message, Tool
from ..engine.request import SamplingParams
from ..errors import RequestError
from . import wire

EFFORT_BUDGETS = {
    "none": 0,
    "minimal": 128,
    "low": 1024,
    "medium": 4096,
    "high": 16384,
    "xhigh": 65536,
    "max": None,
}
"""Most tokens of thinking per `reasoning_effort` (None: no limit); the room of the request may allow fewer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the text must look like. `value` is a schema, an expression, a grammar or a list of texts."""

    kind: Literal["json_schema", "json_object", "regex", "grammar", "choice"]
    value: Any = None
    strict: bool = True
    field: str = "response_format"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for one or more replies."""

    messages: tuple[Message, ...]
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    """All tools that the model is told about."""
    callable: tuple[Tool, ...] = ()
    """Those that it may call now."""
    must_call: bool = False
    many_calls: bool = True
    shape: Shape | None = None
    thinking: bool | None = None
    budget: int | None = None
    preserve_thinking: bool = False
    media_options: Mapping[str, Any] = field(default_factory=dict)
    """For media parts that don't say themselves how they are to be cut."""

    def __post_init__(self) -> None:
        if not self.messages:
            raise RequestError("The conversation is empty; it must hold one message or more.", "messages")


def params(request: wire.Sampling, *, max_tokens: int | None, n: int | None, logprobs: int | None) -> SamplingParams:
    """Sampling parameters of an OpenAI-style request."""
    top_k = request.top_k
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=0 if top_k == -1 else top_k,
        min_p=request.min_p,
        max_tokens=max_tokens,
        stop=stops(request.stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        seed=request.seed,
        n=n or 1,
        logprobs=logprobs,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
    )


def stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def structured(request: wire.StructuredOutputs | None) -> Shape | None:
    """vLLM's `structured_outputs`."""
    if request is None:
        return None
    wanted = {
        "json_schema": request.json_,
        "regex": request.regex,
        "choice": request.choice,
        "grammar": request.grammar,
        "json_object": True if request.json_object else None,
    }
    given = {kind: value for kind, value in wanted.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(given) or "nothing"
        raise RequestError(
            f"structured_outputs holds {names}, but must hold one of json, regex, choice, grammar, json_object.",
            "structured_outputs",
        )
    kind, value = given.popitem()
    return Shape(kind, value, field=f"structured_outputs.{'json' if kind == 'json_schema' else kind}")  # type: ignore[arg-type]  # the keys above


def thinking(
    effort: str | None, budget: int | None, switch: bool | None, budget_field: str = "thinking_token_budget"
) -> tuple[bool | None, int | None]:
    """Whether to think (None: the template's own default) and how long (None: no limit).

    An explicit budget beats the effort's; the explicit switch beats both.
    """
    if switch is False:
        return False, 0
    if budget is None and effort is not None:
        switch, budget = True, EFFORT_BUDGETS[effort]
    if budget is None:
        return switch, None
    if budget == 0 and switch is True and effort is None:
        raise RequestError(f"{budget_field} is 0 while enable_thinking is true; leave one of them out.", budget_field)
    return budget > 0, budget


def tool_rules(tools: Sequence[Tool], names: Sequence[str] | None, field_name: str) -> tuple[Tool, ...]:
    """The tools that may be called: all, or the named ones. Raises `RequestError` for a name that isn't declared."""
    if names is None:
        return tuple(tools)
    known = {tool.name: tool for tool in tools}
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "no tools at all"
            raise RequestError(f"{field_name} names {name!r}, but declared are {listed}.", field_name)
    return tuple(known[name] for name in names)


def unique_names(tools: Sequence[Tool], field_name: str = "tools") -> None:
    """Raise `RequestError` when two tools share a name."""
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            where = f"{field_name}[{index}]"
            raise RequestError(f"{where} is the second tool called {tool.name!r}.", where)
        seen.add(tool.name)


def plain_parts(content: Any) -> Any:
    """Content parts without the keys that other protocols and caches add to them."""
    if not isinstance(content, list):
        return content
    return [_plain_part(part) for part in content]


def _plain_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return {key: value for key, value in part.items() if key not in ("cache_control", "uuid", "annotations", "id")}
