"""The prefix cache on conversations, and pages under thousands of requests."""

import random
import resource
from pathlib import Path

import pytest
import torch

from cabochon.chat.template import Template
from cabochon.chat.tokenizer import Tokenizer
from cabochon.engine.engine import Engine
from cabochon.engine.options import EngineOptions
from cabochon.engine.request import Request, SamplingParams
from cabochon.hub import BUNDLED
from support.greedy import alone, finish, greedy
from support.toys import random_ids, toy_model

SHAPE = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
WINDOW = 48
TURNS = 6


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(BUNDLED)


@pytest.fixture(scope="module")
def network(tokenizer):
    size = len(tokenizer)
    return toy_model("E2B", sliding_window=WINDOW, vocab_size=size, vocab_size_per_layer_input=size, **SHAPE)


class Recite:
    """Lets a reply be the given ids, as a trained model would write them."""

    def __init__(self, ids):
        self.left = list(ids)

    def mask(self, row):
        keep = float(row[self.left[0]])
        row.fill_(-float("inf"))
        row[self.left[0]] = keep

    def advance(self, token_id):
        self.left.pop(0)

    def forced(self):
        return ()

    def done(self):
        return not self.left


def converse(engine, template, tokenizer, thinking, seed):
    """One conversation, a turn per `next`: yields (tokens that could be shared, tokens that were)."""
    draw = random.Random(seed)
    messages = [{"role": "system", "content": f"Number {seed}. " + " ".join(draw.choices(WORDS, k=2 * WINDOW))}]
    last, shareable = [], 0
    for turn in range(TURNS):
        messages.append({"role": "user", "content": " ".join(draw.choices(WORDS, k=8))})
        prompt = template.render(messages, thinking=thinking)
        same = next((i for i, (a, b) in enumerate(zip(last, prompt.token_ids, strict=False)) if a != b), len(last))
        answer = " ".join(draw.choices(WORDS, k=8))
        reply = [*tokenizer.encode(answer), tokenizer.turn_close]
        if thinking:
            thought = "thought\n" + " ".join(draw.choices(WORDS, k=8)) + "\n"
            reply = [tokenizer.channel_open, *tokenizer.encode(thought), tokenizer.channel_close, *reply]
        engine.add(
            Request(
                f"{seed}.{turn}",
                prompt.token_ids,
                greedy(len(reply), repetition_penalty=1.0),
                boundaries=prompt.boundaries,
                keep_end=not thinking,
                constraint=lambda reply=reply: Recite(reply),
            )
        )
        outputs = finish(engine)
        assert [token for output in outputs for token in output.token_ids] == reply
        cached = outputs[-1].cached_tokens
        yield (min(same, shareable), cached) if turn else (0, 0)
        last = [*prompt.token_ids, *reply]
        # The state after the reply lacks its last token, which was drawn but never read.
        shareable = prompt.boundaries[-1] if thinking else len(last) - 1
        messages.append({"role": "assistant", "content": answer})


WORDS = ["one", "two", "red", "blue", "house", "tree", "river", "stone", "bird", "runs", "sings", "falls", "over"]


@pytest.mark.parametrize(("family", "thinking"), [("small", True), ("large", False)])
def test_conversations_in_turn_are_read_once(network, tokenizer, family, thinking):
    options = EngineOptions(block_size=16, num_blocks=(160, 400), max_num_seqs=8, max_snapshots=30)
    engine = Engine(network, options, max_model_len=1024)
    talks = [converse(engine, Template(tokenizer, family), tokenizer, thinking, seed) for seed in range(8)]
    could = did = 0
    for _ in range(TURNS):
        for talk in talks:
            shared, cached = next(talk)
            could, did = could + shared, did + cached
    assert could > 8 * (TURNS - 1) * 3 * WINDOW, "conversations should be some windows long"
    print(f"thinking {thinking}, {family}: {did} of {could} shareable tokens were not computed again")
    assert did >= 0.95 * could
    engine.check()


