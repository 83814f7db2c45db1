"""Guesses cost or save time and change nothing: not a token, not a log-probability, not an end."""

from __future__ import annotations

import logging
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cabochon import LLM, SamplingParams
from cabochon.chat.constraint import ReplyRules
from cabochon.chat.grammar import Vocabulary
from cabochon.config import read_config
from cabochon.engine.engine import Engine
from cabochon.engine.guessers import Drafting, Lookup
from cabochon.engine.options import EngineOptions
from cabochon.engine.request import Request
from cabochon.engine.speculative import DOUBT, WIDEST, Line, Speculator
from cabochon.engine.stats import Stats
from cabochon.engine.track import Track
from cabochon.errors import InputError
from cabochon.hub import BUNDLED
from cabochon.model.drafter import Drafter
from cabochon.weights.gguf_write import save_gguf
from cabochon.weights.load import save
from support.greedy import greedy
from support.toys import SIZES, WINDOW, calm_, random_ids, toy_drafter_json, toy_model, with_dtype
from test_drafter import stored_rows

QUESTIONS = ["What is 347 + 285?", "Sort: 5, 2, 9", "Capital of France?", "What is 12 * 7?"]


def drafter(size: str, dtype: torch.dtype) -> Drafter:
    return calm_(Drafter(read_config(with_dtype(toy_drafter_json(size), dtype))).to(dtype)).eval()


