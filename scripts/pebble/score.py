"""Score a checkpoint and write its card: `python scripts/pebble/score.py [FOLDER]`.

The exercises are those of `cabochon eval`; beside them stand the prose of two unseen books in bits per byte next to
xz, and how the checkpoint came about (training.json of its folder).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from pathlib import Path
from typing import Any

import torch
from prose import HELD_OUT, book

from cabochon.evaluate import Line, bundled, evaluate
from cabochon.hub import BUNDLED
from cabochon.llm import LLM, AsyncLLM

PAGE = Path(__file__).parents[2] / "docs" / "pebble.md"
CONTEXT = 1024
"""Tokens of a book that are read at a time; each window starts without memory of the last."""


def bits_per_byte(llm: LLM, text: str) -> float:
    ids = llm.tokenizer.encode(text)
    lost = 0.0
    for start in range(0, len(ids), CONTEXT):
        window = torch.tensor([llm.tokenizer.bos, *ids[start : start + CONTEXT]])
        logits = llm.logits(window[:-1].tolist())
        lost += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return lost / math.log(2) / len(text.encode())


def prose(folder: Path) -> list[dict[str, Any]]:
    """Per held-out book: bytes, the model's bits per byte, and those of xz."""
    llm = LLM(folder)
    rows = []
    for name in HELD_OUT:
        raw = book(name).encode()
        packed = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
        rows.append(
            {"book": name, "bytes": len(raw), "bits": bits_per_byte(llm, raw.decode()), "xz": packed * 8 / len(raw)}
        )
    return rows


def table(card: list[Line]) -> str:
    """The scores in Markdown."""
    lines = ["| task | right | 95 % interval | n | guessing | withheld |", "|---|--:|--:|--:|--:|--:|"]
    for line in card:
        withheld = "" if line.withheld is None else f"{line.withheld:.1%} without {line.what}"
        interval = f"{line.low:.1%} to {line.high:.1%}"
        lines.append(f"| {line.task} | {line.score:.1%} | {interval} | {line.n} | {line.chance:.1%} | {withheld} |")
    return "\n".join(lines)


def write_card(folder: Path, card: list[Line], books: list[dict[str, Any]]) -> None:
    made = json.loads((folder / "training.json").read_text())
    text = (Path(__file__).parent / "card.md").read_text()
    shown = "\n".join(f"| {row['book']} | {row['bytes']:,} | {row['bits']:.2f} | {row['xz']:.2f} |" for row in books)
    size, drafter_size = ((folder / at / "model.safetensors").stat().st_size / 1e6 for at in ("", "drafter"))
    values = {
        **made,
        "scores": table(card),
        "books": shown,
        "size": f"{size:.1f}",
        "drafter_size": f"{drafter_size:.1f}",
    }
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", str(value))
    (folder / "README.md").write_text(text)
    if folder == BUNDLED:
        page = PAGE.read_text()
        before, rest = page.split("<!-- scores -->")
        PAGE.write_text(
            f"{before}<!-- scores -->\n{table(card)}\n<!-- end of scores -->" + rest.split("<!-- end of scores -->")[1]
        )


def note(**facts: str) -> None:
    """Keep what another script measured, for the bundled checkpoint's card."""
    notes = BUNDLED / "training.json"
    notes.write_text(json.dumps({**json.loads(notes.read_text()), **facts}, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=BUNDLED)
    folder = parser.parse_args().folder
    llm = AsyncLLM(folder)
    try:
        card = evaluate(llm, bundled())
    finally:
        llm.close()
    print(table(card), flush=True)
    books = prose(folder)
    print(json.dumps(books, indent=1))
    if (folder / "training.json").exists():
        write_card(folder, card, books)


if __name__ == "__main__":
    main()
