"""What a network reads while it is being rounded: text files, or conversations, which it may have to finish itself.

A conversation that ends with somebody else's turn is answered by the model first, greedily: what a model says itself is
what it will compute most of its life, and task files and logs of questions can be taken as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat.messages import read_messages, read_tools
from ..chat.template import ChatTemplate
from ..chat.tokenizer import Tokenizer
from ..engine.request import SamplingParams
from ..errors import InputError, RequestError
from ..lines import objects, read_text
from ..llm import LLM
from ..llm.loading import template_of, tokenizer_of
from ..weights.checkpoint import Checkpoint

LONGEST = 2048
"""Tokens of a text or conversation that are read; longer text files are cut into pieces, longer conversations end."""
LONGEST_REPLY = 512
ASKED_AT_ONCE = 64
_SHAPE = "either text or messages"
_FIELDS = {"text", "messages", "tools", "thinking", "task", "expect", "score", "choices"}


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, or a conversation."""

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: bool = False

    @property
    def open(self) -> bool:
        """Is the model to speak next?"""
        return self.text is None and self.messages[-1].get("role") not in ("assistant", "model")


def read_samples(path: Path) -> list[Sample]:
    """A .txt file is one text; in a .jsonl or .jsonl.gz file every line has `text` or `messages`, beside these `tools`
    and `thinking` and what else lines of task files have.

    Raises:
        InputError: the file can't be read, holds nothing, or a line is neither; the message names the line.
    """
    text = read_text(path, "calibration file")
    if path.suffixes[-1:] == [".txt"]:
        samples = [Sample(text)] if text.strip() else []
    elif ".jsonl" in path.suffixes:
        samples = [_sample(value, where) for where, value in objects(text, path, _FIELDS, _SHAPE)]
    else:
        raise InputError(f"The calibration file {path} is no .txt, .jsonl or .jsonl.gz file.")
    if not samples:
        raise InputError(
            f"The calibration file {path} is empty; it takes thousands of words of what the model will meet."
        )
    return samples


def _sample(value: dict[str, Any], where: str) -> Sample:
    if ("text" in value) == ("messages" in value):
        raise InputError(f"{where} must be a JSON object with {_SHAPE}.")
    if "text" in value:
        if not isinstance(value["text"], str) or not value["text"].strip():
            raise InputError(f"{where} has a text that is empty or no string.")
        return Sample(value["text"])
    thinking = value.get("thinking", False)
    if not isinstance(thinking, bool):
        raise InputError(f"{where} has thinking {thinking!r}, but must have true or false.")
    try:
        if not read_messages(value["messages"]):
            raise InputError(f"{where} has no messages.")
        read_tools(value.get("tools"))
    except RequestError as error:
        raise InputError(f"{where}: {error}") from None
    return Sample(None, value["messages"], value.get("tools"), thinking)


def sequences(
    found: Checkpoint,
    name: str,
    samples: Sequence[Sample],
    tokens: int,
    model: Callable[[], LLM],
    tick: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """About `tokens` tokens of `samples` as the checkpoint `found` reads them, drawn from all over the file.

    Args:
        name: of the checkpoint, for messages.
        model: loads it, for conversations that it must finish; not called without any.
        tick: called with the number of tokens found so far.

    Raises:
        InputError: the checkpoint has no tokenizer, or what is there is too little to learn from.
    """
    tokenizer = tokenizer_of(found, name)
    if tokenizer is None:
        raise InputError(f"{name} has no tokenizer, so it can't be calibrated with texts.")
    template = template_of(found, name, tokenizer)
    pieces = [piece for sample in samples for piece in _pieces(sample, tokenizer)]
    random.Random(0).shuffle(pieces)
    read: list[list[int]] = []
    speaker: LLM | None = None
    while pieces and (count := sum(map(len, read))) < tokens:
        tick(count)
        some, pieces = pieces[:ASKED_AT_ONCE], pieces[ASKED_AT_ONCE:]
        ids = [list(piece) if not isinstance(piece, Sample) else _render(piece, template) for piece in some]
        asked = [i for i, piece in enumerate(some) if isinstance(piece, Sample) and piece.open]
        if asked:
            speaker = speaker or model()
            ends = (tokenizer.turn_close, tokenizer.tool_response_open)
            params = SamplingParams(temperature=0.0, max_tokens=LONGEST_REPLY, stop_token_ids=ends)
            fitting = [i for i in asked if len(ids[i]) < min(LONGEST, speaker.max_model_len - LONGEST_REPLY)]
            for i, reply in zip(fitting, speaker.generate([ids[i] for i in fitting], params), strict=True):
                ids[i] += reply.token_ids
        read += [each[:LONGEST] for each in ids]
    return _enough(_cut(read, tokens), found.config.text.hidden_size)


def _pieces(sample: Sample, tokenizer: Tokenizer) -> list[Sample | list[int]]:
    """A conversation as it is; a text as ids in pieces that begin like a prompt."""
    if sample.text is None:
        return [sample]
    ids, most = tokenizer.encode(sample.text), LONGEST - 1
    return [[tokenizer.bos, *ids[first : first + most]] for first in range(0, len(ids), most)]


def _render(sample: Sample, template: ChatTemplate) -> list[int]:
    prompt = template.render(
        sample.messages, tools=sample.tools, thinking=sample.thinking, add_generation_prompt=sample.open
    )
    if prompt.media:
        raise InputError("A conversation of the calibration file shows something; calibration takes text only.")
    return list(prompt.token_ids)


def _cut(read: list[list[int]], tokens: int) -> list[list[int]]:
    """The first of them that have `tokens` tokens in all."""
    kept, count = [], 0
    for ids in read:
        if count >= tokens:
            break
        kept.append(ids[: tokens - count])
        count += len(kept[-1])
    return kept


def _enough(read: list[list[int]], width: int) -> list[list[int]]:
    if (count := sum(map(len, read))) < width:
        raise InputError(
            f"The calibration file gives {count:,} tokens, but a network of this width takes at least {width:,}, and "
            "ten times as many to do well; add to the file, or raise --calibrate-tokens."
        )
    return read
