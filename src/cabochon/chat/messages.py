"""The values that conversations are made of. Plain data: no tokens, no tensors, no torch.

`Message.of` and `Tool.of` read the dicts that OpenAI-style and Hugging Face-style clients write. They are strict: a key
that they don't know and that says something is an error, because a misspelt `tool_calls` is otherwise a silent loss.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..errors import RequestError

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text in a message's content."""

    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """An image, a video or a sound in a message's content, still as the caller named it."""

    kind: Literal["image", "video", "audio"]
    source: str | bytes
    """A URL (http, https, data, file), a path, or the bytes themselves."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the part asked for: `max_soft_tokens`, `detail`, `fps`, `max_frames`, `format`."""


Part = Text | Media


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool. `arguments` are already parsed."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `Message.of` reads OpenAI-style dicts."""

    role: Role
    content: tuple[Part, ...] = ()
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    tool_responses: tuple[tuple[str, Any], ...] = ()
    """(tool name, response) pairs that an assistant message may carry itself. A tool message whose content is a mapping
    (or a number, a list, null) holds it here, in one pair whose name may be empty."""

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @staticmethod
    def of(message: Message | Mapping[str, Any], where: str = "message") -> Message:
        """Read one message; `where` is its name in errors, for example `messages[3]`.

        Raises:
            RequestError: unknown role or key, content of the wrong kind, arguments that aren't a JSON object; `field`
                names the place.
        """
        return message if isinstance(message, Message) else _message(_mapping(message, where), where)

    def as_dict(self) -> dict[str, Any]:
        """The OpenAI-style dict that `Message.of` reads back into an equal message."""
        out: dict[str, Any] = {"role": self.role}
        if self.role == "tool" and self.tool_responses:
            out["content"] = self.tool_responses[0][1]
        elif not self.content:
            out["content"] = None if self.role == "assistant" else []
        elif len(self.content) == 1 and isinstance(self.content[0], Text):
            out["content"] = self.text
        else:
            out["content"] = [_part_as_dict(part) for part in self.content]
        if self.thinking is not None:
            out["reasoning"] = self.thinking
        if self.tool_calls:
            out["tool_calls"] = [_call_as_dict(call) for call in self.tool_calls]
        if self.tool_responses and self.role != "tool":
            out["tool_responses"] = [{"name": name, "response": response} for name, response in self.tool_responses]
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            out["name"] = self.name
        return out


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    response: Mapping[str, Any] | None = None
    strict: bool = False

    @staticmethod
    def of(tool: Tool | Mapping[str, Any], where: str = "tool") -> Tool:
        """Read `{"type": "function", "function": {...}}`, or the inner dict alone.

        Raises:
            RequestError: no name, an unknown key, parameters that aren't a mapping.
        """
        return tool if isinstance(tool, Tool) else _tool(_mapping(tool, where), where)


def read_messages(conversation: Conversation, where: str = "messages") -> tuple[Message, ...]:
    """Read a whole conversation; errors name the index."""
    if isinstance(conversation, str | bytes | Mapping) or not isinstance(conversation, Iterable):
        raise RequestError(f"{where} is a {_kind(conversation)}, but must be a list of messages.", where)
    return tuple(Message.of(message, f"{where}[{i}]") for i, message in enumerate(conversation))


def read_tools(tools: Iterable[Tool | Mapping[str, Any]] | None, where: str = "tools") -> tuple[Tool, ...]:
    """Read a list of tools; errors name the index. Two tools of one name are an error."""
    read = tuple(Tool.of(tool, f"{where}[{i}]") for i, tool in enumerate(tools or ()))
    for i, tool in enumerate(read):
        if any(tool.name == other.name for other in read[:i]):
            raise RequestError(f"{where}[{i}] is a second tool named {tool.name!r}; give each its own name.", where)
    return read


# What the renderer hands on -----------------------------------------------------------------------------------------

ParserState = Literal["start", "thought", "content"]
"""Where the prompt leaves the model: at the start of its turn, inside an open thought, or after a closed thought or a
tool response."""


