"""The Responses API's logprobs: they belong to the answer's text, whatever markers and pauses lie between."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest

from cabochon.chat.tokenizer import Tokenizer
from cabochon.engine.request import StepOutput, TokenLogprob
from cabochon.llm.replies import ChatReply
from cabochon.server import wire
from cabochon.server.response_writer import ResponseWriter
from support.words import small_tokenizer

CALL = ["<|tool_call>", "call:f{a:", '<|"|>', "Rome", '<|"|>', "}", "<tool_call|>"]
REPLIES = {
    "plain": ["Good day."],
    "quotes that belong to no call": ["She said ", '<|"|>', "go", '<|"|>', "."],
    "after a thought": ["<|channel>", "thought\n", "Hm. ", "<channel|>", "Yes."],
    "after an empty thought": ["<|channel>", "thought\n", "<channel|>", "Yes."],
    "before a thought": ["Well, \n", "<|channel>", "thought\n", "hm", "<channel|>", "yes."],
    "before a call": ["One moment.\n", *CALL],
    "around a call": ["One moment. ", *CALL, "There."],
    "a stray marker": ["a", "<|image|>", "b", "<turn|>"],
}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return small_tokenizer()


def written(words: Tokenizer, steps: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The output items of a reply whose tokens come in these steps."""
    ids = count()
    request = wire.ResponsesRequest(input="Go on.", top_logprobs=0)
    writer = ResponseWriter("resp_1", 0, "toy", request, lambda kind: f"{kind}_{next(ids)}", words)
    reply = ChatReply(words, "start", (), 0)
    for step in steps:
        logprobs = tuple(TokenLogprob(token, -0.5) for token in step)
        chunk = reply.push(
            StepOutput("toy", 0, tuple(step), logprobs, finish_reason="stop" if step is steps[-1] else None)
        )
        writer.events(chunk.events, chunk.spoken)
    return writer.output


def text_and_spelt(words: Tokenizer, output: list[dict[str, Any]]) -> tuple[str, str]:
    """The text and what its logprobs' bytes spell. A quote token is shown as a plain quote where it is no call's."""
    parts = [part for item in output if item["type"] == "message" for part in item["content"]]
    spelt = b"".join(bytes(entry["bytes"]) for part in parts for entry in part["logprobs"]).decode(errors="ignore")
    mark = words.control[words.quote]
    text = "".join(part["text"] for part in parts).replace("\ufffd", "")
    return text.replace(mark, '"'), spelt.replace(mark, '"')


@pytest.mark.parametrize("pieces", REPLIES.values(), ids=REPLIES.keys())
@pytest.mark.parametrize("together", [False, True], ids=["token by token", "in one step"])
def test_logprobs_spell_the_text(words: Tokenizer, pieces: list[str], together: bool) -> None:
    named = {spelling: token for token, spelling in words.control.items()}
    ids = [token for piece in pieces for token in ([named[piece]] if piece in named else words.encode(piece))]
    text, spelt = text_and_spelt(words, written(words, [ids] if together else [[token] for token in ids]))
    assert text and spelt == text


def test_logprobs_of_random_tokens(words: Tokenizer) -> None:
    """Letters, broken letters and quotes in any order."""
    tokens = [token for token in range(len(words)) if token not in words.control] + 20 * [words.quote]
    for _ in range(100):
        text, spelt = text_and_spelt(words, written(words, [[token] for token in random.choices(tokens, k=40)]))
        assert spelt == text
