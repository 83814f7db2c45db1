"""What the engine itself costs, and what skipping saves. Times are the thread's own: this machine is shared."""

import time

import pytest
import torch

from cabochon.engine.batching import build
from cabochon.engine.engine import Engine
from cabochon.engine.options import EngineOptions
from cabochon.engine.request import Request, SamplingParams
from support.greedy import greedy
from support.toys import random_ids, toy_model


def host_milliseconds(network, steps):
    """Median time of scheduling and batching for a step with 64 running requests of about 300 tokens."""
    options = EngineOptions(max_num_seqs=64, max_num_batched_tokens=8192, num_blocks=(2000, 2000))
    engine = Engine(network, options, max_model_len=1024)
    params = SamplingParams(temperature=1.0, top_k=64, top_p=0.95, max_tokens=200, ignore_eos=True)
    for i in range(64):
        engine.add(Request(str(i), random_ids(250 + i, seed=i), params))
    while len(engine.scheduler.running) < 64:
        engine.step()
    times = []
    for _ in range(steps):
        begin = time.thread_time()
        plan = engine.scheduler.plan()
        build(plan.items, engine.cache, engine.device, features={})
        times.append(time.thread_time() - begin)
        assert len(plan.items) == 64
        engine.step()
    return sorted(times)[steps // 2] * 1e3


def test_a_step_of_64_requests_costs_two_milliseconds_on_the_host():
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    network = toy_model("12B", hidden_size=32, intermediate_size=32, sliding_window=128, **layers)
    spent = host_milliseconds(network, 24)
    print(f"scheduling and batching: {spent:.2f} ms per step of 64 requests")
    assert spent <= 2


def prefill_seconds(network, length, skip):
    """The thread's time for a prompt and one token."""
    options = EngineOptions(max_num_seqs=1, max_num_batched_tokens=length, num_blocks=(80, 80), skip_unwanted=skip)
    engine = Engine(network, options, max_model_len=length + 8)
    times = []
    for seed in range(2):
        engine.add(Request(str(seed), random_ids(length, seed=seed), greedy(1, ignore_eos=True), keep_end=False))
        begin = time.thread_time()
        engine.step()
        times.append(time.thread_time() - begin)
    return min(times)


@pytest.mark.parametrize(("width", "times"), [(96, 2.0), pytest.param(384, 2.5, marks=pytest.mark.slow)])
def test_skipping_makes_prefill_of_e2b_shape_faster(width, times):
    """E2B's 35 layers, its sharing, its double-wide MLP and its proportions; 2,048 tokens in one step.

    The narrower, the larger the part of attention and norms, and the smaller the gain.
    """
    network = toy_model(
        "E2B",
        num_hidden_layers=35,
        num_kv_shared_layers=20,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=8,
        head_dim=width // 6,
        global_head_dim=width // 3,
        sliding_window=512,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        slow, fast = (prefill_seconds(network, 2048, skip) for skip in (False, True))
    finally:
        torch.set_num_threads(threads)
    print(f"width {width}: {slow:.2f} s without skipping, {fast:.2f} s with it, {slow / fast:.2f} times as fast")
    assert slow >= times * fast