@dataclass(frozen=True, slots=True)
class MediaSlot:
    """A media part's place in a prompt: before expansion a single placeholder token, afterwards all its soft tokens."""

    media: Media
    start: int
    """Index of the first token that belongs to the part (its begin marker once expanded)."""
    length: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the model reads it."""

    token_ids: tuple[int, ...]
    state: ParserState = "start"
    boundaries: tuple[int, ...] = ()
    """Token counts up to which the next turn of the same conversation will share ids with this prompt (ascending)."""
    media: tuple[MediaSlot, ...] = ()
    notices: tuple[str, ...] = ()
    """Things the caller should be told once, for example that `<|think|>` in the system prompt switched thinking on."""
    written: tuple[tuple[int, int], ...] = ()
    """[start, end) of the tokens that the model itself would have written: what training takes its loss from."""


Conversation = Sequence[Message | Mapping[str, Any]]


# Reading dicts ------------------------------------------------------------------------------------------------------

_MESSAGE_KEYS = {
    *("role", "content", "reasoning", "reasoning_content", "tool_calls", "tool_call_id", "name", "tool_responses"),
}
_MEDIA_OPTIONS = {"max_soft_tokens", "detail", "fps", "max_frames", "num_frames", "sound", "split", "format"}
_MEDIA_TYPES: dict[str, Literal["image", "video", "audio"]] = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}


def _message(raw: Mapping[str, Any], where: str) -> Message:
    role: Any = raw.get("role")
    if role not in get_args(Role):
        allowed = ", ".join(get_args(Role))
        came = "is missing" if role is None else f"is {role!r}"
        raise RequestError(f"{where}.role {came}, but must be one of {allowed}.", f"{where}.role")
    _no_strangers(raw, _MESSAGE_KEYS, where)
    content: Any = raw.get("content")
    data: tuple[tuple[str, Any], ...] = ()
    if role == "tool" and not isinstance(content, str) and not _is_parts(content):
        data, content = (("", content),), None
    thinking = raw.get("reasoning") or raw.get("reasoning_content")
    return Message(
        role,
        _content(content, f"{where}.content"),
        None if thinking is None else _text(thinking, f"{where}.reasoning"),
        _tool_calls(raw.get("tool_calls"), role, f"{where}.tool_calls"),
        _optional_text(raw, "tool_call_id", where),
        _optional_text(raw, "name", where),
        data or _tool_responses(raw.get("tool_responses"), role, f"{where}.tool_responses"),
    )


def _is_parts(content: Any) -> bool:
    """A list of content parts, as against a list that a tool returned."""
    known = {"text", *_MEDIA_TYPES}
    return isinstance(content, list | tuple) and all(isinstance(p, Mapping) and p.get("type") in known for p in content)


def _content(content: Any, where: str) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (Text(content),)
    if isinstance(content, list | tuple):
        return tuple(_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    raise RequestError(f"{where} is a {_kind(content)}, but must be text or a list of parts.", where)


def _part(raw: Any, where: str) -> Part:
    if isinstance(raw, Text | Media):
        return raw
    raw = _mapping(raw, where)
    kind = raw.get("type")
    if kind == "text":
        _no_strangers(raw, {"type", "text"}, where)
        return Text(_text(raw.get("text"), f"{where}.text"))
    if kind not in _MEDIA_TYPES:
        allowed = ", ".join(["text", *_MEDIA_TYPES])
        raise RequestError(f"{where}.type is {kind!r}, but must be one of {allowed}.", f"{where}.type")
    return _media(raw, kind, where)


def _media(raw: Mapping[str, Any], kind: str, where: str) -> Media:
    """The source stands under the part's own type (as text, bytes or a dict of url/data), or under `url` or `path`."""
    names = [name for name in dict.fromkeys([kind, _MEDIA_TYPES[kind], "url", "path"]) if raw.get(name) is not None]
    if len(names) != 1:
        came = " and ".join(names) if names else "no source"
        raise RequestError(f"{where} has {came}, but needs exactly one of {kind}, url or path.", where)
    _no_strangers(raw, {"type", names[0], *_MEDIA_OPTIONS}, where)
    options = {name: raw[name] for name in _MEDIA_OPTIONS if raw.get(name) is not None}
    source, where = raw[names[0]], f"{where}.{names[0]}"
    if isinstance(source, Mapping):
        _no_strangers(source, {"url", "data", *_MEDIA_OPTIONS}, where)
        options |= {name: source[name] for name in _MEDIA_OPTIONS if source.get(name) is not None}
        source = _decoded(source["data"], f"{where}.data") if source.get("data") is not None else source.get("url")
    if not isinstance(source, str | bytes) or not source:
        raise RequestError(f"{where} is a {_kind(source)}, but must be a URL, a path or bytes.", where)
    return Media(_MEDIA_TYPES[kind], source, options)


def _decoded(data: Any, where: str) -> bytes:
    try:
        return base64.b64decode(_text(data, where), validate=True)
    except binascii.Error as error:
        raise RequestError(f"{where} isn't base64 ({error}).", where) from None


def _tool_calls(raw: Any, role: str, where: str) -> tuple[ToolCall, ...]:
    if not raw:
        return ()
    if role != "assistant":
        raise RequestError(f"{where} stands in a {role} message, but only an assistant calls tools.", where)
    if not isinstance(raw, list | tuple):
        raise RequestError(f"{where} is a {_kind(raw)}, but must be a list of calls.", where)
    return tuple(_tool_call(call, f"{where}[{i}]") for i, call in enumerate(raw))


