"""The sampler against its definition, its statistics and its cost."""

import time

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cabochon import ops
from cabochon.engine import sampler
from cabochon.engine.request import Request, SamplingParams
from cabochon.engine.track import Track
from cabochon.ops import cpu, reference_drawing

VOCAB = 512


def tracks(params, count):
    return [Track(Request(str(i), [3, 4, 4], params), 0, 0.0) for i in range(count)]


def row(seed, vocab=VOCAB):
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


def reference_probs(logits, params):
    """Temperature, top-k, top-p, min-p in the reference's order and with its own code."""
    scores = logits[None].double() / params.temperature
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 64, 0.95, 0.0), (0.7, 5, 1.0, 0.0), (1.5, 0, 0.5, 0.0), (1.0, 0, 1.0, 0.1), (2.0, 0, 1.0, 0.0)],
)
def test_draws_follow_the_references_distribution(temperature, top_k, top_p, min_p):
    logits, count = row(1), 20_000
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_tokens=9)
    expected = reference_probs(logits, params)
    many = tracks(params, count)
    for i, track in enumerate(many):
        track.seed = i
    drawn = [d.token for d in sampler.draw(logits.expand(count, -1).clone(), many)]
    seen = np.bincount(drawn, minlength=VOCAB) / count
    assert not seen[(expected == 0).numpy()].any(), "a token was drawn that is cut off"
    assert np.abs(seen - expected.numpy()).sum() < 3 * np.sqrt(VOCAB / count)
    assert seen[int(expected.argmax())] == pytest.approx(float(expected.max()), abs=0.02)


def test_cuts_of_many_candidates_follow_the_reference():
    """What top-p and min-p leave of a flat row with thousands of candidates: drawn at the ends and in the midst."""
    logits = row(4, vocab=6000) / 10
    for top_p, min_p, top_k in [(0.9, 0.0, 0), (1.0, 0.3, 0), (0.5, 0.0, 5000)]:
        params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, max_tokens=9)
        expected = reference_probs(logits, params)
        order = logits.argsort(descending=True)
        ends = expected[order].cumsum(0)
        uniforms = (0.0, 0.3, 0.7, 1 - 1e-12)
        settings = torch.tensor([[u, 1.0, top_k or 6000, top_p, min_p] for u in uniforms], dtype=torch.float64).T
        tokens = ops.draw(logits.expand(4, -1), settings)[0]
        places = [int((order == token).nonzero()) for token in tokens]
        assert places[0] == 0 and places[3] == int((expected > 0).sum()) - 1 > reference_drawing.NARROW
        for place, uniform in zip(places, uniforms, strict=True):
            before = float(ends[place - 1]) if place else 0.0
            assert before - 1e-9 <= uniform <= float(ends[place]) + 1e-9


def test_a_draw_depends_on_nothing_but_its_own_row():
    params = [
        SamplingParams(temperature=1.0, top_k=64, top_p=0.95, max_tokens=9, seed=5),
        SamplingParams(temperature=0.0, top_k=0, top_p=1.0, max_tokens=9),
        SamplingParams(temperature=1.3, top_k=0, top_p=0.9, max_tokens=9, seed=6),
        SamplingParams(temperature=0.9, top_k=3, top_p=1.0, min_p=0.2, max_tokens=9, seed=7),
    ]
    logits = torch.stack([row(i) for i in range(4)])
    each = [Track(Request(str(i), [3], p), 0, 0.0) for i, p in enumerate(params)]
    single = [sampler.draw(logits[i : i + 1].clone(), [track])[0].token for i, track in enumerate(each)]
    assert [d.token for d in sampler.draw(logits.clone(), each)] == single
    assert [d.token for d in sampler.draw(logits.flip(0).clone(), each[::-1])] == single[::-1]


