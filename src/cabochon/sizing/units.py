"""Sizes as people write them, to and from plain numbers."""

from __future__ import annotations

import re

from ..errors import InputError

_BYTES = {
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
}
_NUMBER = re.compile(r"(\d[\d,_ ]*(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)", re.ASCII)
_MOST_BYTES = 1 << 60
_MOST_TOKENS = 1 << 40


def parse_bytes(text: str) -> int:
    """`24GiB`, `24 GB`, `24g`, `8,192 MiB` -> bytes. GB counts in thousands, GiB (and a bare G) in 1,024s.

    Raises:
        InputError: it is no size.
    """
    number, unit = _split(text)
    if unit not in _BYTES or not 0 < (size := number * _BYTES[unit]) <= _MOST_BYTES:
        raise InputError(f"{text!r} is no size of memory; write a number and a unit, such as 24GiB, 24GB or 512MiB.")
    return int(size)


def parse_tokens(text: str) -> int:
    """`32k`, `128K`, `1M`, `32,768` -> tokens; k and M count in 1,024s, as context lengths do.

    Raises:
        InputError: it is no number of tokens.
    """
    number, unit = _split(text)
    scale = {"": 1, "k": 1024, "m": 1024**2}.get(unit, 0)
    if not 1 <= (count := number * scale) <= _MOST_TOKENS:
        raise InputError(f"{text!r} is no number of tokens; write for example 32k or 32768.")
    return int(count)


def gib(size: float) -> str:
    """Bytes for people: `9.54 GiB`, `37.5 MiB`."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:,.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{size:,.0f} B"


def kilo(tokens: int) -> str:
    """Tokens for people: `32k`, `131,000`."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def _split(text: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return 0.0, "nothing"
    return float(re.sub(r"[,_ ]", "", match[1])), match[2].lower()
