"""Quantise, dequantise, pack: in plain torch, checked against arithmetic done one number at a time."""

import numpy as np
import pytest
import torch

from cabochon.errors import InputError
from cabochon.formats import FORMATS
from cabochon.ops import reference
from cabochon.quant import DIVISORS, QuantTensor, dequantize, pack, quantize, round_activations, unpack

SHAPES = [(16, 32), (1, 1), (17, 33), (40, 96), (3, 20, 70)]


def on_grid(block: np.ndarray, scale: np.float32) -> np.ndarray:
    """One group of 32 on the grid of q4_0, the slow way."""
    if scale == 0:
        return np.zeros_like(block)
    return np.array([(min(15, max(0, round(float(v / scale) + 8))) - 8) * scale for v in block], np.float32)


def best_of_grids(block: np.ndarray) -> np.ndarray:
    """The group on the nearest of the grids that may be taken, in exact arithmetic."""
    scales = (np.float32(np.float16(max(block, key=abs) / -divisor)) for divisor in DIVISORS)
    return min((on_grid(block, scale) for scale in scales), key=lambda found: float(((found - block) ** 2.0).sum()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_same_as_one_number_at_a_time(shape, format):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    again = dequantize(quantize(weight, format))
    assert again.shape == weight.shape
    if format == "int8":
        step = weight.abs().amax(-1, keepdim=True) / 127
        assert ((again - weight).abs() <= step * 0.5001).all()
    else:
        padded = torch.nn.functional.pad(weight, (0, -shape[-1] % 32)).reshape(-1, 32).numpy()
        slow = np.stack([best_of_grids(block) for block in padded]).reshape(*shape[:-1], -1)[..., : shape[-1]]
        np.testing.assert_allclose(again.numpy(), slow, rtol=1e-6, atol=0)


def test_a_fitted_scale_loses_a_tenth_less_than_the_largest_number_on_the_end_of_the_grid():
    weight = torch.randn(2048, 32)
    plain = np.stack([on_grid(block, np.float32(np.float16(max(block, key=abs) / -8))) for block in weight.numpy()])
    lost = (dequantize(quantize(weight, "int4")) - weight).square().sum()
    assert lost < 0.93 * (torch.from_numpy(plain) - weight).square().sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packing_only_permutes(shape, format):
    rows = quantize(torch.randn(shape), format)
    again = unpack(pack(rows))
    assert torch.equal(again.codes, rows.codes) and torch.equal(again.scales, rows.scales)
    assert torch.equal(dequantize(pack(rows)), dequantize(rows))


@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rows_and_experts_are_slices(format, layout):
    weight = quantize(torch.randn(50, 70), format)
    whole = dequantize(weight)
    chosen = torch.tensor([49, 0, 17, 17])
    source = pack(weight) if layout == "panels" else weight
    assert torch.equal(dequantize(source.rows(chosen)), whole[chosen])

    stacked = quantize(torch.randn(3, 20, 70), format)
    source = pack(stacked) if layout == "panels" else stacked
    assert source[2].shape == (20, 70)
    assert torch.equal(dequantize(source[2]), dequantize(stacked)[2])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_size_is_what_is_allocated(format):
    weight = quantize(torch.randn(48, 100), format)
    assert weight.nbytes == FORMATS[format].bytes((48, 100))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_zeros_and_outliers(format):
    weight = torch.zeros(16, 64)
    assert torch.equal(dequantize(quantize(weight, format)), weight)
    weight[3, 5] = -1000.0
    assert dequantize(quantize(weight, format))[3, 5] == pytest.approx(-1000.0)


def test_activations_round_within_their_group():
    x = torch.randn(4, 70)
    x[0, 0] = 1e4  # an outlier costs its own group only
    error = (round_activations(x) - x).abs()
    assert (error[0, 32:] <= x[0, 32:].abs().max() / 250).all()
    assert torch.equal(round_activations(torch.zeros(2, 40)), torch.zeros(2, 40).double())


def test_unknown_format_names_the_known_ones():
    with pytest.raises(InputError, match=r"'int3'.*int8, int4"):
        quantize(torch.randn(2, 2), "int3")


def test_value_is_frozen():
    weight = quantize(torch.randn(2, 32), "int4")
    with pytest.raises(AttributeError):
        weight.format = "int8"  # type: ignore[misc]
    assert isinstance(weight, QuantTensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "panels"])
def test_looked_up_rows_have_the_type_of_the_table(layout, dtype):
    table = quantize(torch.randn(40, 64).to(dtype), "int4")
    source = pack(table) if layout == "panels" else table
    rows = reference.embed(torch.tensor([39, 1]), source, 8.0)
    assert rows.dtype == dtype
    assert torch.equal(rows, dequantize(table, dtype)[[39, 1]] * 8)
