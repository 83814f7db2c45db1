"""A layer in one call beside the same layer op by op, which is the definition."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cabochon import LLM, SamplingParams
from cabochon.llm.loading import Loaded
from cabochon.model import fused as module
from cabochon.model.batch import whole_sequences
from cabochon.ops import cpu
from cabochon.ops.packing import quantize
from cabochon.weights.load import place
from cabochon.weights.params import parameters
from support.toys import random_ids, toy_model

pytestmark = pytest.mark.skipif(not cpu.supported(), reason="installed without the compiled kernels")


def network(size, format, dtype):
    model = toy_model(size, dtype=dtype)
    for param in parameters(model.config):
        if format != "dense" and param.quantize and param.part == "text":
            place(model, param.name, quantize(model.state_dict()[param.name], format, "panels"))
    return model


def op_by_op(layers, x, last_reader):
    return None


def both(model, batch, monkeypatch):
    """Logits in one or two calls for all layers, and op by op; the former must have happened."""
    calls = []
    run = module.FusedLayers.run
    monkeypatch.setattr(module.FusedLayers, "run", lambda *a: calls.append((run(*a), len(a[0].layers))) or calls[-1][0])
    with torch.inference_mode():
        whole = model(batch)
        assert len(calls) == len(model.language_model.parts) <= 2 and all(y is not None for y, _ in calls)
        assert sum(count for _, count in calls) == len(model.config.text.layers)
        monkeypatch.setattr(module, "fused", op_by_op)
        single = model(batch)
    monkeypatch.undo()
    return whole, single


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
@pytest.mark.parametrize("size", ["E2B", "E4B", "12B", "31B"])
def test_one_call_gives_what_the_ops_give(size, format, dtype, monkeypatch):
    """Only the gate of per-layer embeddings differs: torch's gelu and ours round the last bit differently."""
    model = network(size, format, dtype)
    batch = whole_sequences([torch.tensor(random_ids(n, seed=n)) for n in (70, 1, 33)])
    whole, single = both(model, batch, monkeypatch)
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype] if format == "dense" else 0.3
    assert (whole - single).abs().max() < limit * single.std()
    assert (whole - single).abs().mean() < limit / 5 * single.std()


@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("size", ["E2B", "31B"])
def test_replies_are_those_of_the_ops(size, cache, monkeypatch):
    prompts = [random_ids(n, seed=n) for n in (90, 3, 40)]
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)

    def replies():
        loaded = Loaded("toy", toy_model(size))
        llm = LLM.of(loaded, kv_cache_dtype=cache, max_num_batched_tokens=64)
        return [reply.token_ids for reply in llm.generate(prompts, greedy)]

    whole = replies()
    monkeypatch.setattr(module, "fused", op_by_op)
    assert whole == replies()


@torch.inference_mode()
def test_replaced_weights_are_noticed(monkeypatch):
    model = toy_model("E2B")
    batch = whole_sequences([torch.tensor(random_ids(20))])
    before = model(batch)
    layer = model.language_model.layers[3]
    place(model, "language_model.layers.3.mlp.down_proj.weight", layer.mlp.down_proj.weight * 2)
    whole, single = both(model, batch, monkeypatch)
    assert not torch.equal(whole, before)
    assert (whole - single).abs().max() < 1e-4 * single.std()

    twin = copy.deepcopy(model).bfloat16()
    whole, single = both(twin, batch, monkeypatch)
    assert (whole - single).abs().max() < 0.05 * single.std()


@torch.inference_mode()
def test_a_module_put_around_a_matrix_is_run(monkeypatch):
    model = toy_model("E2B")
    batch = whole_sequences([torch.tensor(random_ids(20))])
    model(batch)
    attention = model.language_model.layers[0].self_attn
    seen = []

    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            seen.append(x)
            return self.inner(x)

    attention.o_proj = Around(attention.o_proj)
    model(batch)
    assert len(seen) == 1


def test_layers_with_experts_go_op_by_op():
    model = toy_model("26B-A4B")
    with torch.inference_mode():
        layers = tuple(model.language_model.layers)
        assert all(module.fused((layer,), torch.zeros(1, 1), {}).plan is None for layer in layers)


STEP_ON_TWO_THREADS = """
import os, torch
from test_fused import network, random_ids, whole_sequences
torch.set_num_threads(1)
model = network("E2B", "int4", torch.bfloat16)
batch = whole_sequences([torch.tensor(random_ids(3, seed=n)) for n in range(8)])
with torch.inference_mode():
    model(batch)
    before = set(os.listdir("/proc/self/task"))
    torch.set_num_threads(2)
    model(batch)
print(len(set(os.listdir("/proc/self/task")) - before))
"""


def test_a_step_wakes_no_threads_but_ours():
    """Those of OpenMP stay awake for milliseconds after any use of them, and hold up our worker."""
    run = subprocess.run(
        [sys.executable, "-c", STEP_ON_TWO_THREADS],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "1\n"
