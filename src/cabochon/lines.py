"""Files of JSON objects, one a line: exercises, texts for calibration. What is wrong is said with the line it is in."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


def read_text(path: Path, kind: str) -> str:
    """What is in a file of UTF-8, unpacked where its name ends in .gz; `kind` is for messages, such as "task file".

    Raises:
        InputError: it can't be read.
    """
    try:
        return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"The {kind} {path} can't be read ({why}).") from None


def objects(text: str, path: Path, known: Collection[str], shape: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, the object) of every line that is not empty. `shape` says for messages what an object is made of.

    Raises:
        InputError: a line is no JSON object, or has a field that is not `known`.
    """
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold what it cuts at
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where} is not JSON ({error}).") from None
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a JSON object with {shape}.")
        if strange := sorted(set(value) - set(known)):
            raise InputError(f"{where} has the unknown field {strange[0]!r}; known are {', '.join(sorted(known))}.")
        yield where, value
