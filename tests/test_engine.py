"""What the engine promises to one request, and what it does when something goes wrong."""

import re

import pytest
import torch

from cabochon.engine.engine import Engine
from cabochon.engine.options import EngineOptions
from cabochon.engine.reply import loops
from cabochon.engine.request import Request, SamplingParams, SoftSpan
from cabochon.errors import ContextError, InputError, RequestError
from cabochon.llm import LLM
from cabochon.llm.loading import Loaded
from support.greedy import alone, finish, greedy
from support.toys import WINDOW, random_ids, toy_model

SMALL = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}


@pytest.fixture(scope="module")
def network():
    return toy_model("E2B", **SMALL)


def engine(network, **options):
    return Engine(network, EngineOptions(**{"block_size": 8, "num_blocks": (40, 40), **options}), max_model_len=128)


def collect(outputs):
    """(request, index) -> tokens, and the last output of each."""
    tokens, last = {}, {}
    for output in outputs:
        key = (output.request_id, output.index)
        tokens.setdefault(key, []).extend(output.token_ids)
        last[key] = output
    return tokens, last


class Script:
    """A constraint that lets a reply be one list of ids, drawn or forced."""

    def __init__(self, ids, forced=False):
        self.left, self.force = list(ids), forced

    def mask(self, row):
        keep = row[self.left[0]].clone()
        row.fill_(-torch.inf)
        row[self.left[0]] = keep

    def advance(self, token_id):
        assert token_id == self.left.pop(0)

    def forced(self):
        return tuple(self.left) if self.force else ()

    def done(self):
        return not self.left


# Admission ------------------------------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused_with_the_numbers(network):
    e = engine(network, num_blocks=(8, 4))
    with pytest.raises(
        ContextError, match=r"100 tokens and the reply may take 50, together 150, but the context is 128"
    ):
        e.add(Request("a", random_ids(100), greedy(50)))
    with pytest.raises(ContextError, match=r"up to 40 tokens need 5 global pages of 8 tokens, but the cache has 4"):
        e.add(Request("a", random_ids(30), greedy(10)))
    with pytest.raises(RequestError, match="empty"):
        e.add(Request("a", [], greedy(1)))
    with pytest.raises(RequestError, match="Token id 320 is not in the vocabulary of 320 tokens"):
        e.add(Request("a", [5, 320], greedy(1)))
    assert not e.busy


def test_the_facade_refuses_what_leaves_no_room_for_a_reply(network):
    llm = LLM.of(Loaded("toy", network), max_model_len=64, block_size=8, num_blocks=(16, 16))
    with pytest.raises(ContextError, match="64 tokens, but at most 63 fit"):
        llm.generate([random_ids(64)])
    with pytest.raises(InputError, match="no tokenizer"):
        llm.generate(["text"])
    with pytest.raises(InputError, match="There is no engine option 'block_sise'"):
        LLM.of(Loaded("toy", network), block_sise=8)
    with pytest.raises(InputError, match="must be auto, fp8 or int8"):
        LLM.of(Loaded("toy", network), kv_cache_dtype="int4")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_num_seqs", 0, "1 or more"),
        ("block_size", -1, "1 or more"),
        ("max_snapshots", -1, "0 \\(none\\) or more"),
        ("gpu_memory_utilization", 90, "above 0 and at most 1"),
    ],
)
def test_options_out_of_range_are_named(name, value, allowed):
    with pytest.raises(InputError, match=f"{name} is {value}, but must be {allowed}"):
        EngineOptions(**{name: value})


def test_order_is_by_priority_then_arrival(network):
    e = engine(network, max_num_seqs=1)
    for name, priority in (("late", 1), ("first", 0), ("second", 0), ("vip", -1)):
        e.add(Request(name, random_ids(5), greedy(2, ignore_eos=True), priority=priority))
    order = [output.request_id for output in finish(e) if output.finish_reason]
    assert order == ["vip", "first", "second", "late"]


def test_replies_go_on_while_a_long_prompt_is_read(network):
    e = engine(network, max_num_batched_tokens=8)
    e.add(Request("short", random_ids(4), greedy(20, ignore_eos=True)))
    e.step()
    e.add(Request("long", random_ids(70), greedy(1, ignore_eos=True)))
    served = [[output.request_id for output in e.step()] for _ in range(10)]
    assert served == [["short"]] * 9 + [["short", "long"]]  # 70 tokens in chunks of 8 - 1


def test_higher_priority_takes_pages_from_lower(network):
    e = engine(network, num_blocks=(12, 6), max_num_seqs=2)
    e.add(Request("low", random_ids(30), greedy(10, ignore_eos=True), priority=1))
    e.step()
    e.add(Request("high", random_ids(30, seed=1), greedy(10, ignore_eos=True)))
    tokens, _ = collect(finish(e, check=True))
    assert e.stats.preemptions == 1
    assert [len(tokens[name, 0]) for name in ("low", "high")] == [9, 10]  # the first step's token is not among these


# Failures are alone ---------------------------------------------------------------------------------------------------


