"""A loaded model as the chat commands use it: bar while loading, sampling, rules for tools and schemas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from .. import hub
from ..chat.events import Event
from ..chat.messages import Message, Tool
from ..errors import InputError
from . import flag_values, inputs
from .choices import Choices
from .screen import Screen

if TYPE_CHECKING:
    from ..chat.grammar import Vocabulary
    from ..chat.tokenizer import Tokenizer
    from ..engine.request import SamplingParams
    from ..llm import LLM
    from ..llm.front import ConstraintMaker


SEATS = 2
"""One person talks; the second seat keeps room for the window that the next turn begins with."""


@dataclass
class Speaker:
    """One model and how it is sampled."""

    llm: LLM
    tokenizer: Tokenizer
    params: SamplingParams | None = None
    _vocabulary: Vocabulary | None = None

    def events(
        self, messages: Sequence[Message], tools: tuple[Tool, ...], thinking: bool, schema: Any = None
    ) -> Iterator[Event]:
        """A reply. Calls fit their tools' schemas, and the text fits `schema` if there is one."""
        return self.llm.stream(
            messages,
            tools=tools,
            thinking=thinking,
            params=self.params,
            constraint=self._rules(tools, thinking, schema),
        )

    def _rules(self, tools: tuple[Tool, ...], thinking: bool, schema: Any) -> ConstraintMaker | None:
        if not tools and schema is None:
            return None
        from ..chat.constraint import ReplyRules
        from ..chat.grammar import Vocabulary

        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.tokenizer, self.llm.front.config.text.vocab_size)
        words = self._vocabulary
        content = None if schema is None else words.json_schema(schema, strict=True, field="schema")
        call = words.call(tools)[0] if tools else None
        return ReplyRules(self.tokenizer, words, content=content, call=call, may_think=thinking).begin


def open_speaker(screen: Screen, model: str | None, choices: Choices) -> Speaker:
    """Load a model as the planner says, with a bar on a terminal."""
    if model is not None and not model.startswith("random:"):
        hub.locate(model)  # a wrong name is told before torch is imported
    from ..llm import LLM
    from ..llm.loading import load
    from ..llm.prepare import prepare

    begin = prepare(
        model,
        choices.device,
        dtype=choices.dtype,
        quantization=choices.quantization or "auto",
        max_model_len=flag_values.length(choices.max_model_len),
        engine={"max_num_seqs": SEATS},
        drafter=choices.drafter,
    )
    if not inputs.piped():
        screen.plan(begin.summary())
    with _bar(screen, model or "pebble") as progress:
        loaded = load(model, choices.device, choices.dtype, progress, begin.quantization, choices.drafter)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise InputError(f"{loaded.name} has no tokenizer.json, so it can't chat; it serves token ids only.")
    if choices.chat_template is not None:
        from ..chat.jinja import template_for

        loaded = replace(loaded, template=template_for(None, tokenizer, "small", choices.chat_template))
    room = {"max_num_seqs": begin.users, "kv_cache_memory_bytes": begin.cache_bytes}
    return Speaker(LLM.of(loaded, max_model_len=begin.context, **room), tokenizer, choices.sampling())


@contextmanager
def _bar(screen: Screen, name: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("Loading {task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=screen.err, transient=True, disable=not screen.err.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
