"""Every GGUF block type against the format's own Python package, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from cabochon.quant import dequantize, quantize
from cabochon.weights.gguf_blocks import BLOCK_TYPES, BY_NAME


def random_blocks(kind, n, rng):
    """Random bytes whose half-precision scales are finite."""
    raw = rng.integers(0, 256, (n, kind.bytes), dtype=np.uint8)
    places = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2]}
    for at in places.get(kind.name, [0, 2] if kind.name in ("Q4_1", "Q5_1") else [0]):
        raw[:, at : at + 2] = rng.normal(0, 1, (n, 1)).astype(np.float16).view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", [t for t in BLOCK_TYPES.values() if t.values > 1], ids=lambda t: t.name)
def test_dequantised_values_equal_the_formats_own(kind):
    raw = random_blocks(kind, 300, np.random.default_rng())
    ours = kind.dequantize(torch.from_numpy(raw)).numpy()
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.number))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_written_blocks_equal_the_formats_own(name):
    kind = BY_NAME[name]
    x = np.random.default_rng().normal(0, 1, (400, max(kind.values, 32))).astype(np.float32)
    x[0] = 0
    ours = kind.quantize(torch.from_numpy(x)).numpy()
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType(kind.number))
    np.testing.assert_array_equal(ours, theirs.view(np.uint8).reshape(ours.shape))


def test_blocks_of_q4_0_are_our_int4_and_nearer_than_the_formats_own():
    x = torch.randn(400, 32)
    x[0] = 0
    kind, ours = BY_NAME["Q4_0"], quantize(x, "int4")
    written = kind.quantize(x)
    again = torch.from_numpy(gguf.quants.dequantize(written.numpy(), gguf.GGMLQuantizationType.Q4_0))
    assert torch.equal(again, dequantize(ours))
    raw = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q4_0)
    theirs = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0))
    assert (again - x).square().sum() < 0.95 * (theirs - x).square().sum()


def test_sizes_are_the_formats_own():
    for kind in BLOCK_TYPES.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.number)] == (kind.values, kind.bytes)
