"""Reading a JSON object strictly: each key is taken once and checked, and a key that is left over is an error."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, brief


class Section:
    """One JSON object (of the file `file`, at the dotted place `where`) being read. A key whose value is null counts as
    absent, but its name must be known all the same.

    `ignore` holds full names of keys that the caller wants passed over.
    """

    MOST_LAYERS = 1000
    """A file is untrusted: each layer costs memory before the first look at the weights."""

    def __init__(
        self, values: Mapping[str, Any], where: str = "", *, file: str = "config.json", ignore: Collection[str] = ()
    ) -> None:
        self.values = {key: value for key, value in values.items() if value is not None}
        self.nulls = {key for key, value in values.items() if value is None}
        self.where = where
        self.file = file
        self.ignore = ignore
        self.known: set[str] = set()

    def name(self, key: str) -> str:
        shown = key if key.isprintable() else repr(key)
        return f"{self.where}.{shown}" if self.where else shown

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.file}: {self.name(key)} {problem}")

    def has(self, key: str) -> bool:
        """The key is there with a value; either way its name counts as known."""
        self.known.add(key)
        return key in self.values

    def take(self, key: str, default: Any = ...) -> Any:
        self.known.add(key)
        if key in self.values:
            return self.values.pop(key)
        if default is ...:
            raise self.error(key, "is missing; take the file from the original checkpoint")
        return default

    def count(self, key: str, default: Any = ..., *, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"is {brief(value)}; it must be a whole number of at least {least}")
        if value > most:
            raise self.error(key, f"is {brief(value)}; {most} is the most")
        return value

    def number(self, key: str, default: Any = ...) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"is {brief(value)}; it must be a number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: Any = ...) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {brief(value)}; it must be true or false")
        return value

    def text(self, key: str, default: Any = ...) -> str:
        value = self.take(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is {brief(value)}; it must be a string")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids; empty when absent."""
        value = self.take(key, [])
        listed = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in listed):
            raise self.error(key, f"is {brief(value)}; it must be a token id or a list of token ids")
        return tuple(listed)

    def one_id(self, key: str) -> int | None:
        found = self.ids(key)
        if len(found) > 1:
            raise self.error(key, f"is {list(found)}; it must be one token id")
        return found[0] if found else None

    def must(self, key: str, *allowed: Any) -> None:
        """The key is absent or one of the values that the network was built for."""
        value = self.take(key, allowed[0])
        if value not in allowed or isinstance(value, bool) is not isinstance(allowed[0], bool):
            options = " or ".join(json.dumps(item) for item in allowed)
            raise self.error(key, f"is {json.dumps(value)[:80]}; this network is built for {options} only")

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        value = self.take(key, None)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, f"is {brief(value)}; it must be an object")
        return value

    def child(self, key: str) -> Section:
        value = self.mapping(key)
        if value is None:
            raise self.error(key, "is missing; take the file from the original checkpoint")
        return Section(value, self.name(key), file=self.file, ignore=self.ignore)

    def left(self) -> dict[str, Any]:
        """The keys with a value that nobody took yet."""
        return dict(self.values)

    def close(self, passed: Collection[str] = ()) -> None:
        """Raise `ConfigError` when a key was neither taken nor is in `passed`."""
        names = [*self.values, *sorted(self.nulls - self.known)]
        unknown = [key for key in names if key not in passed and self.name(key) not in self.ignore]
        if not unknown:
            return
        near = difflib.get_close_matches(unknown[0], self.known, 1, cutoff=0.75)
        hint = f"did you mean '{near[0]}'? " if near else ""
        full = [self.name(key) for key in unknown]
        raise ConfigError(
            f"{self.file}: unknown key {', '.join(full)}; {hint}it may change what the network computes, so delete it "
            f"if you know that it doesn't, or call read_config(..., ignore={full!r})"
        )


def read_object(path: Path, name: str) -> Mapping[str, Any]:
    """The JSON object in the file `path`, or in `path/name` when `path` is a folder."""
    path = path / name if path.is_dir() else path
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a checkpoint folder needs a {name}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); download the file again") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a JSON {type(content).__name__}, not an object; download the file again")
    return content