def test_a_request_without_numbers_fails_alone():
    poisoned = toy_model("E2B", **SMALL)
    with torch.no_grad():
        poisoned.language_model.embed_tokens_per_layer.weight[7] = torch.nan
    e = engine(poisoned)
    good = [i for i in random_ids(20) if i != 7]
    expected = alone(engine(poisoned), good, greedy(6, ignore_eos=True))
    e.add(Request("good", good, greedy(6, ignore_eos=True)))
    e.add(Request("bad", [*good[:9], 7, *good[9:]], greedy(6, ignore_eos=True)))
    tokens, last = collect(finish(e, check=True))
    assert last["bad", 0].finish_reason == "error"
    assert "not numbers" in last["bad", 0].error
    assert tokens["good", 0] == expected
    assert not any(memory.isnan().any() for memory in e.cache.store.codes.values())


def test_a_broken_constraint_fails_alone(network):
    class Broken(Script):
        def mask(self, row):
            raise ValueError("no such rule")

    e = engine(network)
    e.add(Request("bad", random_ids(9), greedy(4), constraint=lambda: Broken([1])))
    e.add(Request("good", random_ids(9), greedy(4, ignore_eos=True)))
    _, last = collect(finish(e))
    assert last["bad", 0].error == "The constraint of this request failed: no such rule"
    assert last["good", 0].finish_reason == "length"


def test_a_constraint_that_forbids_everything_says_so(network):
    class Deadlock(Script):
        def mask(self, row):
            row.fill_(-torch.inf)

    e = engine(network)
    e.add(Request("stuck", random_ids(9), greedy(4), constraint=lambda: Deadlock([1])))
    assert finish(e)[-1].error == "Every token is forbidden here."


def test_abort_frees_everything(network):
    e = engine(network, enable_prefix_caching=False)
    for name in "abc":
        e.add(Request(name, random_ids(30), greedy(50, ignore_eos=True, n=2)))
    e.step()
    e.step()
    for name in "abc":
        e.abort(name)
    e.abort("nobody")
    outputs = finish(e, check=True)
    assert {output.finish_reason for output in outputs} == {"abort"}
    assert len(outputs) == 6
    assert e.cache.full.used == e.cache.sliding.used == 0


# Replies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", [False, True])
def test_constraints_rule_the_reply(network, forced):
    script = random_ids(6, seed=9)
    e = engine(network)
    e.add(Request("a", random_ids(9), greedy(20, logprobs=0), constraint=lambda: Script(script, forced)))
    outputs = finish(e)
    tokens, last = collect(outputs)
    assert tokens["a", 0] == script
    assert last["a", 0].finish_reason == "stop"
    assert len(outputs) == (1 if forced else 6)
    assert sum(len(output.logprobs) for output in outputs) == 6


def test_forced_tokens_are_read_before_the_next_is_drawn(network):
    """After forced tokens the reply goes on as if they had been part of the prompt."""
    prompt, script = random_ids(20), random_ids(5, seed=9)

    class Opening(Script):
        def mask(self, row):
            if self.left:
                super().mask(row)

        def advance(self, token_id):
            if self.left:
                super().advance(token_id)

        def done(self):
            return False

    e = engine(network)
    e.add(Request("a", prompt, greedy(11, ignore_eos=True), constraint=lambda: Opening(script, forced=True)))
    tokens, _ = collect(finish(e))
    expected = alone(engine(network), [*prompt, *script], greedy(6, ignore_eos=True))
    assert tokens["a", 0] == [*script, *expected]


def test_ends(network):
    prompt = random_ids(20)
    whole = alone(engine(network), prompt, greedy(12, ignore_eos=True))
    third = whole[2]
    at = whole.index(third)

    def reply(**more):
        e = engine(network)
        eos = more.pop("eos_ids", ())
        e.add(Request("a", prompt, greedy(12, **more), eos_ids=eos))
        tokens, last = collect(finish(e))
        return tokens["a", 0], last["a", 0].finish_reason, last["a", 0].stop_reason

    assert reply(eos_ids={third}) == (whole[: at + 1], "stop", third)
    assert reply(eos_ids={third}, ignore_eos=True) == (whole, "length", None)
    assert reply(stop_token_ids=[third], ignore_eos=True) == (whole[: at + 1], "stop", third)
    assert reply(logit_bias={third: -100.0}, ignore_eos=True)[0][:at] == whole[:at]
    assert third not in reply(logit_bias={third: -100.0}, ignore_eos=True)[0]


def test_a_loop_ends_the_reply(network):
    params = SamplingParams(temperature=0, top_k=0, top_p=1, max_tokens=100, ignore_eos=True)
    e = engine(network)
    e.add(Request("a", random_ids(9), params, loop_guard=32))  # unpenalised, a toy echoes its last token
    tokens, last = collect(finish(e))
    assert last["a", 0].finish_reason == "loop"
    assert 32 <= len(tokens["a", 0]) < 80


