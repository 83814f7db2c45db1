"""Weights quantised and packed by the kernels: the bits of `quant`, whatever the shape and the numbers."""

import weakref
from itertools import pairwise

import pytest
import torch

from cabochon import quant
from cabochon.errors import InputError
from cabochon.ops import cpu, packing

SHAPES = [(1, 1), (16, 32), (17, 33), (50, 70), (40, 96), (3, 20, 70), (2, 16, 64), (2, 3, 5, 40)]


@pytest.fixture(params=cpu.supported() or ["reference"], autouse=True)
def isa(request):
    before = cpu.active()
    cpu.use(request.param)
    yield
    cpu.use(before)


def awkward(shape, dtype):
    """Random numbers with ties, zeros of both signs, empty groups, tiny and huge values among them."""
    weight = torch.randn(shape).to(dtype)
    flat = weight.view(-1)
    special = torch.tensor([0.0, -0.0, 1.5, -1.5, 1e-9, -3e4, 2e-7, 0.5], dtype=dtype)
    at = torch.randint(len(flat), (len(flat) // 3,))
    flat[at] = special[torch.randint(len(special), at.shape)]
    weight[..., : weight.shape[-1] // 2] *= torch.randint(0, 2, (*shape[:-1], 1))
    return weight


def assert_same(got, expected):
    assert (got.format, got.layout, got.shape, got.dtype) == (
        expected.format,
        expected.layout,
        expected.shape,
        expected.dtype,
    )
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales, expected.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_same_bits_as_the_definition(format, shape, dtype):
    weight = awkward(shape, dtype)
    rows = quant.quantize(weight, format)
    assert_same(packing.quantize(weight, format), rows)
    assert_same(packing.quantize(weight, format, "panels"), quant.pack(rows))
    assert_same(packing.pack(rows), quant.pack(rows))
    assert_same(packing.pack(quant.pack(rows)), quant.pack(rows))


def test_every_half_scale_is_rounded_as_torch_rounds_it():
    """A group whose largest number is -8 s has the scale s: subnormal, tied, and too large ones among them."""
    bits = torch.arange(0, 1 << 31, 99_991, dtype=torch.int32)
    weight = torch.zeros(len(bits), 32)
    weight[:, 7] = bits.view(torch.float32)
    rows = quant.quantize(weight, "int4")
    got = packing.quantize(weight, "int4")
    finite = rows.scales.isfinite()
    assert torch.equal(got.scales.isnan(), rows.scales.isnan())
    assert torch.equal(got.scales[finite], rows.scales[finite])
    assert torch.equal(got.codes[finite], rows.codes[finite])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_is_not_a_number_stays_visible(format):
    weight = torch.randn(20, 64)
    weight[3, 40] = torch.nan
    again = quant.dequantize(packing.quantize(weight, format, "panels"))
    assert again[3].isnan().any() and not again[[0, 19]].isnan().any()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_threads_and_strides_change_nothing(format):
    wide = torch.randn(200, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_same(packing.quantize(wide, format, "panels"), quant.pack(quant.quantize(wide, format)))
    finally:
        torch.set_num_threads(threads)
    part = wide[:, 64:128]
    assert_same(packing.quantize(part, format), quant.quantize(part, format))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_without_kernels_blocks_change_nothing(monkeypatch, format):
    monkeypatch.setattr(packing, "NUMBERS_AT_ONCE", 640)
    weight = torch.randn(37, 64)
    assert_same(packing.quantize_in_blocks(weight, format), quant.quantize(weight, format))


def test_unknown_format_names_the_known_ones():
    with pytest.raises(InputError, match=r"'int3'.*int8, int4"):
        packing.quantize(torch.randn(2, 2), "int3")


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_weights_lie_side_by_side_in_an_arena(monkeypatch, format):
    monkeypatch.setattr(packing.Arena, "PIECE", 1 << 13)
    arena = packing.Arena()
    weights = [torch.randn(shape) for shape in ((20, 40), (3, 20, 70), (64, 96), (1, 1), (160, 96), (33, 50))]
    made = [packing.pack(quant.quantize(weights[0], format), arena)]
    made += [packing.quantize(weight, format, "panels", arena) for weight in weights[1:]]
    for weight, packed in zip(weights, made, strict=True):
        assert_same(packed, quant.pack(quant.quantize(weight, format)))
    if not cpu.on():
        return
    spans = sorted((part.data_ptr(), part.nbytes) for packed in made for part in (packed.codes, packed.scales))
    assert all(begin % packing.CACHE_LINE == 0 for begin, _ in spans)
    assert all(begin + size <= behind for (begin, size), (behind, _) in pairwise(spans))
    pieces = {part.untyped_storage().data_ptr() for packed in made for part in (packed.codes, packed.scales)}
    assert len(pieces) < len(spans)
    assert len(arena.empty((3, 5), torch.float16)) == 3


def test_a_piece_of_an_arena_goes_with_its_last_weight(monkeypatch):
    monkeypatch.setattr(packing.Arena, "PIECE", 1 << 10)
    arena = packing.Arena()
    first, second = arena.empty((512,), torch.uint8), arena.empty((512,), torch.uint8)
    alive = weakref.ref(first.untyped_storage())
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    arena.empty((1,), torch.uint8)
    del first
    assert alive() is not None
    del second, arena
    assert alive() is None
