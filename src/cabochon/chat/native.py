"""Tool schemas as a grammar of the model's own call syntax, `call:name{key:<|"|>text<|"|>,n:1}`.

What is unusual: JSON is not involved. Strings stand between two single tokens and hold anything but control tokens, so
nothing is escaped and a grammar over tokens is exact. Declared keys come in the order in which the published template
sorts them, which is the order that the model was trained on.
The result is text in llguidance's dialect of Lark.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from .messages import Tool
from .patterns import FORMATS, lexeme, whole
from .schema import ANNOTATIONS, BEYOND, SHAPE, Findings, Schema, check_schema, exclusive, merge, resolve, types_of

QUOTE = "quote"
"""The rule that stands for the token `<|"|>`."""

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_LARGEST = 10**18
"""Integers without bounds stay within 18 digits, so that every client can read them."""

_MOST_RULES = 20_000
_DEEPEST = 100

_COMMON = r"""
string: quote TEXT quote
TEXT: /(?s:.*)/
INTEGER: /-?(?:0|[1-9][0-9]{0,17})/
NUMBER: /-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,17})?(?:[eE][+-]?[0-9]{1,2})?/
KEY: /[A-Za-z_][A-Za-z0-9_-]{0,63}/
any: string | NUMBER | "true" | "false" | "null" | any_array | any_object
any_array: "[" (any ("," any)*)? "]"
any_object: "{" (KEY ":" any ("," KEY ":" any)*)? "}"
"""


def call_grammar(tools: Sequence[Tool], quote: int, close: int) -> tuple[str, dict[str, list[str]]]:
    """The grammar of one call of one of `tools`, from `call:` to the closing token, and per tool what it can't hold.

    `quote` and `close` are the ids of `<|"|>` and `<tool_call|>`. A tool with `strict` raises `RequestError` that names
    the first keyword beyond the grammar.
    """
    lines, alternatives = [], []
    beyond: dict[str, list[str]] = {}
    for index, tool in enumerate(tools):
        field = f"tools[{index}].function.parameters"
        schema = {"type": "object", "properties": {}} if tool.parameters is None else tool.parameters
        check_schema(schema, field)
        compiler = _Native(schema, field, prefix=f"t{index}")
        arguments = compiler.arguments()
        if tool.strict and compiler.findings.paths:
            raise RequestError(
                f"{field} asks for {compiler.findings.paths[0]!r}, which can't be enforced; "
                "remove it or leave out strict to have it checked after the call.",
                f"{field}.{compiler.findings.paths[0]}",
            )
        if compiler.findings.paths:
            beyond[tool.name] = compiler.findings.paths
        alternatives.append(f"{json.dumps(f'call:{tool.name}', ensure_ascii=False)} {arguments}")
        lines += compiler.lines
    head = [f"start: ({' | '.join(alternatives)}) <[{close}]>", f"quote: <[{quote}]>"]
    return "\n".join([*head, *lines]) + _COMMON, beyond


class _Native:
    """One tool's schema on its way to rules named `<prefix>_<number>`."""

    def __init__(self, root: Schema, field: str, prefix: str) -> None:
        self.root = root
        self.field = field
        self.prefix = prefix
        self.lines: list[str] = []
        self.findings = Findings()
        self.referenced: dict[str, str] = {}
        self.depth = 0

    def arguments(self) -> str:
        """The name of the rule for the whole argument object."""
        schema, path = self._flat(self.root, "")
        if "object" not in (types_of(schema) or ["object"]):
            raise RequestError(
                f"{self.field} describes {schema['type']!r}, but a tool's parameters are an object.", self.field
            )
        return self._object(schema, path)

    # Rules ----------------------------------------------------------------------------------------------------------

    def _rule(self, body: str) -> str:
        if len(self.lines) >= _MOST_RULES:
            raise RequestError(
                f"{self.field} needs more than {_MOST_RULES} grammar rules; make it smaller.", self.field
            )
        name = f"{self.prefix}_{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"{self.prefix}_{len(self.lines)}".upper()
        self.lines.append(f"{name}: {body}")
        return name

    def _later(self) -> tuple[str, int]:
        """A rule's name before its body is known (recursion)."""
        self.lines.append("")
        return f"{self.prefix}_{len(self.lines) - 1}", len(self.lines) - 1

    # Schemas --------------------------------------------------------------------------------------------------------

    def _value(self, schema: Any, path: str) -> str:
        """An expression for any value that `schema` allows."""
        self.depth += 1
        if self.depth > _DEEPEST:
            raise RequestError(
                f"{self.field} is nested more than {_DEEPEST} levels deep or refers to itself without end.", self.field
            )
        try:
            return self._expression(schema, path)
        finally:
            self.depth -= 1

    def _expression(self, schema: Any, path: str) -> str:
        if schema is True or schema == {}:
            return "any"
        if schema is False:
            raise RequestError(f"{self.field}.{path} is false, so that no value would ever be valid.", self.field)
        if "$ref" in schema and not (schema.keys() - {"$ref"} - ANNOTATIONS):
            return self._reference(schema["$ref"], path)
        schema, path = self._flat(schema, path)
        branches = schema.get("anyOf") or schema.get("oneOf")
        if branches:
            return self._choice(schema, "anyOf" if "anyOf" in schema else "oneOf", branches, path)
        self._note(schema, path)
        if "const" in schema or "enum" in schema:
            return self._literals(schema, path)
        kinds = types_of(schema)
        return self._rule(" | ".join(self._typed(schema, kind, path) for kind in kinds)) if kinds else "any"

    def _reference(self, pointer: str, path: str) -> str:
        if pointer not in self.referenced:
            name, line = self._later()
            self.referenced[pointer] = name
            self.lines[line] = f"{name}: {self._value(resolve(self.root, pointer, self.field), path)}"
        return self.referenced[pointer]

    def _flat(self, schema: Schema, path: str) -> tuple[Schema, str]:
        """`schema` with `$ref` beside other keywords and `allOf` folded in."""
        for _ in range(64):
            if "$ref" in schema:
                target, rest = resolve(self.root, schema["$ref"], self.field), _without(schema, "$ref")
                others = [target]
            elif "allOf" in schema:
                others, rest = list(schema["allOf"]), _without(schema, "allOf")
            else:
                return schema, path
            for other in others:
                if other is False:
                    raise RequestError(
                        f"{self.field}.{path} is false, so that no value would ever be valid.", self.field
                    )
                rest, clashes = merge(rest, {} if other is True else other)
                for keyword in clashes:
                    self.findings.add(path, f"allOf.{keyword}")
            schema = rest
        raise RequestError(f"{self.field}.{path} refers to itself without end.", self.field)

    def _choice(self, schema: Schema, keyword: str, branches: list[Any], path: str) -> str:
        if keyword == "oneOf" and not exclusive(
            [self._flat(branch, path)[0] if isinstance(branch, Mapping) else branch for branch in branches]
        ):
            self.findings.add(path, "oneOf")
        rest = _without(schema, keyword)
        asked = rest.keys() - ANNOTATIONS
        options = []
        for index, branch in enumerate(branches):
            where = f"{path}.{keyword}[{index}]" if path else f"{keyword}[{index}]"
            if branch is False:
                continue
            options.append(self._value({"allOf": [rest, branch]} if asked else branch, where))
        return self._rule(" | ".join(dict.fromkeys(options)))

    def _note(self, schema: Schema, path: str) -> None:
        """Collect the keywords of this schema that the grammar leaves open."""
        if "patternProperties" in schema:
            raise RequestError(
                f"{self.field} has patternProperties, which no call can be held to; declare the properties by name.",
                self.field,
            )
        for keyword in sorted(schema.keys() & (BEYOND | {"minProperties", "maxProperties"})):
            harmless = keyword == "uniqueItems" and not schema[keyword]
            harmless |= keyword == "minProperties" and schema[keyword] <= len(schema.get("required", ()))
            closed = "properties" in schema and not schema.get("additionalProperties", False)
            harmless |= keyword == "maxProperties" and closed and schema[keyword] >= len(schema["properties"])
            if not harmless:
                self.findings.add(path, keyword)

    def _typed(self, schema: Schema, kind: str, path: str) -> str:
        match kind:
            case "object":
                return self._object(schema, path)
            case "array":
                return self._array(schema, path)
            case "string":
                return self._string(schema, path)
            case "integer" | "number":
                return self._number(schema, kind)
            case "boolean":
                return '("true" | "false")'
            case _:
                return '"null"'

    def _literals(self, schema: Schema, path: str) -> str:
        kinds = types_of(schema)
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if "const" in schema and "enum" in schema and schema["const"] not in schema["enum"]:
            values = []
        values = [
            value
            for value in values
            if not kinds or _kind(value) in kinds or (_kind(value) == "integer" and "number" in kinds)
        ]
        if not values:
            raise RequestError(f"{self.field}.{path} leaves no value to choose from.", self.field)
        for keyword in sorted(schema.keys() & frozenset().union(*SHAPE.values())):
            self.findings.add(path, keyword)
        return self._rule(" | ".join(_literal(value) for value in values))

    # Types ----------------------------------------------------------------------------------------------------------

    def _string(self, schema: Schema, path: str) -> str:
        wanted = []
        if "pattern" in schema:
            wanted.append(f"(?:{whole(schema['pattern'], f'{self.field}.{path}')})")
        if schema.get("format") in FORMATS:
            wanted.append(f"(?:{FORMATS[schema['format']]})")
        elif "format" in schema:
            self.findings.add(path, "format")
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if most is not None and least > most:
            raise RequestError(f"{self.field}.{path} wants at least {least} and at most {most} characters.", self.field)
        if least or most is not None:
            wanted.append(f"(?s:.{{{int(least)},{'' if most is None else int(most)}}})")
        if not wanted:
            return "string"
        return f"{QUOTE} {self._terminal(' & '.join(lexeme(expression) for expression in wanted))} {QUOTE}"

    def _number(self, schema: Schema, kind: str) -> str:
        bounds = {keyword: schema[keyword] for keyword in SHAPE["number"] if keyword in schema}
        if not bounds:
            return "INTEGER" if kind == "integer" else "NUMBER"
        if kind == "integer" and not {"minimum", "exclusiveMinimum"} & bounds.keys():
            bounds["minimum"] = -_LARGEST
        if kind == "integer" and not {"maximum", "exclusiveMaximum"} & bounds.keys():
            bounds["maximum"] = _LARGEST
        return self._rule("%json " + json.dumps({"type": kind, **bounds}))

    def _array(self, schema: Schema, path: str) -> str:
        fixed = schema.get("prefixItems", ())
        more = schema.get("items", True)
        if isinstance(more, list):
            fixed, more = more, schema.get("additionalItems", True)
        least, most = int(schema.get("minItems", 0)), schema.get("maxItems", math.inf)
        if more is False:
            most = min(most, len(fixed))
        if least > most:
            raise RequestError(f"{self.field}.{path} wants at least {least} and at most {most} items.", self.field)
        if most == 0:
            return '"[" "]"'
        heads = [self._value(item, f"{path}.prefixItems[{index}]") for index, item in enumerate(fixed)][
            : _whole(most, len(fixed))
        ]
        tail = self._value(more, f"{path}.items") if most > len(heads) else ""
        return self._rule(f'"[" {self._items(heads, tail, least, most)} "]"')

    def _items(self, heads: list[str], tail: str, least: int, most: float) -> str:
        """`heads` in order, then any number of `tail`, everything between `least` and `most` items."""
        body = ""
        if tail:
            low = max(least - len(heads), 0)
            high = "" if most == math.inf else int(most) - len(heads)
            if heads:
                body = f'("," {tail}){{{low},{high}}}'
            else:
                body = f'{tail} ("," {tail}){{{max(low - 1, 0)},{"" if high == "" else int(high) - 1}}}'
                body = body if low else f"({body})?"
        for index in range(len(heads) - 1, -1, -1):
            comma = '"," ' if index else ""
            body = f"{comma}{heads[index]} {body}"
            body = body if index < least else f"({body})?"
        return body

    def _object(self, schema: Schema, path: str) -> str:
        """Declared keys in the template's order; after them other keys, where the schema says that there may be any."""
        properties: dict[str, Any] = dict(schema.get("properties", {}))
        required = list(schema.get("required", ()))
        others = schema.get("additionalProperties", "properties" not in schema)
        for name in required:
            if properties.get(name) is False:
                raise RequestError(f"{self.field}.{path} requires {name!r}, whose schema is false.", self.field)
            if name not in properties:
                if others is False and "additionalProperties" in schema:
                    raise RequestError(f"{self.field}.{path} requires {name!r}, which it doesn't allow.", self.field)
                properties[name] = True if isinstance(others, bool) else others
        extra = "" if others is False else self._extra(properties, self._value(others, f"{path}.additionalProperties"))
        names = sorted((name for name in properties if properties[name] is not False), key=str.lower)
        first = self._rule((extra and f'({extra} ("," {extra})*)?') or '""')
        rest = self._rule((extra and f'("," {extra})*') or '""')
        for name in reversed(names):
            where = f"{path}.properties.{name}" if path else f"properties.{name}"
            pair = self._rule(f"{_key(name)} {self._value(properties[name], where)}")
            if name in required:
                first, rest = self._rule(f"{pair} {rest}"), self._rule(f'"," {pair} {rest}')
            else:
                first, rest = self._rule(f"{pair} {rest} | {first}"), self._rule(f'("," {pair})? {rest}')
        return f'"{{" {first} "}}"'

    def _extra(self, declared: Mapping[str, Any], value: str) -> str:
        names = [re.escape(name) for name in declared if _PLAIN_KEY.fullmatch(name)]
        key = self._terminal(f"KEY & ~/(?:{'|'.join(names)})/") if names else "KEY"
        return self._rule(f'{key} ":" {value}')


def _key(name: str) -> str:
    """The literal of a declared key. Keys that are no plain words stand between quote tokens, like strings."""
    if _PLAIN_KEY.fullmatch(name):
        return json.dumps(f"{name}:")
    return f'{_quoted(name)} ":"'


def _quoted(text: str) -> str:
    return f"{QUOTE} {json.dumps(text, ensure_ascii=False)} {QUOTE}" if text else f"{QUOTE} {QUOTE}"


def _literal(value: Any) -> str:
    """A constant in the model's syntax."""
    match value:
        case str():
            return _quoted(value)
        case Mapping():
            pairs = [
                f"{_key(name)} {_literal(item)}"
                for name, item in sorted(value.items(), key=lambda pair: pair[0].lower())
            ]
            return '"{" ' + ' "," '.join(pairs) + ' "}"'
        case list() | tuple():
            return '"[" ' + ' "," '.join(_literal(item) for item in value) + ' "]"'
        case _:
            return json.dumps(json.dumps(value))


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case None:
            return "null"
        case Mapping():
            return "object"
        case _:
            return "array"


def _without(schema: Schema, keyword: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != keyword}


def _whole(most: float, fallback: int) -> int:
    return fallback if most == math.inf else int(most)
