"""Whole models through the kernels of the GPU: on one where there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cabochon import ops
from cabochon.engine.engine import Engine
from cabochon.engine.graphs import Frame, Shape, takes
from cabochon.engine.options import EngineOptions
from cabochon.engine.request import Request, SamplingParams
from cabochon.ops import cpu, gpu, reference
from cabochon.quant import quantize
from support.toys import SIZES, random_ids, toy_model
from support.triton_twins import DEVICE, distance


@pytest.fixture
def kernels(monkeypatch):
    """Tensors of this test go to the Triton kernels, wherever they lie."""
    if DEVICE == "cpu":
        known = (torch.float32, torch.int64)
        monkeypatch.setattr(cpu, "ready", lambda x: False)
        monkeypatch.setattr(gpu, "ready", lambda x: x.dtype in known and not torch.is_grad_enabled())


def replies(model, *, count: int, formats: str = "auto") -> tuple[dict[str, list[int]], torch.Tensor]:
    """Greedy tokens of two requests, the second of which arrives later, and the first one's prompt logits."""
    seen = []
    options = EngineOptions(
        max_num_seqs=4, max_num_batched_tokens=24, block_size=8, num_blocks=(32, 32),
        kv_cache_dtype=formats, kv_window_dtype=formats,
    )  # fmt: skip
    engine = Engine(model, options, max_model_len=128)
    params = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, max_tokens=count, ignore_eos=True)
    engine.add(Request("a", random_ids(19, 1), params, sink=lambda _, logits: seen.append(logits.clone())))
    out: dict[str, list[int]] = {"a": [], "b": []}
    for step in range(60):
        if step == 2:
            engine.add(Request("b", random_ids(5, 2), params))
        for output in engine.step():
            assert output.error is None, output.error
            out[output.request_id] += output.token_ids
        if step > 2 and not engine.busy:
            break
    return out, torch.cat(seen)


QUICK = ("E2B", "26B-A4B")
"""The interpreter takes seconds for each; these two have between them all that a size can have."""


@pytest.mark.parametrize("size", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SIZES])
def test_replies_of_every_architecture(size, kernels, monkeypatch):
    """Prefill in chunks, decode beside prefill, KV sharing, value = key, experts, per-layer embeddings."""
    got, logits = replies(toy_model(size).to(DEVICE), count=3)
    monkeypatch.setattr(gpu, "ready", lambda x: False)
    wanted, reference = replies(toy_model(size, dtype=torch.float64), count=3)
    assert reference.std() > 0.3  # not trivially equal
    assert distance(logits.cpu(), reference) < 2e-5
    assert got == wanted


@pytest.mark.parametrize("formats", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_pages_in_eight_bits(formats, kernels, monkeypatch):
    got, logits = replies(toy_model("12B").to(DEVICE), count=2, formats=formats)
    monkeypatch.setattr(gpu, "ready", lambda x: False)
    wanted, reference = replies(toy_model("12B"), count=2, formats=formats)
    assert distance(logits.cpu(), reference) < 2e-3  # a code on the edge may fall to either side
    assert got == wanted


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "is_nonzero", "equal", "lift_fresh")
"""Operations for which the host waits for the device, or copies what a recorded graph can't."""


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waited = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        host = any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args) and DEVICE == "cuda"
        masked = name.startswith("index") and any(
            t is not None and t.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for t in a
        )
        if name in WAITS or masked or host:
            self.waited.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", QUICK)
def test_nothing_in_a_decode_step_waits_for_the_device(size, kernels):
    model = toy_model(size).to(DEVICE)
    engine = Engine(model, EngineOptions(max_num_seqs=2, block_size=8, num_blocks=(8, 8)), max_model_len=64)
    frames = []

    def run(batch):
        if takes(batch):
            frames.append(Frame(Shape.of(batch), batch))
            frames[-1].fill(batch)
        logits = torch.zeros(1, model.config.text.vocab_size, device=DEVICE)
        return logits, logits[:, : model.config.text.hidden_size]

    engine.runner.run = run
    engine.add(Request("a", [5], SamplingParams(temperature=0.0, top_k=0, top_p=1.0, max_tokens=2)))
    while engine.busy:
        engine.step()
    with torch.inference_mode():
        model(frames[0].batch)
        with Watch() as watch:
            model(frames[0].batch)
    assert not watch.waited


def test_every_op_that_asks_for_a_twin_finds_one():
    asking = [name for name in ops.__all__ if hasattr(getattr(ops, name), "__wrapped__")]
    assert len(asking) >= 10
    assert not [name for name in asking if not hasattr(gpu, name)]


def test_a_row_has_the_same_bits_in_any_company(monkeypatch):
    """In the invariant mode; without it the vendor's matmul decides."""
    monkeypatch.setattr(gpu, "_invariant", True)
    x, head = torch.randn(70, 48).to(DEVICE), torch.randn(90, 48).to(DEVICE)
    gate, up, down = (torch.randn(shape).to(DEVICE) for shape in ((64, 48), (64, 48), (48, 64)))
    for run in (lambda rows: gpu.gated_mlp(rows, gate, up, down), lambda rows: gpu.head(rows, head, 30.0)):
        together = run(x)
        assert torch.equal(run(x[33:34])[0], together[33])
    assert distance(gpu.gated_mlp(x, gate, up, down), reference.gated_mlp(x, gate, up, down)) < 2e-6


def test_quantised_weights_are_widened_for_many_rows(monkeypatch):
    weight = quantize(torch.randn(24, 64), "int4")
    weight = replace(weight, codes=weight.codes.to(DEVICE), scales=weight.scales.to(DEVICE))
    asked = []
    monkeypatch.setattr(gpu.kernels()[2], "linear", lambda x, w, wide: asked.append(len(x)))
    few, many = torch.randn(gpu.FEW, 64).to(DEVICE), torch.randn(gpu.FEW + 1, 64).to(DEVICE)
    gpu.linear(few, weight)
    assert asked == [gpu.FEW] and gpu.linear(many, weight).shape == (gpu.FEW + 1, 24) and len(asked) == 1


def test_training_takes_the_reference():
    assert not gpu.ready(torch.randn(2, requires_grad=True))
