"""The block formats of GGUF files, to and from float32.

A tensor's rows are cut into blocks of 32 or 256 values; a block is a few scales and packed codes. Layouts are those of
ggml's `ggml-common.h`, the arithmetic (order of multiplications included) that of its scalar dequantisers, so results
are equal to the bit. Everything is vectorised over blocks: `raw` is [n, bytes] uint8, results are [n, values] float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.packing import quantize


@dataclass(frozen=True, slots=True)
class BlockType:
    """One storage type: `number` in the file, values and bytes per block."""

    number: int
    name: str
    values: int
    bytes: int
    dequantize: Callable[[Tensor], Tensor]
    quantize: Callable[[Tensor], Tensor] | None = None


def _f16(raw: Tensor, at: int) -> Tensor:
    """The half-precision scale at byte `at` of every block -> [n, 1]."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[n, b] bytes -> [n, 2b]: all low nibbles, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _bits(packed: Tensor) -> Tensor:
    """[n, 4] bytes -> [n, 32] bits, least significant first."""
    return ((packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda raw: raw.contiguous().view(dtype).float()


def _from_q4_0(raw: Tensor) -> Tensor:
    return (_nibbles(raw[:, 2:]).float() - 8) * _f16(raw, 0)


def _from_q4_1(raw: Tensor) -> Tensor:
    return _nibbles(raw[:, 4:]).float() * _f16(raw, 0) + _f16(raw, 2)


def _from_q5_0(raw: Tensor) -> Tensor:
    codes = _nibbles(raw[:, 6:]) | (_bits(raw[:, 2:6]) << 4)
    return (codes.float() - 16) * _f16(raw, 0)


def _from_q5_1(raw: Tensor) -> Tensor:
    codes = _nibbles(raw[:, 8:]) | (_bits(raw[:, 4:8]) << 4)
    return codes.float() * _f16(raw, 0) + _f16(raw, 2)


def _from_q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float() * _f16(raw, 0)


def _crumbs(packed: Tensor) -> Tensor:
    """[n, 64] bytes -> [n, 8, 32] two-bit codes: each half of 32 bytes holds four runs of 32 values, low bits first."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return ((packed.view(-1, 2, 1, 32) >> shifts) & 3).flatten(1, 2)


def _from_q2_k(raw: Tensor) -> Tensor:
    scales, codes = raw[:, :16], _crumbs(raw[:, 16:80].contiguous())
    scale, low = _f16(raw, 80) * (scales & 15).float(), _f16(raw, 82) * (scales >> 4).float()
    return (scale[:, :, None] * codes.reshape(-1, 16, 16).float() - low[:, :, None]).flatten(1)


def _from_q3_k(raw: Tensor) -> Tensor:
    high = (raw[:, None, :32] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1  # [n, 8, 32]
    codes = _crumbs(raw[:, 32:96].contiguous()).float() - 4 * (1 - high.float())
    packed = raw[:, 96:108]
    low = _nibbles(packed[:, :8])
    top = ((packed[:, None, 8:] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]) & 3).flatten(1)
    scale = _f16(raw, 108) * ((low | (top << 4)).float() - 32)
    return (scale[:, :, None] * codes.reshape(-1, 16, 16)).flatten(1)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima in the 12 bytes of Q4_K and Q5_K -> two [n, 8] float tensors."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], -1)
    low = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], -1)
    return scale.float(), low.float()


def _nibble_runs(packed: Tensor) -> Tensor:
    """[n, 128] bytes -> [n, 8, 32]: each 32 bytes hold a run in their low nibbles, then one in their high nibbles."""
    runs = packed.view(-1, 4, 32)
    return torch.stack([runs & 15, runs >> 4], 2).flatten(1, 2)


def _scaled_runs(raw: Tensor, codes: Tensor) -> Tensor:
    scale, low = _six_bit_scales(raw[:, 4:16])
    scale, low = _f16(raw, 0) * scale, _f16(raw, 2) * low
    return (scale[:, :, None] * codes.float() - low[:, :, None]).flatten(1)


def _from_q4_k(raw: Tensor) -> Tensor:
    return _scaled_runs(raw, _nibble_runs(raw[:, 16:].contiguous()))


def _from_q5_k(raw: Tensor) -> Tensor:
    high = (raw[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1  # [n, 8, 32]
    return _scaled_runs(raw, _nibble_runs(raw[:, 48:].contiguous()) | (high << 4))


def _from_q6_k(raw: Tensor) -> Tensor:
    low = raw[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], 2).flatten(2)  # [n, 2, 128]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((raw[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).flatten(2)  # [n, 2, 128]
    codes = (low | (high << 4)).reshape(-1, 16, 16).float() - 32
    scale = _f16(raw, 208) * raw[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[:, :, None] * codes).flatten(1)


def _half_bytes(scale: Tensor) -> Tensor:
    return scale.half().view(torch.uint8).view(-1, 2)


def _to_q4_0(x: Tensor) -> Tensor:
    """Our int4 to the bit; ggml's own writer tries one scale per block."""
    rounded = quantize(x, "int4")
    return torch.cat([rounded.scales.view(torch.uint8), rounded.codes.flatten(1)], 1)


def _to_q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale != 0, 1 / scale, 0)
    scaled = x * inverse
    codes = (scaled.abs() + 0.5).floor() * scaled.sign()  # halves away from zero
    return torch.cat([_half_bytes(scale), codes.to(torch.int8).view(torch.uint8)], 1)


def _to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).view(torch.uint8)


BLOCK_TYPES = {
    t.number: t
    for t in (
        BlockType(0, "F32", 1, 4, _plain(torch.float32), _to(torch.float32)),
        BlockType(1, "F16", 1, 2, _plain(torch.float16), _to(torch.float16)),
        BlockType(2, "Q4_0", 32, 18, _from_q4_0, _to_q4_0),
        BlockType(3, "Q4_1", 32, 20, _from_q4_1),
        BlockType(6, "Q5_0", 32, 22, _from_q5_0),
        BlockType(7, "Q5_1", 32, 24, _from_q5_1),
        BlockType(8, "Q8_0", 32, 34, _from_q8_0, _to_q8_0),
        BlockType(10, "Q2_K", 256, 84, _from_q2_k),
        BlockType(11, "Q3_K", 256, 110, _from_q3_k),
        BlockType(12, "Q4_K", 256, 144, _from_q4_k),
        BlockType(13, "Q5_K", 256, 176, _from_q5_k),
        BlockType(14, "Q6_K", 256, 210, _from_q6_k),
        BlockType(30, "BF16", 1, 2, _plain(torch.bfloat16), _to(torch.bfloat16)),
    )
}
BY_NAME = {t.name: t for t in BLOCK_TYPES.values()}
