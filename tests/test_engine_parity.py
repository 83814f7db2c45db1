"""The engine against the reference implementation and against itself in other company."""

from functools import cache

import pytest
import torch

from cabochon.engine.engine import Engine
from cabochon.engine.options import EngineOptions
from cabochon.engine.request import Request, SamplingParams
from cabochon.llm import LLM
from cabochon.llm.loading import Loaded
from support.greedy import PENALTY, Ties, alone, finish, greedy, own_logits, same_reply
from support.reference import oracle, oracle_logits, reference, reference_logits
from support.toys import SIZES, WINDOW, random_ids, toy_model

LENGTH = 4 * WINDOW
POOL = {"block_size": 8, "num_blocks": (64, 64), "max_num_seqs": 8}


def llm(size, dtype=torch.float32, **options):
    return LLM.of(Loaded(size, toy_model(size, dtype=dtype)), max_model_len=256, **{**POOL, **options})


@pytest.mark.parametrize("chunk", [1000, 1, 7, 64])
@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_the_reference_in_float64(size, chunk):
    ids = random_ids(LENGTH, seed=3)
    ours = llm(size, max_num_batched_tokens=chunk).logits(ids)
    assert ours.dtype == torch.float32
    assert ours.shape == (LENGTH, 320)
    torch.testing.assert_close(ours.double(), oracle_logits(size, ids), atol=3e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_the_path_that_skips_gives_the_same_first_token(size):
    model = llm(size, max_num_batched_tokens=48)
    ids = random_ids(LENGTH, seed=4)
    (reply,) = model.generate([ids], SamplingParams(temperature=0, max_tokens=1, logprobs=20))
    expected = model.logits(ids)[-1].log_softmax(-1)
    found = dict(reply.logprobs[0].top)
    assert len(found) == 20
    for token, logprob in found.items():
        assert logprob == pytest.approx(float(expected[token]), abs=2e-5)
    assert sorted(found) == sorted(expected.topk(20).indices.tolist())


@pytest.mark.parametrize("size", SIZES)
def test_greedy_ids_equal_generate(size):
    prompt, ties = random_ids(40, seed=5), Ties()
    (reply,) = llm(size).generate([prompt], greedy(24, ignore_eos=True))
    with torch.inference_mode():
        expected = (
            oracle(size)
            .generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=24,
                min_new_tokens=24,
                do_sample=False,
                repetition_penalty=PENALTY,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :]
            .tolist()
        )
    assert len(set(expected)) > 8, "the reply should wander"
    same_reply(prompt, reply.token_ids, expected, lambda ids: oracle_logits(size, list(ids))[-1], ties)


@pytest.mark.parametrize("size", SIZES)
def test_replies_do_not_depend_on_company(size):
    network, ties = toy_model(size), Ties()
    options = {"block_size": 8, "num_blocks": (256, 256), "max_num_seqs": 17, "max_num_batched_tokens": 50}
    lengths = [5 + 7 * i % 60 for i in range(17)]
    prompts = [random_ids(length, seed=i) for i, length in enumerate(lengths)]
    single = [
        alone(Engine(network, EngineOptions(**options), max_model_len=128), p, greedy(16, ignore_eos=True))
        for p in prompts
    ]
    crowd = Engine(network, EngineOptions(**options), max_model_len=128)
    for i, prompt in enumerate(prompts):
        crowd.add(Request(str(i), prompt, greedy(16, ignore_eos=True)))
    replies = [[] for _ in prompts]
    for output in finish(crowd):
        replies[int(output.request_id)] += output.token_ids
    for prompt, got, expected in zip(prompts, replies, single, strict=True):
        same_reply(prompt, got, expected, own_logits(network), ties)
    print(f"{size}: {ties}")


def kl(exact, logits):
    """KL to `exact` of every token [T]."""
    p = exact.log_softmax(-1)
    return (p.exp() * (p - logits.double().log_softmax(-1))).sum(-1)


@cache
def of_bfloat16_weights(size):
    """The reference in float64, with the weights that bfloat16 leaves: what they lost is lost for either side."""
    model = reference(size)
    with torch.no_grad():
        for weight in model.state_dict().values():
            weight.copy_(weight.bfloat16())
    return model


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_is_nearer_to_float64_than_the_reference_in_bfloat16(size):
    model, ours, theirs = llm(size, torch.bfloat16, max_num_batched_tokens=32), [], []
    for seed in range(12):
        ids = random_ids(LENGTH, seed=seed)
        exact = reference_logits(of_bfloat16_weights(size), ids)
        ours.append(kl(exact, model.logits(ids)))
        theirs.append(kl(exact, oracle_logits(size, ids, torch.bfloat16)))
    # Where rounding picks another expert a token's KL is a hundred times the others', so that with experts the mean is
    # a matter of few tokens' luck.
    middle = torch.median if size == "26B-A4B" else torch.mean
    mine, its = float(middle(torch.cat(ours))), float(middle(torch.cat(theirs)))
    print(f"{size}: {middle.__name__} KL {mine:.2e}, reference {its:.2e}, ratio {mine / its:.2f}")
    assert mine <= 0.2 * its
