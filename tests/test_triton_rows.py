"""The Triton ops that touch each row once, against the reference on fresh random input."""

from dataclasses import replace

import pytest
import torch

from cabochon.ops import reference
from cabochon.ops.views import ScaledPages
from cabochon.quant import quantize
from support.triton_twins import DEVICE, TOLERANCE, distance, twin

triton_rows = twin("triton_rows")

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [16, 48, 2816])
def test_norm(width, dtype):
    x, weight = torch.randn(3, 2, width).to(dtype), torch.randn(width).to(dtype)
    for w in (weight, None):
        got = triton_rows.rms_norm(x.to(DEVICE), None if w is None else w.to(DEVICE), 1e-6)
        assert distance(got.cpu(), reference.rms_norm(x, w, 1e-6)) < TOLERANCE[dtype]


def test_norm_of_what_stays_wide():
    x, weight = torch.randn(3, 2, 48), torch.randn(48).bfloat16()
    got = triton_rows.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6, wide=True)
    assert got.dtype == torch.float32
    assert distance(got.cpu(), reference.settle(x, weight, 1e-6)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rotated", [32, 8])
def test_rope_of_all_or_a_quarter_of_the_dimensions(rotated, dtype):
    x, angle = torch.randn(5, 3, 32).to(dtype), torch.randn(5, rotated // 2) * 100
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    got = triton_rows.rope(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE))
    assert distance(got.cpu(), reference.rope(x, cos, sin)) < TOLERANCE[dtype]
    narrow = triton_rows.rope(x.float().to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), dtype)
    assert narrow.dtype == dtype and distance(narrow.cpu(), reference.rope(x, cos, sin)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_embedding_rounds_its_scale_like_the_reference(dtype):
    table, ids = torch.randn(11, 1500).to(dtype), torch.tensor([3, 0, 10, 3])
    got = triton_rows.embed(ids.to(DEVICE), table.to(DEVICE), 1536**0.5)
    wanted = reference.embed(ids, table, 1536**0.5)
    # The interpreter cuts float32 to bfloat16 instead of rounding it; a scale that is not rounded would be 0.2 % off.
    assert distance(got.cpu(), wanted) < (1e-2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1e-9)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("width", [64, 1100])
def test_embedding_from_a_quantised_table(width, format):
    table, ids = quantize(torch.randn(11, width), format), torch.tensor([3, 0, 10, 3])
    there = replace(table, codes=table.codes.to(DEVICE), scales=table.scales.to(DEVICE))
    got = triton_rows.embed(ids.to(DEVICE), there, 39.25)
    assert distance(got.cpu(), reference.embed(ids, table, 39.25)) < 1e-6


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU that reads host memory needs a GPU")
def test_embedding_from_pinned_host_memory():
    table, ids = torch.randn(11, 300).pin_memory(), torch.tensor([3, 0, 10, 3])
    got = triton_rows.embed(ids.to(DEVICE), table, 2.0)
    assert torch.equal(got.cpu(), reference.embed(ids, table, 2.0))


def test_store_skips_what_is_not_kept():
    pages, rows = torch.randn(3, 4, 2, 40), torch.randn(5, 2, 40)
    slots = torch.tensor([7, -1, 0, 11, -1])
    wanted = pages.clone()
    reference.store(wanted, rows, slots)
    got = pages.to(DEVICE)
    triton_rows.store(got, rows.to(DEVICE), slots.to(DEVICE))
    assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_in_eight_bits_equals_the_reference_bit_for_bit(codes, dtype):
    rows = (torch.randn(64, 2, 40) * torch.logspace(-6, 2, 40)).to(dtype)
    rows[3] = 0
    slots = torch.randperm(64)
    wanted, got = (
        ScaledPages(torch.zeros(16, 4, 2, 40, dtype=torch.uint8).view(codes), torch.zeros(16, 4, 2, 2), 32)
        for _ in range(2)
    )
    reference.store(wanted, rows, slots)
    got = ScaledPages(got.codes.to(DEVICE), got.scales.to(DEVICE), 32)
    triton_rows.store(got, rows.to(DEVICE), slots.to(DEVICE))
    assert torch.equal(got.scales.cpu(), wanted.scales)
    assert torch.equal(got.codes.cpu().view(torch.uint8), wanted.codes.view(torch.uint8))
