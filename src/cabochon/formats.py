"""The number formats that weights are kept in, one row each. No torch here: sizing reads this table too."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """How the numbers of one weight are stored. Groups run along the last axis and never cross a row."""

    name: str
    bits: int
    """Of one code."""
    group: int | None
    """Neighbours that share a scale; None when a whole row shares one, or when there is none."""
    scale_bytes: int
    """Of one scale, 0 without scales."""
    quantized: bool
    looked_up: str | None = None
    """Format of the tied embedding's rows, where the table that they are looked up in is not the one that the head
    multiplies with."""

    def groups(self, width: int) -> int:
        """Scales of a row of `width` numbers."""
        return 1 if self.group is None else math.ceil(width / self.group)

    def code_bytes(self, width: int) -> int:
        """Bytes of the codes of a row of `width` numbers; the last group is filled up."""
        numbers = width if self.group is None else self.groups(width) * self.group
        return numbers * self.bits // 8

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of `shape`, scales included."""
        *rows, width = shape
        return math.prod(rows) * (self.code_bytes(width) + self.groups(width) * self.scale_bytes)


FORMATS = {
    format.name: format
    for format in (
        Format("float64", bits=64, group=None, scale_bytes=0, quantized=False),
        Format("float32", bits=32, group=None, scale_bytes=0, quantized=False),
        Format("bfloat16", bits=16, group=None, scale_bytes=0, quantized=False),
        Format("float16", bits=16, group=None, scale_bytes=0, quantized=False),
        # One float32 scale per output channel.
        Format("int8", bits=8, group=None, scale_bytes=4, quantized=True),
        # One float16 scale per 32 neighbours, codes -8 .. 7: the grid and the byte order of GGUF's q4_0.
        # Rows are looked up in eight bits: one row per token costs no bandwidth, and what four bits lose there, every
        # layer inherits.
        Format("int4", bits=4, group=32, scale_bytes=2, quantized=True, looked_up="int8"),
    )
}

QUANTIZED = tuple(name for name, format in FORMATS.items() if format.quantized)
