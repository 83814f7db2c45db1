"""Schemas, regular expressions and grammars compiled for one vocabulary, to be walked many times.

llguidance does the walking (a mask over 262,144 tokens in well under a millisecond). What it walks is made here: JSON
schemas for text by its own compiler, tool schemas by `native`, because a call is not JSON.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ..errors import EngineError, RequestError
from .messages import Tool
from .native import call_grammar
from .patterns import FORMATS
from .schema import beyond, check_schema
from .tokenizer import Tokenizer

_LAYOUT = {"whitespace_pattern": r"\n?[ ]{0,12}"}
"""Room for pretty printing, but no endless run of spaces."""

_LIMITS = LLParserLimits(verbose_errors=False)
_KEPT = 256


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that compiles. `unenforced` names what its schema asks beyond it (`path.keyword`)."""

    source: str
    field: str
    unenforced: tuple[str, ...] = ()


class Walk:
    """One walk through a grammar: which tokens may come next, then the one that came.

    A grammar that compiles may still outgrow the limits on a step's work, which keep one request from holding up all
    others. That is the grammar's fault and not ours: a `RequestError` that names its field.
    """

    def __init__(self, matcher: LLMatcher, field: str, vocab_size: int) -> None:
        self._matcher = matcher
        self._field = field
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self._size = vocab_size

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which token may come next, `[V]` bool."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        return np.unpackbits(self._bits.view(np.uint8), count=self._size, bitorder="little").view(np.bool_)

    def advance(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            self._check()
            raise EngineError(f"Token {token_id} is not what the grammar allows here.")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"{self._field} grew beyond what can be followed ({_first_line(self._matcher.get_error())}); "
                "make its rules less ambiguous or its parts smaller.",
                self._field,
            )

    def forced(self) -> list[int]:
        """Tokens that must come next."""
        return self._matcher.compute_ff_tokens()

    def complete(self) -> bool:
        """What came so far is whole (more may be possible)."""
        return self._matcher.is_accepting()

    def over(self) -> bool:
        """What came so far is whole and nothing can follow."""
        return self._matcher.is_stopped()


class Vocabulary:
    """A tokenizer's tokens as grammars see them; `size` is the width V of the logits.

    Making one takes seconds for 262,144 tokens; a grammar takes a few milliseconds.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        ends = [tokenizer.turn_close, tokenizer.eos]
        self._tokens = LLTokenizer(tokenizer.backend.to_str(), n_vocab=size, eos_token=ends)
        self._quote, self._close = tokenizer.quote, tokenizer.tool_call_close
        self.size = size
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def walk(self, grammar: Grammar) -> Walk:
        """Start at the beginning of `grammar`."""
        return Walk(self._matcher(grammar).deep_copy(), grammar.field, self.size)

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        with self._lock:
            if grammar.source in self._compiled:
                self._compiled.move_to_end(grammar.source)
                return self._compiled[grammar.source]
        matcher = LLMatcher(self._tokens, grammar.source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise RequestError(
                f"{grammar.field} can't be made into a grammar: {_first_line(matcher.get_error())}.", grammar.field
            )
        with self._lock:
            self._compiled[grammar.source] = matcher
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _ready(self, grammar: Grammar) -> Grammar:
        self._matcher(grammar)
        return grammar

    def json_schema(self, schema: Any, *, strict: bool, field: str) -> Grammar:
        """Text that is a JSON value valid under `schema`.

        Raises `RequestError`: no JSON schema, or (strict) a keyword that can't be enforced, by name.
        """
        check_schema(schema, field)
        open_ends = beyond(schema, _TEXT_FORMATS)
        if strict and open_ends:
            raise RequestError(
                f"{field} asks for {open_ends[0]!r}, which can't be enforced; "
                "remove it or leave out strict to have it checked after the reply.",
                f"{field}.{open_ends[0]}",
            )
        options: Any = {**_LAYOUT, "lenient": bool(open_ends), "coerce_one_of": True}
        wanted = schema if isinstance(schema, Mapping) else ({} if schema else {"enum": []})
        source = LLMatcher.grammar_from_json_schema(json.dumps(wanted), overrides=options)
        return self._ready(Grammar(source, field, tuple(open_ends)))

    def json_object(self, field: str) -> Grammar:
        """Text that is any JSON object."""
        return self.json_schema({"type": "object"}, strict=True, field=field)

    def regex(self, expression: str, field: str) -> Grammar:
        """Text that matches `expression` as a whole."""
        return self._ready(Grammar(LLMatcher.grammar_from_regex(expression), field))

    def lark(self, text: str, field: str) -> Grammar:
        """Text that follows a grammar in llguidance's Lark syntax."""
        return self._ready(Grammar(LLMatcher.grammar_from_lark(text), field))

    def choice(self, options: Sequence[str], field: str) -> Grammar:
        """Text that is one of `options`."""
        return self.lark("start: " + " | ".join(json.dumps(option) for option in options), field)

    def call(self, tools: Sequence[Tool]) -> tuple[Grammar, dict[str, list[str]]]:
        """One call of one of `tools`, from `call:` up to and with `<tool_call|>`; per tool what is left to check."""
        text, open_ends = call_grammar(tools, self._quote, self._close)
        return self._ready(Grammar(LLMatcher.grammar_from_lark(text), "tools")), open_ends


_TEXT_FORMATS = frozenset((*FORMATS, "unknown"))


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "unknown").rstrip(".")
