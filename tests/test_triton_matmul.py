"""The Triton matrices and experts against the reference: plain and quantised weights, few rows and many."""

from dataclasses import replace

import pytest
import torch

from cabochon.ops import gpu, reference
from cabochon.quant import QuantTensor, quantize
from support.triton_twins import DEVICE, TOLERANCE, distance, twin

triton_experts = twin("triton_experts")
triton_matmul = twin("triton_matmul")

FORMATS = ["plain", "int8", "int4"]


def weight(shape: tuple[int, ...], format: str, dtype: torch.dtype = torch.float32):
    full = torch.randn(shape) * shape[-1] ** -0.5
    return full.to(dtype) if format == "plain" else quantize(full, format)


def to_device(value):
    if isinstance(value, QuantTensor):
        return replace(value, codes=value.codes.to(DEVICE), scales=value.scales.to(DEVICE))
    return value.to(DEVICE)


def tolerance(dtype: torch.dtype, format: str) -> float:
    # The reference rounds an int8 weight to x's type; the kernel multiplies the codes and scales the sum.
    return max(TOLERANCE[dtype], 1e-6 if format == "plain" else 3e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_linear(rows, format):
    x, w = torch.randn(rows, 96), weight((50, 96), format)
    got = triton_matmul.linear(x.to(DEVICE), to_device(w))
    assert distance(got.cpu(), reference.linear(x, w)) < tolerance(torch.float32, format)


@pytest.mark.parametrize("inputs", [300, 17])
def test_inputs_that_fill_no_group(inputs):
    x = torch.randn(2, inputs)
    for format in FORMATS:
        w = weight((33, inputs), format)
        assert distance(triton_matmul.linear(x.to(DEVICE), to_device(w)).cpu(), reference.linear(x, w)) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_short_types(format, dtype):
    x, w = torch.randn(2, 3, 64).to(dtype), weight((40, 64), format, dtype)
    got = triton_matmul.linear(x.to(DEVICE), to_device(w))
    assert got.dtype == dtype and distance(got.cpu(), reference.linear(x, w)) < TOLERANCE[dtype]


def test_a_row_does_not_depend_on_the_rows_beside_it():
    x, w = torch.randn(9, 96), weight((50, 96), "int4")
    alone = triton_matmul.linear(x[4:5].to(DEVICE), to_device(w))
    assert torch.equal(triton_matmul.linear(x.to(DEVICE), to_device(w))[4:5], alone)


@pytest.mark.parametrize("format", FORMATS)
def test_gated_mlp(format):
    x, gate, up, down = (
        torch.randn(3, 64), weight((80, 64), format), weight((80, 64), format), weight((64, 80), format)
    )  # fmt: skip
    got = triton_matmul.linear(triton_matmul.gated(x.to(DEVICE), to_device(gate), to_device(up)), to_device(down))
    assert distance(got.cpu(), reference.gated_mlp(x, gate, up, down)) < 5e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_experts(tokens, format):
    """One pair per block, sorted blocks with one expert that nobody chose, and blocks of many rows."""
    count, choices = 6, 2
    x = torch.randn(tokens, 64)
    chosen = torch.stack([torch.randperm(count - 1)[:choices] for _ in range(tokens)])
    weights = torch.rand(tokens, choices)
    gate_up, down = weight((count, 2 * 40, 64), format), weight((count, 64, 40), format)
    wanted = reference.experts(x, chosen, weights, gate_up, down)
    got = triton_experts.experts(*(to_device(value) for value in (x, chosen, weights, gate_up, down)))
    assert distance(got.cpu(), wanted) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "top"), [(128, 8), (6, 3)])
def test_route(count, top, dtype):
    x, proj, scale, gains = torch.randn(7, 64), torch.randn(count, 64), torch.rand(64) + 0.5, torch.rand(count) + 0.5
    x, proj, scale, gains = (value.to(dtype) for value in (x, proj, scale, gains))
    chosen, weights = (value.cpu() for value in gpu.route(*(v.to(DEVICE) for v in (x, proj, scale, gains)), top, 1e-6))
    scores = reference.linear(reference.rms_norm(x.double(), None, 1e-6) * scale * 64**-0.5, proj.double())
    wanted, _ = reference.choose(scores, gains.double(), top)
    if dtype == torch.float32:
        assert torch.equal(chosen, wanted)
    # At the edge, rounding may prefer an expert that is as good; its own weight must be right all the same.
    best, its = scores.gather(-1, wanted), scores.gather(-1, chosen)
    assert (best - its).abs().max() < 2 * TOLERANCE[dtype] * scores.abs().max()
    assert distance(weights, its.softmax(-1) * gains.double()[chosen]) < TOLERANCE[dtype]


def test_gate():
    a, b = torch.randn(3, 700) * 5, torch.randn(3, 700)
    for factor in (b, b.bfloat16()):
        got = twin("triton_rows").gate(a.to(DEVICE), factor.to(DEVICE)).cpu()
        assert got.dtype == factor.dtype
        assert distance(got, reference.gate(a.double(), factor.double())) < TOLERANCE[factor.dtype]


def test_blocks_hold_every_pair_once_and_one_expert_each():
    for pairs, count, rows in ((1, 3, 16), (70, 5, 16), (257, 128, 64)):
        chosen = torch.randint(count, (pairs,))
        pair, expert = triton_experts._sorted(chosen, count, rows)
        blocks = pair.view(-1, rows)
        assert sorted(pair[pair >= 0].tolist()) == list(range(pairs))
        for numbers, of in zip(blocks, expert.tolist(), strict=True):
            held = numbers[numbers >= 0]
            assert not held.numel() or (chosen[held] == of).all()
