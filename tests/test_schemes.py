"""Quantised matrices of other tools, packed by those tools where they run here, come back as their own values."""

import warnings

import pytest
import torch

from cabochon.errors import CheckpointError
from cabochon.weights.schemes import SCHEMES, scheme_of


def rebuild(name, tensors, settings=None):
    return SCHEMES[name].rebuild(tensors.get, settings or {})


def pack(codes, order=range(8)):
    """Eight unsigned codes of the last axis to an int32 word; column order[k] goes to nibble k."""
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(order):
        words |= codes[..., column::8].long() << (4 * nibble)
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_pack_quantized(group, bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    least, beyond = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(least, beyond, (48, 256), dtype=torch.int8)
    scale = torch.rand(48, 256 // group)
    tensors = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_shape": torch.tensor([48, 256]),
        "weight_scale": scale,
    }
    assert torch.equal(rebuild("compressed-tensors", tensors), codes * scale.repeat_interleave(group, 1))
    zero = torch.randint(least, beyond, scale.shape, dtype=torch.int8)
    tensors["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    expected = (codes.int() - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    assert torch.equal(rebuild("compressed-tensors", tensors), expected)


@pytest.mark.parametrize("scale_shape", [(1,), (40, 1), (40, 2), (3, 2)], ids=["tensor", "row", "group", "block"])
def test_scaled(scale_shape):
    scale = torch.rand(scale_shape)
    spread = scale.reshape(-1, 1) if scale.dim() == 1 else scale
    spread = spread.repeat_interleave(128, 1)[:, :256] if spread.shape[1] > 1 else spread
    spread = spread.repeat_interleave(16, 0)[:40] if spread.shape[0] == 3 else spread
    for weight in (torch.randint(-127, 128, (40, 256), dtype=torch.int8), torch.randn(40, 256).to(torch.float8_e4m3fn)):
        tensors = {"weight": weight, "weight_scale": scale}
        assert torch.equal(rebuild("compressed-tensors", tensors), weight.float() * spread)
        assert torch.equal(rebuild("fp8", {"weight": weight, "weight_scale_inv": scale}), weight.float() * spread)


@pytest.mark.parametrize(("version", "shift"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq(version, shift):
    codes, zeros = torch.randint(0, 16, (128, 24)), torch.randint(1, 16, (4, 24))  # [I, O], [groups, O]
    scales, order = torch.rand(4, 24), torch.randint(0, 4, (128,))
    tensors = {
        "qweight": pack(codes.T.contiguous()).T.contiguous(),
        "qzeros": pack(zeros - shift),
        "scales": scales,
        "g_idx": order,
    }
    settings = {"bits": 4, "checkpoint_format": version}
    expected = ((codes - zeros[order]) * scales[order]).T
    assert torch.equal(rebuild("gptq", tensors, settings), expected)


def test_awq():
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble k holds column order[k], as the format's packer writes it
    codes, zeros, scales = torch.randint(0, 16, (64, 24)), torch.randint(0, 16, (2, 24)), torch.rand(2, 24)
    tensors = {"qweight": pack(codes, order), "qzeros": pack(zeros, order), "scales": scales}
    expected = ((codes - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0)).T
    assert torch.equal(rebuild("awq", tensors), expected)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind, nested):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional as bnb
    packed, state = bnb.quantize_4bit(torch.randn(64, 128), quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    torch.testing.assert_close(
        rebuild(f"bitsandbytes-{kind}", tensors), bnb.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-6
    )


def test_bitsandbytes_8bit():
    x = torch.randn(32, 64)
    scale = x.abs().amax(1)
    codes = (x / scale[:, None] * 127).round().to(torch.int8)
    assert torch.equal(rebuild("bitsandbytes-8bit", {"weight": codes, "SCB": scale}), codes * (scale / 127)[:, None])


def test_the_scheme_is_chosen_by_name_or_refused():
    groups = {"group_0": {"weights": {"num_bits": 4}}}
    ct = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    assert scheme_of(ct).name == "compressed-tensors"
    assert scheme_of({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}).name == "bitsandbytes NF4"
    for bad in ({"quant_method": "hqq"}, {"quant_method": "awq", "version": "gemv"}, ct | {"format": "marlin-24"}):
        with pytest.raises(CheckpointError, match="can't be read"):
            scheme_of(bad)
    with pytest.raises(CheckpointError, match="its weight is missing"):
        rebuild("compressed-tensors", {"weight_shape": torch.tensor([8, 8])})
    three = {"weight_packed": torch.zeros(8, 12, dtype=torch.int32), "weight_shape": torch.tensor([8, 128])}
    with pytest.raises(CheckpointError, match="128 numbers in 12 words"):
        rebuild("compressed-tensors", three)
