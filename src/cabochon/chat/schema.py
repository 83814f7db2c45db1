"""JSON schemas as callers send them: checked, dereferenced and flattened so that a grammar can be made of them.

What is unusual: keywords that no grammar can hold (`not`, `uniqueItems`, ...) are neither dropped nor an error here.
They are collected with their path, so that the caller decides: refuse them by name (strict) or check what came out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, validators
from jsonschema.exceptions import SchemaError
from referencing import Registry

from ..errors import RequestError

Schema = Mapping[str, Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ANNOTATIONS = _words(
    "title description default examples deprecated readOnly writeOnly $comment $schema $id $anchor $defs definitions "
    "contentEncoding contentMediaType contentSchema discriminator externalDocs xml example nullable"
)
"""Keywords that say nothing about which values are valid."""

SHAPE = {
    "object": _words(
        "properties required additionalProperties patternProperties minProperties maxProperties propertyNames "
        "dependentRequired dependentSchemas unevaluatedProperties"
    ),
    "array": _words(
        "items prefixItems additionalItems minItems maxItems uniqueItems contains minContains maxContains "
        "unevaluatedItems"
    ),
    "string": _words("minLength maxLength pattern format"),
    "number": _words("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"),
}
"""Which keywords speak about which type; they hold for values of that type only."""

BEYOND = _words(
    "not if then else uniqueItems contains minContains maxContains propertyNames dependentRequired dependentSchemas "
    "dependencies unevaluatedProperties unevaluatedItems $dynamicRef $recursiveRef"
)
"""Keywords that no context-free grammar of reasonable size can hold."""

MAX_DEPTH = 64


@dataclass(slots=True)
class Findings:
    """What a schema asks beyond the grammar, as `path.keyword`."""

    paths: list[str] = field(default_factory=list)

    def add(self, path: str, keyword: str) -> None:
        where = f"{path}.{keyword}" if path else keyword
        if where not in self.paths:
            self.paths.append(where)


def check_schema(schema: Any, name: str) -> None:
    """Raise `RequestError` (field `name`) unless `schema` is a well-formed JSON schema without remote references."""
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"{name} is {type(schema).__name__}, but a JSON schema is an object.", name)
    _bound_depth(schema, name)
    try:
        # Without format checks: one of them would try patterns in Python's `re`, which is not where they will run.
        Draft202012Validator.check_schema(schema, format_checker=FormatChecker(formats=()))
    except SchemaError as error:
        where = ".".join(str(part) for part in error.absolute_path)
        raise RequestError(
            f"{name}{'.' + where if where else ''} is not valid JSON schema: {error.message}.", name
        ) from error
    for _path, node in subschemas(schema):
        if "$ref" in node:
            resolve(schema, node["$ref"], name)


def _bound_depth(value: Any, name: str) -> None:
    stack = [(value, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise RequestError(f"{name} is nested more than {MAX_DEPTH} levels deep; flatten it or use $defs.", name)
        children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
        stack.extend((child, depth + 1) for child in children)


def beyond(schema: Any, formats: frozenset[str]) -> list[str]:
    """Paths of everything in `schema` (references included once) that needs a check of the finished value."""
    found = Findings()
    for path, node in subschemas(schema):
        for keyword in sorted(BEYOND & node.keys()):
            if keyword != "uniqueItems" or node[keyword]:
                found.add(path, keyword)
        if isinstance(node.get("format"), str) and node["format"] not in formats:
            found.add(path, "format")
    return found.paths


def subschemas(schema: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object schema inside `schema`, itself first, with a readable path."""
    if not isinstance(schema, Mapping):
        return
    yield path, schema
    for keyword, value in schema.items():
        here = f"{path}.{keyword}" if path else keyword
        if keyword in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
            for name, child in value.items() if isinstance(value, Mapping) else ():
                yield from subschemas(child, f"{here}.{name}")
        elif keyword in ("allOf", "anyOf", "oneOf", "prefixItems", "items") and isinstance(value, list):
            for index, child in enumerate(value):
                yield from subschemas(child, f"{here}[{index}]")
        elif keyword in ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
                         "additionalItems", "unevaluatedProperties", "unevaluatedItems"):  # fmt: skip
            yield from subschemas(value, here)


