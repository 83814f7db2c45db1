"""Models made from another one: a base with a system prompt, sampling defaults and opening messages, under a name.

    FROM ./e2b-int4
    SYSTEM You are a dry accountant.
    PARAMETER temperature 0.3

The file is Ollama's Modelfile as far as it makes sense here: TEMPLATE and ADAPTER are refused with a reason, never
passed over. What `cabochon create` made lies as one JSON file per name under the user's data folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import InputError, UnknownModelError

_WHOLE = {"top_k": (0, 2**31), "num_ctx": (1, 2**31), "num_predict": (-1, 2**31), "seed": (0, 2**63)}
_REAL = {"temperature": (0, 100), "top_p": (1e-9, 1), "min_p": (0, 1), "repeat_penalty": (0.01, 100)}
_REFUSED = {
    "TEMPLATE": "conversations are rendered in code, as the model was trained on them; leave TEMPLATE out",
    "ADAPTER": "adapters can't be loaded yet; leave ADAPTER out, or name a model into which one was merged in FROM",
    "REQUIRES": "it names a version of another program; leave REQUIRES out",
}
_ROLES = ("system", "user", "assistant")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(:[A-Za-z0-9][A-Za-z0-9._-]*)?")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a Modelfile says."""

    base: str
    """A model's name, or the absolute path of a folder or file."""
    system: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    """(role, text) of what goes before every conversation."""
    licenses: tuple[str, ...] = ()

    def over(self, other: Recipe) -> Recipe:
        """This recipe where its base was made by `other`: one recipe on that one's base."""
        return replace(
            self,
            base=other.base,
            system=other.system if self.system is None else self.system,
            parameters={**other.parameters, **self.parameters},
            stop=self.stop or other.stop,
            messages=self.messages or other.messages,
            licenses=(*other.licenses, *self.licenses),
        )


def read_modelfile(text: str, beside: Path) -> Recipe:
    """The recipe in a Modelfile; a relative path in FROM starts from the folder `beside`.

    Raises:
        InputError: an instruction is unknown, unsupported or wrong; the message names the line.
    """
    base: str | None = None
    recipe = Recipe("")
    for line, word, rest in _instructions(text):
        if word in _REFUSED:
            raise InputError(f"Modelfile, line {line}: {_REFUSED[word]}.")
        if not rest:
            raise InputError(f"Modelfile, line {line}: {word} says nothing; write a value behind it.")
        match word:
            case "FROM" if base is not None:
                raise InputError(f"Modelfile, line {line}: a second FROM; a model has one base.")
            case "FROM":
                base = _base(rest, beside)
            case "SYSTEM":
                recipe = replace(recipe, system=rest)
            case "PARAMETER":
                recipe = _with_parameter(recipe, line, rest)
            case "MESSAGE":
                recipe = replace(recipe, messages=(*recipe.messages, _message(line, rest)))
            case "LICENSE":
                recipe = replace(recipe, licenses=(*recipe.licenses, rest))
            case _:
                known = "FROM, SYSTEM, PARAMETER, MESSAGE and LICENSE"
                raise InputError(f"Modelfile, line {line}: there is no instruction {word}; there are {known}.")
    if base is None:
        raise InputError("The Modelfile has no FROM; begin it with the model to build on, like: FROM E2B")
    return replace(recipe, base=base)


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, instruction, its text without the quotes) of every instruction."""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, _, rest = line.strip().partition(" ")
        word, role, rest = word.upper(), "", rest.strip()
        if word == "MESSAGE":
            role, _, rest = rest.partition(" ")
            role, rest = f"{role} ", rest.strip()
        if rest.startswith('"""'):
            rest = rest[3:]
            while '"""' not in rest:
                following = next(lines, None)
                if following is None:
                    raise InputError(f'Modelfile, line {number}: {word} opens """ and never closes it.')
                rest += f"\n{following[1]}"
            rest, _, behind = rest.partition('"""')
            if behind.strip():
                raise InputError(f'Modelfile, line {number}: there is text behind the closing """ of {word}.')
            rest = rest.strip("\n")
        elif len(rest) > 1 and rest[0] == rest[-1] == '"':
            rest = rest[1:-1]
        yield number, word, f"{role}{rest}"


def _base(said: str, beside: Path) -> str:
    path = Path(said).expanduser()
    there = path if path.is_absolute() else beside / path
    return str(there.resolve()) if there.exists() or said.startswith((".", "/", "~")) else said


def _message(line: int, rest: str) -> tuple[str, str]:
    role, _, text = rest.partition(" ")
    if role not in _ROLES[1:] or not text:
        raise InputError(f"Modelfile, line {line}: MESSAGE takes user or assistant and a text, not {rest!r}.")
    return role, text


def _with_parameter(recipe: Recipe, line: int, rest: str) -> Recipe:
    name, _, said = rest.partition(" ")
    said = said.strip()
    if name == "stop":
        text = said[1:-1] if len(said) > 1 and said[0] == said[-1] == '"' else said
        return replace(recipe, stop=(*recipe.stop, text))
    if name not in _WHOLE and name not in _REAL:
        known = ", ".join((*_REAL, *_WHOLE, "stop"))
        raise InputError(f"Modelfile, line {line}: there is no PARAMETER {name}; there are {known}.")
    low, high = _WHOLE.get(name) or _REAL[name]
    try:
        value: float = int(said) if name in _WHOLE else float(said)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise InputError(f"Modelfile, line {line}: {name} is {said!r}, but must be a number from {low:g} to {high:g}.")
    return replace(recipe, parameters={**recipe.parameters, name: value})


# What was made ------------------------------------------------------------------------------------------------------


def _home() -> Path:
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "cabochon" / "models"


def _file(name: str) -> Path:
    return _home() / f"{name.replace(':', '+')}.json"


def keep(name: str, recipe: Recipe) -> None:
    """Store a recipe under a name; what had that name before is replaced.

    Raises:
        InputError: it can't be a name, or nothing can be written where names are kept.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} can't be a model's name; take letters, digits and . _ -, with a :tag if you like.")
    part = _file(name).with_suffix(".part")
    try:
        _home().mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(recipe), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        part.replace(_file(name))
    except OSError as error:
        raise InputError(
            f"{_home()} can't be written ({error.strerror}); set XDG_DATA_HOME to another folder."
        ) from None


def made(name: str) -> Recipe | None:
    """The recipe of that name; None if there is none."""
    if not _NAME.fullmatch(name) or not _file(name).is_file():
        return None
    try:
        raw: dict[str, Any] = json.loads(_file(name).read_text(encoding="utf-8"))
        return Recipe(
            **{
                **raw,
                "stop": tuple(raw["stop"]),
                "messages": tuple((role, text) for role, text in raw["messages"]),
                "licenses": tuple(raw["licenses"]),
            }
        )
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(
            f"{_file(name)} is damaged; make {name} anew with: cabochon create {name} -f Modelfile"
        ) from None


def names() -> list[str]:
    """What `create` made, by name."""
    return sorted(file.stem.replace("+", ":") for file in _home().glob("*.json"))


def forget(name: str) -> None:
    """Delete a recipe. Raises `UnknownModelError` if there is none of that name."""
    if not _NAME.fullmatch(name) or not _file(name).is_file():
        raise UnknownModelError(f"{name} was not made on this machine; see: cabochon list")
    _file(name).unlink()