def test_uniforms_are_uniform_and_repeatable():
    numbers = [sampler.uniform(seed, 0) for seed in range(100_000)]
    assert numbers[:9] == [sampler.uniform(seed, 0) for seed in range(9)] and min(numbers) >= 0 and max(numbers) < 1
    counts, _ = np.histogram(numbers, 50, (0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 100  # chi-square, 49 degrees of freedom
    steps = [sampler.uniform(2**64 - 7, place) for place in range(1000)]
    assert abs(np.corrcoef(steps[1:], steps[:-1])[0, 1]) < 0.1


def test_penalties_by_their_definitions():
    logits = row(2)
    track = Track(Request("a", [3, 4, 4], SamplingParams(repetition_penalty=2.0)), 0, 0.0)
    for token in (8, 8, 9):
        track.append(token)
    out = logits.clone()
    sampler._adjust(out, track)
    for token in (3, 4, 8, 9):
        value = float(logits[token])
        assert float(out[token]) == pytest.approx(value / 2 if value > 0 else value * 2)
    track.request = Request("a", [3, 4, 4], SamplingParams(presence_penalty=0.5, frequency_penalty=0.25))
    out = logits.clone()
    sampler._adjust(out, track)
    assert float(logits[8] - out[8]) == pytest.approx(1.0, abs=1e-5)
    assert float(logits[9] - out[9]) == pytest.approx(0.75, abs=1e-5)
    assert torch.equal(out[:8], logits[:8]), "the prompt's tokens are not penalised"


def test_logprobs_are_of_the_untouched_logits():
    logits = row(3)
    params = SamplingParams(temperature=0.0, logprobs=2, logit_bias={7: 1000.0})
    (drawn,) = sampler.draw(logits[None].clone(), tracks(params, 1))
    expected = logits.log_softmax(-1)
    assert drawn.token == drawn.logprob.token_id == 7
    assert drawn.logprob.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert [token for token, _ in drawn.logprob.top] == logits.topk(2).indices.tolist()


def test_suppressed_tokens_are_never_drawn():
    logits = torch.zeros(64, VOCAB)
    logits[:, 5] = 50.0
    params = SamplingParams(temperature=1.0, top_k=64, top_p=0.95)
    drawn = sampler.draw(logits, tracks(params, 64), suppress=torch.tensor([5]))
    assert 5 not in {d.token for d in drawn}


def cost_in_passes(repeats, **limits):
    """What drawing 64 tokens from 262,144 logits costs, in passes: torch's time to find the largest logit of each row.

    The two alternate on one thread, so that they find the same caches and neighbours; the time is that of the thread,
    which on a crowded machine is not the time on the wall.
    """
    logits = torch.randn(64, 262_144)
    params = SamplingParams(temperature=1.0, seed=1, **limits or {"top_k": 64, "top_p": 0.95})
    many = tracks(params, 64)
    passes, draws = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(repeats):
            times = [time.thread_time()]
            logits.amax(-1)
            times.append(time.thread_time())
            sampler.draw(logits, many)
            times.append(time.thread_time())
            passes.append(times[1] - times[0])
            draws.append(times[2] - times[1])
    torch.set_num_threads(threads)
    print(f"one pass {min(passes) * 1e3:.1f} ms, sampling {min(draws) * 1e3:.1f} ms")
    return min(draws) / min(passes)


def test_sampling_does_not_sort_the_vocabulary():
    assert cost_in_passes(7) < 8, "a sort costs some hundred passes"


@pytest.mark.skipif(not cpu.supported(), reason="installed without the compiled kernels")
@pytest.mark.parametrize("limits", [{"top_k": 0}, {"top_k": 0, "top_p": 0.95}, {"top_k": 0, "min_p": 0.05}])
def test_sampling_without_top_k_does_not_either(limits):
    assert cost_in_passes(3, **limits) < 100, "a sort costs some hundred passes"


@pytest.mark.slow
@pytest.mark.skipif(not cpu.supported(), reason="installed without the compiled kernels")
def test_sampling_costs_two_passes_over_the_logits_at_most():
    ratio = cost_in_passes(50)
    print(f"ratio {ratio:.2f}")
    assert ratio <= 2.0
