"""What a reply may be, token by token: thinking (free, but within a budget), then text or calls under their grammars.

What is unusual: the control structure of a reply is known exactly from single tokens, so this is a small state machine
that hands over to a grammar only where a grammar was asked for. Free text costs next to nothing.

    start ──<|channel>──▶ thought ──<channel|>──▶ fresh ──▶ text
      │                                            │         │ ▲
      └──────────(what fresh allows)───────────────┴─▶ call ◀┘ │ (free text only)
                                                        └─<tool_call|>─▶ after
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .grammar import Grammar, Vocabulary, Walk
from .messages import ParserState
from .tokenizer import Tokenizer

_SHORTEST_THOUGHT = 4
"""`<|channel>thought\\n<channel|>`: a smaller budget means no thought at all."""

Row = Any
"""A row of logits: torch.Tensor [V] float32 on any device. This room doesn't import torch; it writes through numpy on
the host and through the row's own methods elsewhere."""


@dataclass(frozen=True, slots=True)
class ReplyRules:
    """What a reply must look like: made once per request, begun once per reply.

    `content`: what the text must match (None: anything). `call`: what follows `<|tool_call>` (None: no calls).
    `must_call`: the reply is calls and nothing else. `many_calls`: more than one call is allowed.
    `may_think`: a thought may be opened. `budget`: most tokens of thought, its markers included.
    """

    tokenizer: Tokenizer
    vocabulary: Vocabulary | None = None
    content: Grammar | None = None
    call: Grammar | None = None
    must_call: bool = False
    many_calls: bool = True
    may_think: bool = True
    budget: int | None = None

    def begin(self, state: ParserState, room: int | None) -> ReplyConstraint:
        """A constraint for one reply that starts in `state` and may have `room` tokens.

        A budget shrinks where it would leave less than a quarter of the room, or 16 tokens, for the answer.
        """
        budget = self.budget
        if budget is not None and room is not None:
            budget = max(0, min(budget, room - max(16, room // 4)))
        return ReplyConstraint(self, state, budget)

    def walk(self, grammar: Grammar | None) -> Walk | None:
        return self.vocabulary.walk(grammar) if self.vocabulary and grammar else None


class ReplyConstraint:
    """One reply under `ReplyRules`; what the engine calls a `Constraint`."""

    def __init__(self, rules: ReplyRules, state: ParserState, budget: int | None) -> None:
        self._rules = rules
        self._budget = budget
        self._thought_tokens = 0
        self._silenced = False
        """The budget closed the thought and nothing was said since: the reply must not end yet."""
        self._phase: Literal["start", "thought", "fresh", "text", "call", "after"]
        self._phase = "fresh" if state == "content" else state
        self._text = rules.walk(rules.content)
        self._call: Walk | None = None
        tokens = rules.tokenizer
        self._ends = (tokens.turn_close, tokens.eos, tokens.tool_response_open)
        self._barred_in_thoughts = sorted(tokens.control.keys() - {tokens.channel_close})

    def mask(self, row: Row) -> None:
        """Set the forbidden tokens of `row` [V] float32 to -inf, in place."""
        tokens = self._rules.tokenizer
        match self._phase:
            case "thought" if self._must_close():
                _keep(row, (tokens.channel_close,))
            case "thought":
                _forbid(row, self._barred_in_thoughts)
            case "call":
                assert self._call
                _apply(row, self._call.allowed())
            case "after":
                _keep(row, (tokens.tool_call_open, *self._ends))
            case "text" if self._text:
                _apply(row, self._text.allowed())
            case "text" | "fresh" | "start":
                self._mask_opening(row)

    def _mask_opening(self, row: Row) -> None:
        """The reply's next piece may be text, a call, or (at the start) a thought."""
        tokens = self._rules.tokenizer
        openers = [tokens.channel_open] if self._may_think() else []
        openers += [tokens.tool_call_open] if self._rules.call else []
        if self._rules.must_call:
            _keep(row, openers)
        elif self._text:
            allowed = self._text.allowed()
            allowed[openers] = True
            _apply(row, allowed)
        else:
            barred = {tokens.channel_open, tokens.tool_call_open}.difference(openers)
            _forbid(row, sorted(barred.union(self._ends if self._silenced else ())))

    def advance(self, token_id: int) -> None:
        """Take note of the token that was chosen."""
        tokens = self._rules.tokenizer
        match self._phase:
            case "thought":
                self._thought_tokens += 1
                if token_id == tokens.channel_close:
                    self._silenced = self._budget is not None and self._thought_tokens >= self._budget
                    self._phase = "fresh"
            case "call":
                assert self._call
                self._call.advance(token_id)
                if token_id == tokens.tool_call_close:
                    free = not (self._rules.must_call or self._text) and self._rules.many_calls
                    self._phase = "text" if free else "after"
            case "start" if token_id == tokens.channel_open:
                self._thought_tokens += 1
                self._phase = "thought"
            case _ if token_id == tokens.tool_call_open and self._rules.call:
                self._call = self._rules.walk(self._rules.call)
                self._phase, self._silenced = "call", False
            case "start" | "fresh" | "text":
                self._phase, self._silenced = "text", False
                if self._text:
                    self._text.advance(token_id)

    def forced(self) -> Sequence[int]:
        """Tokens that must come next whatever the logits say."""
        tokens = self._rules.tokenizer
        match self._phase:
            case "thought" if self._must_close():
                return [tokens.channel_close]
            case "call":
                assert self._call
                return self._call.forced()
            case "start" | "fresh" if self._rules.must_call and not self._may_think():
                return [tokens.tool_call_open]
            case _:
                return []

    def done(self) -> bool:
        """True when nothing can follow."""
        if self._phase == "after":
            return not self._rules.many_calls
        return self._phase == "text" and self._text is not None and self._text.over()

    def _must_close(self) -> bool:
        # The closing token counts itself, so it is due one token before the budget is used up.
        return self._budget is not None and self._thought_tokens + 1 >= self._budget

    def _may_think(self) -> bool:
        allowed = self._rules.may_think and self._phase == "start"
        return allowed and (self._budget is None or self._budget >= _SHORTEST_THOUGHT)


# Rows of logits -----------------------------------------------------------------------------------------------------


def _keep(row: Row, ids: Sequence[int]) -> None:
    kept = row[list(ids)]
    row.fill_(float("-inf"))
    row[list(ids)] = kept


def _forbid(row: Row, ids: Sequence[int]) -> None:
    if ids:
        row[[token_id for token_id in ids if token_id < row.shape[0]]] = float("-inf")


def _apply(row: Row, allowed: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    if row.device.type == "cpu":
        values = row.numpy()
        values[: len(allowed)][~allowed] = -np.inf
        values[len(allowed) :] = -np.inf
    else:
        allowed = np.pad(allowed, (0, row.shape[0] - len(allowed)))
        row.add_(row.new_tensor(np.where(allowed, 0.0, -np.inf)))
