"""What people say, as requests that the engine understands; and the engine that answers them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any, Generic, TypeVar

from ..chat.messages import Conversation, Message, ParserState, Prompt, Text, Tool, read_messages
from ..chat.tokenizer import Tokenizer
from ..engine.engine import Engine
from ..engine.options import EngineOptions
from ..engine.request import Constraint, Request, SamplingParams, SoftSpan
from ..errors import ContextError, InputError, RequestError
from ..media.source import Policy
from ..modelfile import Recipe
from ..senses import Senses
from .loading import Loaded
from .replies import ChatReply, RawReply

log = logging.getLogger("cabochon")

ConstraintMaker = Callable[[ParserState, int], Constraint]
"""Makes the constraint of one reply from the parser's state after the prompt and the most tokens of the reply."""

Tools = Iterable[Tool | Mapping[str, Any]]
LOOP_GUARD = 200
"""A chat reply ends when its last so many tokens are one short cycle."""


AnyReply = TypeVar("AnyReply", ChatReply, RawReply)


@dataclass(slots=True)
class Ask(Generic[AnyReply]):
    """A request and the readers of its n replies."""

    request: Request
    replies: list[AnyReply]

    @property
    def over(self) -> bool:
        return all(reply.over for reply in self.replies)


class Front:
    """One loaded checkpoint with its engine. What only builds requests is safe from any thread; the engine is not."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        max_model_len: int | None = None,
        policy: Policy | None = None,
        loop_guard: int = LOOP_GUARD,
        media_options: Mapping[str, Any] | None = None,
        **engine_options: Any,
    ) -> None:
        known = {field.name for field in fields(EngineOptions)}
        if strange := sorted(set(engine_options) - known):
            raise InputError(f"There is no engine option {strange[0]!r}; known are {', '.join(sorted(known))}.")
        self.name = loaded.name
        self.config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.template = loaded.template
        self.generation = loaded.generation
        self.recipe = loaded.recipe or Recipe(loaded.name)
        if max_model_len is None and "num_ctx" in self.recipe.parameters:
            max_model_len = int(self.recipe.parameters["num_ctx"])
        self.engine = Engine(
            loaded.model,
            EngineOptions(**engine_options),
            max_model_len=max_model_len,
            suppress=loaded.generation.suppress,
            drafter=loaded.drafter,
        )
        self.max_model_len = self.engine.max_model_len
        if loop_guard < 0:
            raise InputError(f"loop_guard is {loop_guard}, but must be 0 (never) or a number of tokens.")
        self.loop_guard = loop_guard
        self.media_options = media_options
        self.senses = (
            Senses(loaded.config, loaded.tokenizer, policy or Policy.for_owner()) if loaded.tokenizer else None
        )
        self.eos = frozenset(loaded.generation.eos or loaded.config.tokens.eos)
        self._numbers = count()
        self._told: set[str] = set()
        """What callers have been told about their prompts; once is enough."""

    # Requests ---------------------------------------------------------------------------------------------------------

    def render(
        self,
        messages: Conversation,
        *,
        tools: Tools | None = None,
        thinking: bool | None = None,
        preserve_thinking: bool = False,
    ) -> Prompt:
        """A conversation as token ids; media parts are still single placeholders."""
        if self.template is None:
            raise InputError(f"{self.name} has no tokenizer, so it can't chat; it serves token ids only.")
        messages = self._opened(read_messages(messages))
        if {message.role for message in messages} - {"system", "developer"} == {"tool"}:
            # The published template leaves results without a call out, which here is all there is.
            raise RequestError(
                "messages hold nothing but results of tools; a call must come before its result.", "messages"
            )
        return self.template.render(messages, tools=tools, thinking=thinking, preserve_thinking=preserve_thinking)

    def _opened(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """A conversation behind what the recipe says first; the caller's own system prompt replaces the recipe's."""
        own = bool(messages) and messages[0].role in ("system", "developer")
        system = messages[:1] if own else ()
        if self.recipe.system is not None and not own:
            system = (Message("system", (Text(self.recipe.system),)),)
        said = (Message.of({"role": role, "content": text}) for role, text in self.recipe.messages)
        return (*system, *said, *messages[own:])

    def chat(
        self,
        messages: Conversation,
        *,
        tools: Tools | None = None,
        thinking: bool | None = None,
        preserve_thinking: bool = False,
        params: SamplingParams | None = None,
        constraint: ConstraintMaker | None = None,
        priority: int = 0,
        media_options: Mapping[str, Any] | None = None,
    ) -> Ask[ChatReply]:
        """The request that answers a conversation. Fetching media may block.

        `media_options` are for parts that don't say themselves, before the front's own (see `senses.OPTIONS`).
        """
        tools = list(tools) if tools else None
        prompt = self.render(messages, tools=tools, thinking=thinking, preserve_thinking=preserve_thinking)
        spans: tuple[SoftSpan, ...] = ()
        tokenizer, senses = self._text_tools()
        if prompt.media:
            prompt, spans = senses.expand(prompt, {**(self.media_options or {}), **(media_options or {})})
        for notice in prompt.notices:
            if notice not in self._told:
                self._told.add(notice)
                log.warning(notice)
        ends = {tokenizer.turn_close, tokenizer.tool_response_open}
        params = self._settle(params, len(prompt.token_ids))
        request = Request(
            id=self._next_id("chat"),
            token_ids=prompt.token_ids,
            params=params,
            eos_ids=self.eos | ends,
            spans=spans,
            boundaries=prompt.boundaries,
            # The next turn leaves the thinking out, unless calls were made: then nothing is stripped.
            keep_end=not thinking or bool(tools),
            priority=priority,
            constraint=_maker(constraint, prompt.state, params),
            loop_guard=self.loop_guard,
        )
        tokens = len(prompt.token_ids)
        return Ask(request, [ChatReply(tokenizer, prompt.state, params.stop, tokens) for _ in range(params.n)])

    def raw(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        special_tokens: bool = False,
        constraint: ConstraintMaker | None = None,
        priority: int = 0,
    ) -> Ask[RawReply]:
        """The request that continues a raw prompt: text (BOS is added unless present) or token ids as they are."""
        ids = self.encode(prompt, special_tokens) if isinstance(prompt, str) else [int(i) for i in prompt]
        params = self._settle(params, len(ids))
        if params.stop and self.tokenizer is None:
            raise RequestError(
                f"{self.name} has no tokenizer, so it can't see stop strings; use stop_token_ids.", "stop"
            )
        request = Request(
            id=self._next_id("raw"),
            token_ids=ids,
            params=params,
            eos_ids=self.eos,
            priority=priority,
            constraint=_maker(constraint, "content", params),
        )
        return Ask(request, [RawReply(self.tokenizer, params.stop) for _ in range(params.n)])

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """A raw prompt's ids; control tokens are only read from it when the caller asks."""
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer; give the prompt as token ids.")
        ids = self.tokenizer.encode_raw(text, special_tokens)
        return ids if ids[:1] == [self.tokenizer.bos] else [self.tokenizer.bos, *ids]

    def _settle(self, params: SamplingParams | None, prompt: int) -> SamplingParams:
        """Fill in what the caller left to the checkpoint, and to the room there is."""
        defaults, recipe = self.generation, self.recipe
        params = params or SamplingParams()
        wish, seed = int(recipe.parameters.get("num_predict", -1)), recipe.parameters.get("seed")
        room = self.engine.room(prompt)
        if params.max_tokens is None and room < 1:
            raise ContextError(
                f"The prompt has {prompt} tokens, but at most {prompt + room - 1} fit, for a reply must follow; "
                "shorten it.",
                "prompt",
            )
        return replace(
            params,
            temperature=defaults.temperature if params.temperature is None else params.temperature,
            top_p=defaults.top_p if params.top_p is None else params.top_p,
            top_k=defaults.top_k if params.top_k is None else params.top_k,
            min_p=defaults.min_p if params.min_p is None else params.min_p,
            repetition_penalty=params.repetition_penalty or defaults.repetition_penalty,
            max_tokens=params.max_tokens or (min(wish, room) if wish > 0 else room),
            stop=params.stop or recipe.stop,
            seed=int(seed) if params.seed is None and seed is not None else params.seed,
        )

    def _text_tools(self) -> tuple[Tokenizer, Senses]:
        assert self.tokenizer is not None and self.senses is not None
        return self.tokenizer, self.senses

    def _next_id(self, kind: str) -> str:
        return f"{kind}-{next(self._numbers)}"


def _maker(
    constraint: ConstraintMaker | None, state: ParserState, params: SamplingParams
) -> Callable[[], Constraint] | None:
    if constraint is None:
        return None
    room = params.max_tokens or 1
    return lambda: constraint(state, room)
