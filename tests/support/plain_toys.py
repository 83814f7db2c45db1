"""Plain toy checkpoints for the scripts that other tools' Pythons run: `python plain_toys.py FOLDER`, with ours.

Widths are multiples of 128, the largest group that those tools cut rows into.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from support.toys import save_toy

SIZES = ("E2B", "26B-A4B", "31B")


def wide(size: str) -> dict[str, Any]:
    """Widths of a toy in the shape of `size`."""
    text: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "global_head_dim": 64}
    if size == "E2B":
        text["hidden_size_per_layer_input"] = 128
    if size == "26B-A4B":
        text["moe_intermediate_size"] = 128
    return text


if __name__ == "__main__":
    for size in SIZES:
        save_toy(Path(sys.argv[1]) / size, size, media=True, **wide(size))
