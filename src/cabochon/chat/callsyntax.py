"""Gemma 4's own notation for tools: declarations, calls, responses and the values inside them.

It looks like JSON and isn't: keys are bare, objects are sorted by key, strings stand between two `<|"|>` tokens with
nothing escaped, because a quote that is a token of its own can't occur in text. So a value can't be written as one
string and tokenised later; it is written into a `Writer`, text as text and quotes as token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from .messages import Media, MediaSlot, Tool, ToolCall
from .tokenizer import Tokenizer

_DEEPEST = 100
_STANDARD_KEYS = ("description", "type", "properties", "required", "nullable")


class Writer:
    """Ids of a prompt in the making.

    Text waits until the next control token, because BPE must see the whole stretch between two control tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.slots: list[MediaSlot] = []
        self.written: list[tuple[int, int]] = []
        self._waiting: list[str] = []
        self._written_from: int | None = None

    def text(self, text: str) -> None:
        """Add text; no part of it becomes a control token."""
        if text:
            self._waiting.append(text)

    def control(self, token_id: int) -> None:
        """Add one control token."""
        self._flush()
        self.ids.append(token_id)

    def quoted(self, text: str) -> None:
        """Add a string between two quote tokens."""
        self.control(self.tokenizer.quote)
        self.text(text)
        self.control(self.tokenizer.quote)

    def media(self, media: Media) -> None:
        """Add a media part's placeholder."""
        token_id = {"image": self.tokenizer.image, "audio": self.tokenizer.audio, "video": self.tokenizer.video}[
            media.kind
        ]
        if token_id is None:
            raise RequestError(f"The message holds {media.kind} input, but this model's tokenizer has no token for it.")
        self.control(token_id)
        self.slots.append(MediaSlot(media, len(self.ids) - 1, 1))

    def mark(self) -> int:
        """Tokens so far. Only after a control token or a line end, where no BPE merge reaches across."""
        self._flush()
        return len(self.ids)

    def begin_written(self) -> None:
        """What follows is the model's own writing (no effect while that is so already)."""
        if self._written_from is None:
            self._written_from = self.mark()

    def end_written(self) -> None:
        """The model's own writing ended with the last control token."""
        end = self.mark()
        if self._written_from is not None and end > self._written_from:
            self.written.append((self._written_from, end))
        self._written_from = None

    def _flush(self) -> None:
        if self._waiting:
            self.ids += self.tokenizer.encode("".join(self._waiting))
            self._waiting.clear()


def write_call(out: Writer, call: ToolCall) -> None:
    """`<|tool_call>call:NAME{key:value,...}<tool_call|>`"""
    out.control(out.tokenizer.tool_call_open)
    out.text(f"call:{call.name}")
    _write_object(out, call.arguments, bare_keys=True, depth=0)
    out.control(out.tokenizer.tool_call_close)


def write_response(out: Writer, name: str, response: Any) -> None:
    """`<|tool_response>response:NAME{key:value,...}<tool_response|>`; what is no mapping is called `value`."""
    out.control(out.tokenizer.tool_response_open)
    out.end_written()  # The model writes this opener itself: it stops there to be answered.
    out.text(f"response:{name}")
    mapping = response if isinstance(response, Mapping) else {"value": response}
    _write_object(out, mapping, bare_keys=True, depth=0)
    out.control(out.tokenizer.tool_response_close)


def write_declaration(out: Writer, tool: Tool) -> None:
    """`<|tool>declaration:NAME{description:...,parameters:{...},response:{...}}<tool|>`"""
    out.control(out.tokenizer.tool_open)
    out.text(f"declaration:{tool.name}{{description:")
    out.quoted(tool.description)
    if tool.parameters:
        out.text(",parameters:{")
        if tool.parameters.get("properties"):
            out.text("properties:{")
            _write_properties(out, tool.parameters["properties"], depth=0)
            out.text("},")
        if tool.parameters.get("required"):
            _write_required(out, tool.parameters["required"])
            out.text(",")
        out.text("type:")
        out.quoted(str(tool.parameters.get("type") or "object").upper())
        out.text("}")
    if tool.response is not None:
        out.text(",response:{")
        if tool.response.get("description"):
            out.text("description:")
            out.quoted(str(tool.response["description"]))
            out.text(",")
        out.text("type:")
        out.quoted(str(tool.response.get("type") or "object").upper())
        out.text("}")
    out.text("}")
    out.control(out.tokenizer.tool_close)


