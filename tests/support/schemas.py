"""Random JSON schemas whose values are bounded in size, as people write them for tools and replies."""

from __future__ import annotations

import random
from typing import Any

_WORDS = (
    "city",
    "unit",
    "days",
    "name",
    "count",
    "when",
    "tags",
    "user",
    "Id",
    "max_price",
    "lat-lon",
    "note",
    "ümlaut",
)
_PATTERNS = ["^[a-z]{1,6}$", "^(red|green|blue)$", r"^\d{3}-\d{4}$", "^[A-Z]{2}/[0-9]{1,4}$", r"^\w+$", "^a|b$"]
_FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email", "hostname", "duration"]


class Schemas:
    """Schemas from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def parameters(self) -> dict[str, Any]:
        """A tool's parameters or a reply's schema: an object, sometimes with definitions."""
        schema = self._object(depth=3)
        if self.random.random() < 0.3:
            schema["$defs"] = {"item": self._value(depth=1)}
            schema["properties"]["referred"] = {"$ref": "#/$defs/item"}
        return schema

    def _value(self, depth: int) -> dict[str, Any]:
        leaves = [self._string, self._string, self._integer, self._number, self._simple, self._enum]
        nested = [self._object, self._array, self._union] if depth > 0 else []
        make = self.random.choice([*leaves, *nested])
        return make(depth) if make in nested else make()

    def _object(self, depth: int) -> dict[str, Any]:
        names = self.random.sample(_WORDS, self.random.randint(1, 4))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._value(depth - 1) for name in names}}
        schema["required"] = [name for name in names if self.random.random() < 0.6]
        roll = self.random.random()
        if roll < 0.4:
            schema["additionalProperties"] = False
        elif roll < 0.5:
            schema["additionalProperties"] = {"type": "boolean"}
        if self.random.random() < 0.3:
            schema["description"] = "An object."
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        low = self.random.randint(0, 2)
        schema = {"type": "array", "items": self._value(depth - 1), "minItems": low, "maxItems": low + 2}
        if self.random.random() < 0.2:
            schema = {"type": "array", "prefixItems": [self._value(0), self._value(0)], "items": False, "minItems": 1}
        return schema

    def _union(self, depth: int) -> dict[str, Any]:
        roll = self.random.random()
        if roll < 0.5:
            return {"anyOf": [self._value(depth - 1), {"type": "null"}]}
        if roll < 0.8:
            return {"oneOf": [self._string(), {"type": "integer", "minimum": 0}]}
        return {"allOf": [{"type": "string", "minLength": 1}, {"maxLength": 6}]}

    def _string(self) -> dict[str, Any]:
        roll = self.random.random()
        if roll < 0.5:
            return {"type": "string", "maxLength": self.random.randint(1, 8), "description": "Some text."}
        if roll < 0.75:
            return {"type": "string", "pattern": self.random.choice(_PATTERNS), "maxLength": 12}
        return {"type": "string", "format": self.random.choice(_FORMATS)}

    def _integer(self) -> dict[str, Any]:
        roll = self.random.random()
        if roll < 0.4:
            return {"type": "integer"}
        if roll < 0.5:
            return {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 5}
        low = self.random.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + self.random.randint(0, 500)}

    def _number(self) -> dict[str, Any]:
        if self.random.random() < 0.5:
            return {"type": "number"}
        return {"type": "number", "minimum": -1.5, "exclusiveMaximum": self.random.choice([0.25, 7, 1000])}

    def _simple(self) -> dict[str, Any]:
        return self.random.choice(
            [{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}, {"const": "x y"}]
        )

    def _enum(self) -> dict[str, Any]:
        pool = ["celsius", "fahrenheit", "", 'a "quoted" word', 3, 2.5, True, None, [1, "b"], {"k": "v", "a": False}]
        strings = [value for value in pool if isinstance(value, str)]
        values = self.random.sample(strings if self.random.random() < 0.6 else pool, self.random.randint(1, 3))
        return {"enum": values}