def guesser_of(llm: LLM) -> Drafting:
    speculator = llm.front.engine.speculator
    assert speculator is not None and isinstance(speculator.guesser, Drafting)
    return speculator.guesser


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always as many guesses as are allowed, whether they pay or not."""
    monkeypatch.setattr(Speculator, "count", lambda self, tracks: self.most)


@pytest.mark.parametrize("size", SIZES)
def test_guesses_are_those_of_the_whole_text(size, eager, monkeypatch):
    """In the engine the drafter reads pages of many requests; each guess is the one that it makes of the text alone."""
    target, guesser, made = toy_model(size, dtype=torch.float64), drafter(size, torch.float64), []
    learn = Track.guess

    def guess(track: Track, tokens: list[int]) -> None:
        made.append((track.ids.tolist(), tokens))
        learn(track, tokens)

    monkeypatch.setattr(Track, "guess", guess)
    options = EngineOptions(block_size=4, num_blocks=(90, 90), max_num_batched_tokens=16, num_speculative_tokens=3)
    engine = Engine(target, options, max_model_len=80, drafter=guesser)
    for i, length in enumerate((3 * WINDOW, 5, WINDOW)):
        engine.add(Request(str(i), random_ids(length, i), greedy(6, ignore_eos=True)))
    while engine.busy:
        engine.step()
    assert len(made) >= 12 and max(len(ids) for ids, _ in made) > 3 * WINDOW
    for ids, tokens in made:
        stored, hidden = stored_rows(size, ids[:-1])
        with torch.no_grad():
            whole = guesser.burst(target.language_model, torch.tensor(ids[-1:]), hidden, stored, 3)[0].tolist()
        assert tokens == whole[: len(tokens)]


def replies(llm: LLM) -> list[Any]:
    """Of every kind of request there is: greedy and sampled, parallel, penalised, constrained, stopped, cut short."""
    wishes = [
        SamplingParams(temperature=0, max_tokens=90),
        SamplingParams(temperature=1, seed=5, logprobs=2, n=3, max_tokens=40),
        SamplingParams(temperature=0.7, top_k=20, seed=6, presence_penalty=0.5, repetition_penalty=1.2, max_tokens=30),
        SamplingParams(temperature=1, seed=7, stop=["="], stop_token_ids=[300], min_p=0.1, max_tokens=60),
        SamplingParams(temperature=1, seed=8, max_tokens=5, logprobs=0, ignore_eos=True),
    ]
    prompts = [
        list(llm.render([{"role": "user", "content": question}], thinking=i % 2 == 0).token_ids)
        for i, question in enumerate(QUESTIONS)
    ]
    told: list[Any] = [reply for wish in wishes for reply in llm.generate(prompts, wish)]
    assert llm.tokenizer is not None
    words = Vocabulary(llm.tokenizer, llm.config.text.vocab_size)
    shape = {"type": "object", "properties": {"n": {"type": "integer"}, "word": {"type": "string", "maxLength": 9}}}
    rules = ReplyRules(
        llm.tokenizer, words, content=words.json_schema(shape | {"required": ["n", "word"]}, strict=True, field="shape")
    )
    for seed in range(3):
        params = SamplingParams(temperature=1, seed=seed, logprobs=1, max_tokens=60)
        told += llm.generate(prompts, params, constraint=rules.begin)
    chat = [{"role": "user", "content": "What is 58 - 19?"}]
    return [*told, llm.chat(chat, thinking=True, params=SamplingParams(temperature=1, seed=3))]


@pytest.fixture(scope="module")
def alone() -> tuple[list[Any], Stats]:
    llm = LLM()
    return replies(llm), llm.front.engine.stats


def test_guesses_change_nothing(alone, eager):
    """Bit for bit: also log-probabilities, what sampling draws, grammars with forced tokens and where replies end."""
    plain, before = alone
    llm = LLM(drafter="auto")
    assert replies(llm) == plain
    after = llm.front.engine.stats
    assert after.steps < 0.75 * before.steps
    assert after.accepted > 100 and after.drafted > after.accepted
    assert after.finished == before.finished
    llm.front.engine.check()


def test_the_next_turn_goes_on_from_a_guessed_end(eager):
    """A reply whose last tokens were guessed leaves the same cache behind as one without a drafter."""
    cached = []
    for guesser in (None, "auto"):
        llm = LLM(drafter=guesser)
        talk = [{"role": "user", "content": "What is 347 + 285?"}]
        params = SamplingParams(temperature=0)
        first = llm.chat(talk, params=params)
        talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And 12 + 7?"}]
        second = llm.chat(talk, params=params)
        assert second.usage is not None
        cached.append((first.text, second.text, second.usage.cached_tokens))
    assert cached[0] == cached[1] and cached[0][2] > 0


def test_a_drafter_that_fails_is_done_without(alone, eager, monkeypatch, caplog):
    llm, calls = LLM(drafter="auto"), []
    guesser = guesser_of(llm)
    burst = guesser.drafter.burst

    def breaks(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return burst(*arguments)

    monkeypatch.setattr(guesser.drafter, "burst", breaks)
    assert replies(llm) == alone[0]
    assert len(calls) == 5 and "replies go on without guesses" in caplog.text


def test_a_drafter_from_a_gguf_file(tmp_path, eager):
    """It has lost its clusters and so looks at every token; what it guesses is for the model to judge."""
    whole = guesser_of(LLM(drafter="auto"))
    save_gguf(tmp_path / "d.gguf", whole.drafter.config, whole.drafter.state_dict().__getitem__, "bf16")
    llm = LLM(drafter=tmp_path / "d.gguf")
    params = SamplingParams(temperature=0, max_tokens=40)
    ask = [{"role": "user", "content": QUESTIONS[0]}]
    assert llm.chat(ask, thinking=True, params=params) == LLM().chat(ask, thinking=True, params=params)
    assert llm.front.engine.stats.accepted > 10


# From the conversation ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_lookup_finds_the_longest_repetition(ids, count, shortest, more):
    lookup = Lookup(shortest + more, shortest)
    expected: list[int] = []
    for tail in range(lookup.longest, shortest - 1, -1):
        ends = [end for end in range(tail, len(ids)) if ids[end - tail : end] == ids[-tail:]]
        if ends and tail < len(ids):
            after = ids[ends[-1] :]
            expected = (after * count)[:count]
            break
    assert lookup.continuation(np.array(ids), count) == expected


def test_lookup_changes_nothing(alone, eager):
    llm = LLM(drafter="ngram:1-4")
    assert replies(llm) == alone[0]
    stats = llm.front.engine.stats
    assert stats.accepted > 20 and stats.drafted > stats.accepted
    llm.front.engine.check()


def test_what_repeats_itself_takes_fewer_steps(eager):
    """A reply that says one word over and over: four of five tokens come from guesses."""
    steps = {}
    for lookup in (None, Lookup()):
        engine = Engine(toy_model("E2B"), EngineOptions(num_blocks=(60, 60)), max_model_len=256, drafter=lookup)
        engine.add(Request("x", random_ids(9, 1), greedy(100, ignore_eos=True, logit_bias={77: 100.0})))
        ids = []
        while engine.busy:
            ids += [token for output in engine.step() for token in output.token_ids]
        assert ids == [77] * 100
        steps[lookup] = engine.stats.steps
    assert steps == {None: 100, Lookup(): 4 + 20}  # the first tail of three tokens ends before the fourth


@pytest.mark.parametrize("name", ["ngram:0", "ngram:5-3", "ngram:0-2"])
def test_lengths_that_are_none(name):
    with pytest.raises(InputError, match="give two numbers from 1 up"):
        Lookup.named(name)


# How many -------------------------------------------------------------------------------------------------------------


def paced(step: list[tuple[int, float]], guess: float, rate: float, replies: int = 1) -> list[int]:
    """The next 64 counts for `replies` replies, after steps of (rows, seconds), at `guess` seconds per guess."""
    speculator = Speculator.__new__(Speculator)
    speculator.most, speculator.steps, speculator._guess_seconds, speculator._rounds = 4, Line(), guess, 0
    for rows, seconds in step:
        speculator.steps.add(rows, seconds)
    track = Track(Request("x", [1, 2], SamplingParams(max_tokens=9)), 0, 0.0)
    track.hits, track.tries = rate, 1.0
    return [speculator.count(replies * [track]) for _ in range(64)]


def test_a_line_through_timings():
    line = Line()
    for rows in (1, 5, 3, 2, 8, 1):
        line.add(rows, 0.02 + 0.003 * rows)
    assert line(1) == pytest.approx(0.023) and line(10) == pytest.approx(0.05)
    flat = Line()
    flat.add(4, 0.1)
    assert flat(1) == flat(9) == pytest.approx(0.1)


def test_guesses_are_made_where_they_pay():
    memory_bound = [(1, 0.100), (5, 0.104)]
    assert paced(memory_bound, 0.002, rate=0.9).count(4) == 62, "all but one step in 32, which times a step without"
    assert paced(memory_bound, 0.2, rate=0.9).count(0) == 62, "a guess that costs two steps"
    assert paced(memory_bound, 0.002, rate=0.01).count(0) == 62
    bound_by_arithmetic = [(1, 0.1), (5, 0.5)]
    assert paced(bound_by_arithmetic, 0.002, rate=0.9).count(0) == 62
    assert (
        0
        < max(set(paced([(1, 0.1), (5, 0.2)], 0.005, rate=0.6)), key=paced([(1, 0.1), (5, 0.2)], 0.005, 0.6).count)
        < 4
    )
    assert paced([], 0.0, rate=0.7)[0] == 4, "nothing is known yet"
    assert set(paced(memory_bound, 0.002, rate=0.9, replies=WIDEST)) == {0}, "logits of so many rows take memory"


def test_a_drafter_that_is_never_right_is_told_of(eager, caplog):
    target, guesser = toy_model("E2B"), drafter("E2B", torch.float32)
    guesser.burst = lambda text, newest, hidden, stored, count: newest.new_zeros(len(newest), count)
    options = EngineOptions(block_size=8, num_blocks=(60, 60), max_num_seqs=8)
    engine = Engine(target, options, max_model_len=128, drafter=guesser, suppress=(0,))
    for i in range(8):
        engine.add(Request(str(i), random_ids(9, i), greedy(40, ignore_eos=True)))
    with caplog.at_level(logging.WARNING):
        while engine.busy:
            engine.step()
    assert engine.stats.drafted > DOUBT and engine.stats.accepted == 0
    assert len([record for record in caplog.records if "is the drafter this model's" in record.message]) == 1


def test_nothing_that_repeats_is_told_of_in_the_words_of_lookup(caplog):
    track = SimpleNamespace(hits=0.0, tries=1.0, matched=0)
    speculator = Speculator(Lookup(), 4, Stats(), clock=lambda: 0.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(DOUBT):
            speculator.learn(track, 2)
    (told,) = caplog.records
    assert "leave ngram out" in told.message and "drafter" not in told.message


# Loading --------------------------------------------------------------------------------------------------------------


def test_what_is_no_drafter_is_refused(tmp_path):
    with pytest.raises(InputError, match="pebble is no drafter; the published ones end in -assistant"):
        LLM(drafter=BUNDLED)
    other = drafter("E2B", torch.float32)
    save(tmp_path / "other", other, other.config)
    with pytest.raises(InputError, match=r"was made for another model: it expects a width of .* this model has 128"):
        LLM(drafter=tmp_path / "other")
    with pytest.raises(InputError, match="No folder `drafter` lies beside the model"):
        LLM(shutil.copytree(BUNDLED, tmp_path / "bare", ignore=shutil.ignore_patterns("drafter")), drafter="auto")
    with pytest.raises(InputError, match="num_speculative_tokens is 0, but must be 1 or more"):
        LLM(drafter="auto", num_speculative_tokens=0)