def _tool_call(raw: Any, where: str) -> ToolCall:
    if isinstance(raw, ToolCall):
        return raw
    raw = _mapping(raw, where)
    _no_strangers(raw, {"id", "type", "function", "index"}, where)
    if raw.get("type") not in (None, "function"):
        raise RequestError(f"{where}.type is {raw['type']!r}, but only 'function' is known.", f"{where}.type")
    function = _mapping(raw.get("function"), f"{where}.function")
    _no_strangers(function, {"name", "arguments"}, f"{where}.function")
    name = _text(function.get("name"), f"{where}.function.name")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    return ToolCall(name, arguments, _optional_text(raw, "id", where) or "")


def _arguments(raw: Any, where: str) -> Mapping[str, Any]:
    """OpenAI's clients send the arguments as JSON text, Hugging Face's as a mapping."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} isn't JSON ({error}).", where) from None
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise RequestError(f"{where} is a {_kind(raw)}, but must be a JSON object.", where)
    return raw


def _tool_responses(raw: Any, role: str, where: str) -> tuple[tuple[str, Any], ...]:
    if not raw:
        return ()
    if role != "assistant" or not isinstance(raw, list | tuple):
        raise RequestError(f"{where} must be a list in an assistant message.", where)
    pairs = [_mapping(pair, f"{where}[{i}]") for i, pair in enumerate(raw)]
    return tuple((str(pair.get("name") or ""), pair.get("response")) for pair in pairs)


def _tool(raw: Mapping[str, Any], where: str) -> Tool:
    if "function" in raw:
        _no_strangers(raw, {"type", "function"}, where)
        if raw.get("type") not in (None, "function"):
            raise RequestError(f"{where}.type is {raw['type']!r}, but only 'function' is known.", f"{where}.type")
        where = f"{where}.function"
        raw = _mapping(raw["function"], where)
    _no_strangers(raw, {"type", "name", "description", "parameters", "response", "strict"}, where)
    name = _text(raw.get("name"), f"{where}.name")
    if not name.strip():
        raise RequestError(f"{where}.name is empty; a tool needs a name.", f"{where}.name")
    schemas = {key: raw.get(key) for key in ("parameters", "response")}
    for key, schema in schemas.items():
        if schema is not None and not isinstance(schema, Mapping):
            raise RequestError(f"{where}.{key} is a {_kind(schema)}, but must be a JSON schema.", f"{where}.{key}")
    if schemas["parameters"]:
        _check_parameters(schemas["parameters"], f"{where}.parameters")
    description = _optional_text(raw, "description", where) or ""
    return Tool(name, description, schemas["parameters"], schemas["response"], bool(raw.get("strict")))


def _check_parameters(schema: Mapping[str, Any], where: str) -> None:
    """What the renderer walks through must have the shape that JSON schema gives it."""
    properties, required = schema.get("properties"), schema.get("required")
    if properties is not None:
        _mapping(properties, f"{where}.properties")
    if required is not None and not isinstance(required, list | tuple):
        raise RequestError(f"{where}.required is a {_kind(required)}, but must be a list.", f"{where}.required")


def _mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise RequestError(f"{where} is a {_kind(raw)}, but must be an object.", where)
    return raw


def _text(raw: Any, where: str) -> str:
    if not isinstance(raw, str):
        raise RequestError(f"{where} is a {_kind(raw)}, but must be text.", where)
    return raw


def _optional_text(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    return None if raw.get(key) is None else _text(raw[key], f"{where}.{key}")


def _no_strangers(raw: Mapping[str, Any], known: set[str], where: str) -> None:
    """Clients echo empty keys (`"refusal": null`); a key that holds something must be known."""
    for key, value in raw.items():
        if key not in known and value not in (None, "", [], {}):
            allowed = ", ".join(sorted(known))
            raise RequestError(f"{where}.{key} isn't known here; known are {allowed}.", f"{where}.{key}")


def _kind(value: Any) -> str:
    """A value's kind in the words of JSON, for errors."""
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (type(None), "null"),
        (bool, "boolean"),
        ((int, float), "number"),
        (str, "text"),
        (Mapping, "object"),
        ((list, tuple), "list"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def _call_as_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)}
    return ({"id": call.id} if call.id else {}) | {"type": "function", "function": function}


def _part_as_dict(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    source = {"url": part.source} if isinstance(part.source, str) else {"data": base64.b64encode(part.source).decode()}
    return {"type": part.kind, part.kind: source, **part.options}