def resolve(root: Any, reference: Any, name: str) -> Any:
    """What a local `$ref` points to. Raises `RequestError` for remote and dangling references."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise RequestError(
            f"{name} refers to {reference!r}, but only references inside the schema (#/$defs/...) can be followed.",
            name,
        )
    node = root
    for part in reference[1:].strip("/").split("/") if reference != "#" else ():
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            raise RequestError(f"{name} refers to {reference!r}, which does not exist in the schema.", name)
    return node


def types_of(schema: Schema) -> list[str]:
    """The types that `schema` allows. Without `type` they follow from its keywords; an empty list means any."""
    stated = schema.get("type")
    types = list(stated) if isinstance(stated, list) else [stated] if stated else []
    if not types and "enum" not in schema and "const" not in schema:
        types = [kind for kind, keywords in SHAPE.items() if keywords & schema.keys()]
    if schema.get("nullable") is True and types and "null" not in types:
        types.append("null")
    return [kind for kind in types if not (kind == "integer" and "number" in types)]


def merge(left: Schema, right: Schema) -> tuple[dict[str, Any], list[str]]:
    """A schema that asks what both ask, and the keywords for which that can't be said in one schema."""
    merged: dict[str, Any] = dict(left)
    clashes = []
    for keyword, value in right.items():
        if keyword not in merged or keyword in ANNOTATIONS or merged[keyword] == value:
            merged[keyword] = value
        elif keyword == "required":
            merged[keyword] = [*merged[keyword], *(name for name in value if name not in merged[keyword])]
        elif keyword == "properties":
            both = merged[keyword].keys() & value.keys()
            merged[keyword] = {**merged[keyword], **value} | {
                name: {"allOf": [merged[keyword][name], value[name]]} for name in both
            }
        elif keyword in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
            merged[keyword] = max(merged[keyword], value)
        elif keyword in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
            merged[keyword] = min(merged[keyword], value)
        elif keyword == "enum":
            merged[keyword] = [item for item in merged[keyword] if item in value]
        elif keyword == "type":
            merged[keyword] = _common_types(merged[keyword], value)
        elif keyword == "allOf":
            merged[keyword] = [*merged[keyword], *value]
        else:
            clashes.append(keyword)
    return merged, clashes


def _common_types(left: Any, right: Any) -> list[str]:
    ours = left if isinstance(left, list) else [left]
    theirs = right if isinstance(right, list) else [right]
    common = [kind for kind in ours if kind in theirs]
    if "integer" in (*ours, *theirs) and "number" in (*ours, *theirs) and "integer" not in common:
        common.append("integer")
    return common


def exclusive(branches: list[Any]) -> bool:
    """True when no value can match two of the branches, judged by their types or by a constant property."""
    if not all(isinstance(branch, Mapping) for branch in branches):
        return False
    kinds = [set(types_of(branch)) for branch in branches]
    kinds = [kind | {"integer"} if "number" in kind else kind for kind in kinds]
    if all(kinds) and sum(map(len, kinds)) == len(set().union(*kinds)):
        return True
    tags = [_constants(branch) for branch in branches]
    shared = set.intersection(*(set(tag) for tag in tags)) if tags else set()
    return any(
        len({value for tag in tags for value in tag[name]}) == sum(len(tag[name]) for tag in tags) for name in shared
    )


def _constants(branch: Schema) -> dict[str, list[str]]:
    """Required properties with a constant or an enumeration: name -> the values' representations."""
    fixed = {}
    for name in branch.get("required", ()):
        wanted = branch.get("properties", {}).get(name)
        if isinstance(wanted, Mapping) and ("const" in wanted or "enum" in wanted):
            fixed[name] = [repr(value) for value in ([wanted["const"]] if "const" in wanted else wanted["enum"])]
    return fixed


def _other_properties(validator: Any, allowed: Any, instance: Any, schema: Schema) -> Any:
    if "patternProperties" not in schema:
        yield from Draft202012Validator.VALIDATORS["additionalProperties"](validator, allowed, instance, schema)


_Checker = validators.extend(  # type: ignore[no-untyped-call]  # jsonschema has none
    Draft202012Validator,
    {"pattern": None, "patternProperties": None, "additionalProperties": _other_properties},
)
"""Patterns are left to the grammar, which matches in linear time; Python's `re` can be made to run for years."""


def violations(schema: Any, value: Any, limit: int = 3) -> list[str]:
    """Up to `limit` sentences on how `value` breaks `schema` (patterns aside); empty when it is valid."""
    problems = []
    for error in _Checker(schema, registry=Registry()).iter_errors(value):
        where = ".".join(str(part) for part in error.absolute_path) or "the value"
        problems.append(f"{where}: {error.message}")
        if len(problems) == limit:
            break
    return problems