def test_a_branch_is_found_and_kept(network):
    """The second text that leaves a known one shows where; the third starts there."""
    stem = random_ids(100, seed=1)
    options = EngineOptions(block_size=16, num_blocks=(60, 100), max_num_seqs=4)
    engine = Engine(network, options, max_model_len=256)
    cached = []
    for seed in range(2, 6):
        prompt = [*stem, *random_ids(20, seed=seed)]
        engine.add(Request(str(seed), prompt, greedy(3, ignore_eos=True)))
        cached.append(finish(engine, check=True)[-1].cached_tokens)
    assert cached == [0, 0, 96, 96]
    fresh = Engine(network, options, max_model_len=256)
    expected = alone(fresh, [*stem, *random_ids(20, seed=5)], greedy(3, ignore_eos=True))
    assert alone(engine, [*stem, *random_ids(20, seed=5)], greedy(3, ignore_eos=True)) == expected


def test_other_salts_share_nothing(network):
    engine = Engine(network, EngineOptions(block_size=16, num_blocks=(60, 100)), max_model_len=256)
    prompt = random_ids(60)
    cached = []
    for i, salt in enumerate([b"", b"adapter", b"", b"adapter"]):
        engine.add(Request(str(i), prompt, greedy(2, ignore_eos=True), boundaries=(50,), salt=salt))
        cached.append(finish(engine)[-1].cached_tokens)
    assert cached == [0, 0, 50, 50]


def test_snapshots_stay_within_their_limit(network):
    options = EngineOptions(block_size=16, num_blocks=(40, 200), max_num_seqs=2, max_snapshots=3)
    engine = Engine(network, options, max_model_len=256)
    for seed in range(12):
        engine.add(Request(str(seed), random_ids(60, seed=seed), greedy(2, ignore_eos=True), boundaries=(40,)))
        finish(engine, check=True)
        assert engine.gauges().snapshot_pages <= engine.cache.snapshots.limit
    assert engine.gauges().snapshots >= 3


# Storms ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smallest():
    return toy_model("E2B", hidden_size=32, intermediate_size=48, sliding_window=16, **SHAPE)


def resident():
    """Memory of this process in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def storm(network, requests):
    """Random requests, a fifth of them aborted while they wait, are read or reply, on pages for a third of the seats.

    Yields the engine each time another tenth of the requests has been sent.
    """
    draw = random.Random(torch.initial_seed())
    options = EngineOptions(block_size=8, num_blocks=(56, 64), max_num_seqs=32, max_num_batched_tokens=128)
    engine = Engine(network, options, max_model_len=64)
    sent = 0
    while engine.busy or sent < requests:
        while sent < requests and len(engine.scheduler.waiting) < 8:
            prompt = random_ids(draw.randint(1, 40), seed=draw.randint(0, 50))
            params = SamplingParams(
                temperature=1.0, top_k=8, top_p=1.0, max_tokens=draw.randint(1, 6), n=draw.choice([1, 1, 1, 2])
            )
            boundaries = (len(prompt) // 2,) if len(prompt) > 8 else ()
            engine.add(Request(str(sent), prompt, params, boundaries=boundaries, priority=draw.choice([0, 0, 1])))
            sent += 1
            if sent % (requests // 10) == 0:
                yield engine
        for output in engine.step():
            if draw.random() < 0.05:
                engine.abort(output.request_id)
        if draw.random() < 0.3:
            engine.abort(str(draw.randint(sent - 16, sent - 1)))
        engine.check()
    yield engine


def all_pages_come_back(engine):
    while engine.cache.snapshots.drop_oldest():
        pass
    return engine.cache.sliding.used == engine.cache.full.used == 0


def aborted(engine):
    """Share of the replies that ended so."""
    return engine.stats.finished["abort"] / sum(engine.stats.finished.values())


def test_no_page_is_lost_in_a_storm(smallest):
    *_, engine = storm(smallest, 300)
    assert 0.1 < aborted(engine) < 0.35
    assert all_pages_come_back(engine)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_no_page_is_lost_and_memory_is_flat_after_ten_thousand_requests(smallest):
    engine, memory = None, []
    for engine in storm(smallest, 10_000):  # noqa: B007 - the same engine every time, read below
        memory.append(resident())
    stats = engine.stats
    print(f"{sum(stats.finished.values())} replies, {aborted(engine):.1%} aborted, {stats.preemptions} preemptions,")
    print(f"{stats.prefix_hits} prefix hits, {stats.steps} steps; memory in MiB, first tenth to last and after:")
    print(" ".join(f"{kib / 1024:.1f}" for kib in memory))
    assert 0.18 < aborted(engine) < 0.3
    assert stats.preemptions > 100
    assert all_pages_come_back(engine)
    assert max(memory[5:]) - max(memory[:5]) < 4096