def test_what_counts_as_a_loop():
    cycle = torch.tensor([5, 6, 7] * 20).numpy()
    assert loops(cycle, 32, len(cycle))
    assert not loops(cycle, 32, 31)
    broken = cycle.copy()
    broken[-4] = 9
    assert not loops(broken, 32, len(cycle))
    assert not loops(torch.arange(60).numpy() % 9, 32, 60)


def test_prompt_logprobs_are_those_of_the_logits(network):
    llm = LLM.of(
        Loaded("toy", network), max_model_len=128, block_size=8, num_blocks=(40, 40), max_num_batched_tokens=11
    )
    ids = random_ids(30)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
    llm.generate([ids], params)
    (reply,) = llm.generate([ids], params)
    assert reply.cached_tokens == 0, "they bypass the prefix cache"
    expected = llm.logits(ids).log_softmax(-1)
    assert reply.prompt_logprobs[0] is None
    assert len(reply.prompt_logprobs) == 30
    for i, entry in enumerate(reply.prompt_logprobs[1:]):
        assert entry.token_id == ids[i + 1]
        assert entry.logprob == pytest.approx(float(expected[i, ids[i + 1]]), abs=1e-5)
        values = expected[i].topk(3).values.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(values, abs=1e-5)


def test_replies_with_seeds_can_be_drawn_again(network):
    params = SamplingParams(temperature=3.0, top_k=0, top_p=0.9, max_tokens=8, seed=11, n=3, ignore_eos=True)
    roomy = engine(network)
    roomy.add(Request("a", random_ids(20), params))
    first, _ = collect(finish(roomy))
    assert len({tuple(ids) for ids in first.values()}) == 3
    tight = engine(network, num_blocks=(6, 4), max_num_seqs=2, max_num_batched_tokens=5)
    tight.add(Request("a", random_ids(20), params))
    again, _ = collect(finish(tight, check=True))
    assert again == first


def test_forks_share_the_prompt(network):
    e = engine(network, block_size=8)
    e.add(Request("a", random_ids(21), greedy(4, ignore_eos=True, n=3)))
    e.step()
    assert e.stats.tokens_computed == 21
    assert e.cache.full.used == 2 + 3  # two full pages shared, the partly filled one copied twice
    tokens, _ = collect(finish(e, check=True))
    assert len({tuple(ids) for ids in tokens.values()}) == 1


def test_steps_that_skip_count_the_same_tokens(network):
    ids = random_ids(4 * WINDOW)
    replies = [
        alone(engine(network, skip_unwanted=skip, max_num_batched_tokens=20), ids, greedy(5, ignore_eos=True))
        for skip in (True, False)
    ]
    assert replies[0] == replies[1]


def test_a_prompt_that_ends_in_a_picture_and_comes_again_disturbs_nobody():
    """Only the picture's last token is left to compute; its span must not reach into the rows of others."""
    large = toy_model("31B")
    large.encode = list  # an item is its features
    picture = SoftSpan(10, 6, b"a", torch.randn(6, 64), True)
    prompt, other = random_ids(16, seed=1), random_ids(40, seed=2)
    e = engine(large)
    expected = alone(e, prompt, greedy(4, ignore_eos=True), (picture,)), alone(e, other, greedy(12, ignore_eos=True))
    e = engine(large)
    e.add(Request("first", prompt, greedy(4, ignore_eos=True), spans=(picture,), boundaries=(16,)))
    finish(e)
    e.add(Request("other", other, greedy(12, ignore_eos=True)))
    e.step()
    e.add(Request("again", prompt, greedy(4, ignore_eos=True), spans=(picture,)))
    tokens, last = collect([*e.step(), *finish(e)])
    assert last["again", 0].cached_tokens == 15
    assert tokens["again", 0] == expected[0]
    assert tokens["other", 0] == expected[1][1:]


# Counters -------------------------------------------------------------------------------------------------------------


def test_counters(network):
    e = engine(network)
    e.add(Request("a", random_ids(20), greedy(5, ignore_eos=True)))
    finish(e)
    e.add(Request("b", [*random_ids(20), 5, 6], greedy(5, ignore_eos=True), boundaries=(20,)))
    finish(e)
    e.add(Request("c", [*random_ids(20), 7], greedy(5, ignore_eos=True)))
    finish(e)
    stats, gauges = e.stats, e.gauges()
    assert (stats.requests, stats.tokens_in, stats.tokens_out) == (3, 63, 15)
    assert stats.finished == {"length": 3}
    assert (stats.prefix_hits, stats.prefix_misses, stats.tokens_saved) == (1, 2, 20)
    assert stats.tokens_computed == 63 - 20 + 3 * 4
    assert stats.first_token.count == 3
    assert stats.inter_token.count == 12
    assert stats.step_time.count == stats.steps
    assert (gauges.running, gauges.waiting) == (0, 0)
    assert gauges.snapshots == 5  # three ends, the boundary at 20, and 16 where b left a
    assert gauges.snapshot_bytes == gauges.snapshot_pages * e.cache.plan.page_bytes("sliding")
    assert re.match(r"Gauges\(running=0", str(gauges))