def _write_value(out: Writer, value: Any, bare_keys: bool, depth: int) -> None:
    if value is None:
        out.text("null")
    elif isinstance(value, str):
        out.quoted(value)
    elif isinstance(value, bool):
        out.text("true" if value else "false")
    elif isinstance(value, Mapping):
        _write_object(out, value, bare_keys, depth)
    elif isinstance(value, Sequence):
        _check_depth(depth)
        out.text("[")
        for i, item in enumerate(value):
            out.text("," if i else "")
            _write_value(out, item, bare_keys, depth + 1)
        out.text("]")
    else:
        out.text(str(value))


def _write_object(out: Writer, mapping: Mapping[str, Any], bare_keys: bool, depth: int) -> None:
    _check_depth(depth)
    out.text("{")
    for i, (key, value) in enumerate(_sorted(mapping)):
        out.text("," if i else "")
        if bare_keys:
            out.text(key)
        else:
            out.quoted(key)
        out.text(":")
        _write_value(out, value, bare_keys, depth + 1)
    out.text("}")


def _sorted(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """By key, upper and lower case alike; keys that differ only in case stay in their order."""
    return sorted(((str(key), value) for key, value in mapping.items()), key=lambda pair: pair[0].lower())


def _check_depth(depth: int) -> None:
    if depth > _DEEPEST:
        raise RequestError(f"A tool's schema, arguments or response is nested more than {_DEEPEST} levels deep.")


# Schemas ------------------------------------------------------------------------------------------------------------


def _write_properties(out: Writer, properties: Mapping[str, Any], depth: int, skip: Sequence[str] = ()) -> None:
    """`key:{description:...,type:...},...`, sorted by key."""
    _check_depth(depth)
    shown = [(key, schema) for key, schema in _sorted(properties) if key not in skip]
    for i, (key, schema) in enumerate(shown):
        out.text("," if i else "")
        out.text(f"{key}:{{")
        _write_property(out, schema if isinstance(schema, Mapping) else {}, depth)
        out.text("}")


def _write_property(out: Writer, schema: Mapping[str, Any], depth: int) -> None:
    """A property's fields in the published order; other keywords of JSON schema aren't shown to the model."""
    kinds, nullable = _kinds(schema)
    if schema.get("description"):
        out.text("description:")
        out.quoted(str(schema["description"]))
        out.text(",")
    if "STRING" in kinds and schema.get("enum"):
        out.text("enum:")
        _write_value(out, schema["enum"], bare_keys=False, depth=depth + 1)
        out.text(",")
    if "ARRAY" in kinds and isinstance(schema.get("items"), Mapping) and schema["items"]:
        out.text("items:{")
        _write_items(out, schema["items"], depth + 1)
        out.text("},")
    if nullable:
        out.text("nullable:true,")
    if "OBJECT" in kinds:
        out.text("properties:{")
        inner = schema.get("properties")
        if isinstance(inner, Mapping):
            _write_properties(out, inner, depth + 1)
        else:
            # An object without `properties` shows its unknown keywords as if they were some.
            _write_properties(out, schema, depth + 1, skip=_STANDARD_KEYS)
        out.text("},")
        if schema.get("required"):
            _write_required(out, schema["required"])
            out.text(",")
    out.text("type:")
    if len(kinds) == 1:
        out.quoted(kinds[0])
    else:
        _write_value(out, kinds, bare_keys=False, depth=depth + 1)


def _kinds(schema: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The types in capitals, and whether null is allowed. `["string", "null"]` means a nullable string."""
    kind = schema.get("type", "")
    if not isinstance(kind, list | tuple):
        return [str(kind).upper()], bool(schema.get("nullable"))
    kinds = [str(k).upper() for k in kind if k not in ("null", None)]
    return kinds or ["NULL"], bool(schema.get("nullable")) or len(kinds) < len(kind)


def _write_items(out: Writer, items: Mapping[str, Any], depth: int) -> None:
    """The schema of an array's items: every keyword is shown, sorted."""
    shown = [(key, value) for key, value in _sorted(items) if value is not None]
    for i, (key, value) in enumerate(shown):
        out.text("," if i else "")
        if key == "properties":
            out.text("properties:{")
            if isinstance(value, Mapping):
                _write_properties(out, value, depth + 1)
            out.text("}")
        elif key == "required":
            _write_required(out, value)
        elif key == "type":
            out.text("type:")
            upper = value.upper() if isinstance(value, str) else [str(kind).upper() for kind in value]
            _write_value(out, upper, bare_keys=False, depth=depth + 1)
        else:
            out.text(f"{key}:")
            _write_value(out, value, bare_keys=False, depth=depth + 1)


def _write_required(out: Writer, names: Sequence[str]) -> None:
    out.text("required:[")
    for i, name in enumerate(names):
        out.text("," if i else "")
        out.quoted(str(name))
    out.text("]")


# Reading ------------------------------------------------------------------------------------------------------------


class MalformedCallError(ValueError):
    """Why a call can't be read, for a warning."""


NAME = re.compile(r"\s*call:\s*([^\s{}][^{}]*?)\s*(?=\{)")
MARKS = re.compile(r"[{}\[\]:,]|[^{}\[\]:,]+")
_INTEGER = re.compile(r"-?(0|[1-9]\d*)")
_FLOAT = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_LITERALS = {"null": None, "None": None, "true": True, "True": True, "false": False, "False": False}


def read_call(segments: Sequence[str]) -> tuple[ToolCall, bool]:
    """Read what stood between `<|tool_call>` and `<tool_call|>`, cut at the quote tokens.

    So `segments` are syntax and strings by turns, and a string may hold anything. Returns the call (without an id), and
    whether a bare word had to be taken for a string.

    Raises:
        MalformedCallError: anything else that `write_call` would not have written, white space aside.
    """
    if len(segments) % 2 == 0:
        raise MalformedCallError("a string isn't closed")
    name = NAME.match(segments[0])
    if name is None:
        raise MalformedCallError("it doesn't begin with call:NAME{")
    marks: list[str | _String] = [m for m in MARKS.findall(segments[0][name.end() :]) if m.strip()]
    for i in range(1, len(segments), 2):
        marks.append(_String(segments[i]))
        marks += [m for m in MARKS.findall(segments[i + 1]) if m.strip()]
    reader = _Reader(marks)
    arguments = reader.object(0)
    if reader.at < len(marks):
        raise MalformedCallError("something follows the arguments")
    return ToolCall(name[1], arguments), reader.loose


class _String(str):
    """Text from between two quote tokens, as against syntax."""

    __slots__ = ()


class _Reader:
    def __init__(self, marks: list[str | _String]) -> None:
        self.marks = marks
        self.at = 0
        self.loose = False

    def take(self) -> str | _String:
        if self.at == len(self.marks):
            raise MalformedCallError("it ends too early")
        self.at += 1
        return self.marks[self.at - 1]

    def take_mark(self, *allowed: str) -> str:
        mark = self.take()
        if isinstance(mark, _String) or mark not in allowed:
            raise MalformedCallError(f"{str(mark)[:40]!r} stands where {' or '.join(allowed)} should")
        return mark

    def peek(self, mark: str) -> bool:
        following = self.marks[self.at] if self.at < len(self.marks) else None
        return following == mark and not isinstance(following, _String)

    def object(self, depth: int) -> dict[str, Any]:
        self.take_mark("{")
        found: dict[str, Any] = {}
        if self.peek("}"):
            self.at += 1
            return found
        while True:
            key = self.take()
            if not isinstance(key, _String):
                key = _bare_key(key)
            self.take_mark(":")
            found[str(key)] = self.value(depth + 1)
            if self.take_mark(",", "}") == "}":
                return found

    def list(self, depth: int) -> list[Any]:
        self.take_mark("[")
        found: list[Any] = []
        if self.peek("]"):
            self.at += 1
            return found
        while True:
            found.append(self.value(depth + 1))
            if self.take_mark(",", "]") == "]":
                return found

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise MalformedCallError(f"it is nested more than {_DEEPEST} levels deep")
        if self.peek("{"):
            return self.object(depth)
        if self.peek("["):
            return self.list(depth)
        word = self.take()
        if isinstance(word, _String):
            return str(word)
        if word in tuple("{}[]:,"):
            raise MalformedCallError(f"{word!r} stands where a value should")
        value, loose = bare(word.strip())
        self.loose |= loose
        return value


def bare(word: str) -> tuple[Any, bool]:
    """A number, true, false or null. Models that forget the quote tokens mean the word itself: then the flag is set."""
    if word in _LITERALS:
        return _LITERALS[word], False
    if _FLOAT.fullmatch(word) and len(word) < 4000:
        return (int(word) if _INTEGER.fullmatch(word) else float(word)), False
    return unquoted(word), True


def _bare_key(key: str) -> str:
    if key in tuple("{}[]:,"):
        raise MalformedCallError(f"{key!r} stands where a key should")
    return unquoted(key.strip())


def unquoted(word: str) -> str:
    """Without JSON's quotation marks, if there are any."""
    try:
        plain = json.loads(word) if word.startswith('"') else word
    except ValueError:
        return word
    return str(plain)
