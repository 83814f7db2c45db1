"""The published chat templates and tokenizer, rendered and encoded the way Google's users do: the oracle."""

import os
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

FACTS = os.environ.get("CABOCHON_FACTS")
needs_facts = pytest.mark.skipif(not FACTS, reason="CABOCHON_FACTS doesn't name the folder with the published files")
FILES = {
    "small": "templates/hf_official_2026-07-09_E2B-E4B.jinja",
    "large": "templates/hf_official_2026-07-09_12B-26B-31B.jinja",
}


def path(name: str) -> Path:
    return Path(FACTS or "") / name


@cache
def source(family: str) -> str:
    return path(FILES[family]).read_text(encoding="utf-8")


@cache
def _template(family):
    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source(family))


@cache
def backend() -> tokenizers.Tokenizer:
    """The published tokenizer as the library reads it, control tokens in text and all."""
    return tokenizers.Tokenizer.from_file(str(path("tokenizer.json")))


def encode(text: str) -> list[int]:
    """Ids with control tokens recognised in the text, as `transformers` does it."""
    return backend().encode(text, add_special_tokens=False).ids


def render(family, messages, **switches) -> str:
    return _template(family).render(messages=messages, bos_token="<bos>", **switches)
