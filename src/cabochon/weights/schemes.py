"""The ways in which other tools store quantised matrices in safetensors files, back to plain float32.

A scheme knows under which names one logical weight `x.weight` is stored and how to rebuild it. It is chosen from the
checkpoint's `quantization_config`; whatever is not written in that scheme's names is read as it stands. What can't be
read is refused by naming the tensor and the scheme.

Sources: the packing code of compressed-tensors 0.20, the GPTQ v1/v2 and AWQ "gemm" checkpoint layouts, bitsandbytes
0.50 and transformers' fine-grained FP8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, brief

Fetch = Callable[[str], Tensor | None]
"""A stored tensor of one module by its suffix (`weight_packed`), or None."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way of storing a matrix."""

    name: str
    marker: str
    """The suffix that only this scheme stores: where it is present, the module is quantised."""
    suffixes: tuple[str, ...]
    """Every suffix that belongs to the stored form."""
    rebuild: Callable[[Fetch, Mapping[str, Any]], Tensor]
    """(the module's tensors, the quantisation's settings) -> float32 [O, I]."""


def scheme_of(settings: Mapping[str, Any]) -> Scheme:
    """The scheme that a `quantization_config` names. Raises CheckpointError when it is none of the known ones."""
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        for name in (settings.get("format"), *_group_formats(settings.get("config_groups"))):
            if name not in (None, "dense", *_COMPRESSED):
                raise CheckpointError(
                    f"the compressed-tensors format {brief(name)} can't be read; known are {', '.join(_COMPRESSED)}. "
                    "Take another repository."
                )
    if method == "bitsandbytes":
        method = "bitsandbytes-8bit" if settings.get("load_in_8bit") else f"bitsandbytes-{_bnb_kind(settings)}"
    if method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        raise CheckpointError(
            f"AWQ checkpoints in the {brief(settings['version'])} layout can't be read; 'gemm' ones can."
        )
    if not isinstance(method, str) or method not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise CheckpointError(
            f"the quantisation {brief(method)} can't be read; known are {known}. Take another repository."
        )
    return SCHEMES[method]


def _group_formats(groups: Any) -> list[Any]:
    if not isinstance(groups, Mapping | None) or not all(
        isinstance(group, Mapping) for group in (groups or {}).values()
    ):
        raise CheckpointError("quantization_config.config_groups is no object of objects; download config.json again.")
    return [group.get("format") for group in (groups or {}).values()]


def _bnb_kind(settings: Mapping[str, Any]) -> str:
    return str(settings.get("bnb_4bit_quant_type", "fp4")).lower()


def _need(fetch: Fetch, suffix: str) -> Tensor:
    tensor = fetch(suffix)
    if tensor is None:
        raise CheckpointError(f"its {suffix} is missing")
    return tensor


def unpack(words: Tensor, dim: int, bits: int = 4) -> Tensor:
    """int32 words -> 32 / bits unsigned codes each along `dim`, lowest bits first (as int32)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.dim() - dim - 1))) & ((1 << bits) - 1)
    return codes.flatten(dim, dim + 1)


def _bits_of(words: int, numbers: int) -> int:
    """How wide the codes are of which `numbers` fill `words` 32-bit words."""
    fitting = [bits for bits in (2, 4, 8) if -(-numbers * bits // 32) == words]
    if not fitting:
        raise CheckpointError(f"{numbers} numbers in {words} words are packed in no known way (2, 4 or 8 bits)")
    return fitting[-1]


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """A scale per tensor, row, group of columns or block, repeated to `shape` [.., O, I]."""
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if scale.dim() < 2:
        scale = scale.reshape(-1, 1)
    for axis in (-2, -1):
        if scale.shape[axis] not in (1, shape[axis]):
            repeat = -(-shape[axis] // scale.shape[axis])
            # Block sizes are powers of two; the last block may be cut.
            repeat = 1 << (repeat - 1).bit_length()
            scale = scale.repeat_interleave(repeat, axis).narrow(axis, 0, shape[axis])
    return scale.expand(shape)


def _compressed(fetch: Fetch, _: Mapping[str, Any]) -> Tensor:
    """compressed-tensors tells its formats apart by what it stores, and one file may mix them: words of integer codes,
    bytes of 4-bit floats, or int8 and fp8 numbers as they are."""
    packed = fetch("weight_packed")
    if packed is None:
        return _scaled(fetch)
    return _packed_floats(packed, fetch) if packed.dtype == torch.uint8 else _packed_integers(packed, fetch)


def _packed_integers(packed: Tensor, fetch: Fetch) -> Tensor:
    """`pack-quantized`: `weight_packed` int32 [O, words], codes offset by half their range, a scale per group."""
    shape = torch.Size(_need(fetch, "weight_shape").tolist())
    bits = _bits_of(packed.shape[1], shape[1])
    middle = 1 << (bits - 1)
    codes = unpack(packed, 1, bits)[:, : shape[1]].float() - middle
    scale, order = _need(fetch, "weight_scale").float(), fetch("weight_g_idx")
    zero = fetch("weight_zero_point")
    if zero is not None:
        zero = unpack(zero, 0, bits)[: shape[0]].float() - middle if zero.dtype == torch.int32 else zero.float()
    if order is not None and bool((order >= 0).all()):
        zeros = 0 if zero is None else zero[:, order.long()]
        return (codes - zeros) * scale[:, order.long()]
    return (codes if zero is None else codes - _spread(zero, shape)) * _spread(scale, shape)


_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What the sixteen 4-bit floats stand for."""


def _packed_floats(packed: Tensor, fetch: Fetch) -> Tensor:
    """NVFP4 and MXFP4: two 4-bit floats a byte, low half first; a scale per 16 in e4m3 below one for the whole matrix,
    by which it was multiplied, or one per 32 as a power of two."""
    values = _E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]
    whole = fetch("weight_global_scale")
    scaled = values * _spread(_need(fetch, "weight_scale"), values.shape)
    return scaled if whole is None else scaled / whole.float()


def _scaled(fetch: Fetch) -> Tensor:
    """int8 or fp8 `weight` [O, I] times `weight_scale` per tensor, row, group or block."""
    weight, zero = _need(fetch, "weight"), fetch("weight_zero_point")
    codes = weight.float() if zero is None else weight.float() - _spread(zero.float(), weight.shape)
    return codes * _spread(_need(fetch, "weight_scale"), weight.shape)


def _scaled_by_inverse(fetch: Fetch, settings: Mapping[str, Any]) -> Tensor:
    """Fine-grained FP8: `weight_scale_inv` per block (multiplied, in spite of its name); experts may be stacked."""
    weight = _need(fetch, "weight")
    return weight.float() * _spread(_need(fetch, "weight_scale_inv"), weight.shape)


def _gptq(fetch: Fetch, settings: Mapping[str, Any]) -> Tensor:
    """`qweight` int32 [words, O] packed along I; `qzeros` [groups, words]; `scales` [groups, O]; `g_idx` [I]."""
    packed, scales, order = _need(fetch, "qweight"), _need(fetch, "scales").float(), fetch("g_idx")
    bits = settings.get("bits", 4) if order is None else _bits_of(packed.shape[0], order.numel())
    if bits not in (2, 4, 8):
        raise CheckpointError(f"its {bits}-bit packing is unknown; 2, 4 and 8 bits can be read")
    codes, zeros = unpack(packed, 0, bits), unpack(_need(fetch, "qzeros"), 1, bits)
    if settings.get("checkpoint_format", "gptq") == "gptq":  # version 1 stores the zero point minus one
        zeros = (zeros + 1) & ((1 << bits) - 1)
    group = order.long() if order is not None else torch.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
    weight: Tensor = (codes - zeros[group]).float() * scales[group]
    return weight.T.contiguous()


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of column j's nibble among the eight of a word."""


def _awq(fetch: Fetch, settings: Mapping[str, Any]) -> Tensor:
    """`qweight` int32 [I, O/8] with interleaved nibbles; `qzeros` [groups, O/8]; `scales` [groups, O]."""
    if settings.get("bits", settings.get("w_bit", 4)) != 4:
        raise CheckpointError("only 4-bit AWQ can be read")

    def columns(words: Tensor) -> Tensor:
        words_of_eight: Tensor = unpack(words, 1).view(words.shape[0], -1, 8)
        return words_of_eight[..., list(_AWQ_ORDER)].flatten(1)

    codes, zeros = columns(_need(fetch, "qweight")), columns(_need(fetch, "qzeros"))
    scales = _need(fetch, "scales").float()
    size = codes.shape[0] // scales.shape[0]
    group = torch.arange(codes.shape[0]) // size
    weight: Tensor = (codes - zeros[group]).float() * scales[group]
    return weight.T.contiguous()


def _bnb_4bit(fetch: Fetch, _: Mapping[str, Any]) -> Tensor:
    """NF4 / FP4: one byte per two codes (high nibble first), looked up in `quant_map`, an absmax per block; the absmax
    may be quantised once more ("double quantisation")."""
    kind = "nf4" if fetch("weight.quant_state.bitsandbytes__nf4") is not None else "fp4"
    state = json.loads(bytes(_need(fetch, f"weight.quant_state.bitsandbytes__{kind}").tolist()))
    packed = _need(fetch, "weight").flatten()
    table = _need(fetch, "weight.quant_map").float()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    absmax = _need(fetch, "weight.absmax")
    if "nested_blocksize" in state:
        nested = _need(fetch, "weight.nested_absmax").float().repeat_interleave(state["nested_blocksize"])
        absmax = _need(fetch, "weight.nested_quant_map").float()[absmax.long()] * nested[: absmax.numel()]
        absmax = absmax + state["nested_offset"]
    count = 1
    for width in state["shape"]:
        count *= width
    scale = absmax.float().repeat_interleave(state["blocksize"])[:count]
    return (table[codes[:count]] * scale).view(state["shape"])


def _bnb_8bit(fetch: Fetch, _: Mapping[str, Any]) -> Tensor:
    """LLM.int8(): `weight` int8 [O, I] times `SCB` [O] / 127."""
    return _need(fetch, "weight").float() * (_need(fetch, "SCB").float() / 127)[:, None]


_BNB = tuple(
    f"weight{rest}"
    for rest in (
        "",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_state.bitsandbytes__nf4",
        ".quant_state.bitsandbytes__fp4",
    )
)
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale")
"""Activations are rounded in the tool's own kernels only; here they stay as they are."""
_COMPRESSED = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision"),
)
"""The formats of compressed-tensors that can be read."""

SCHEMES = {
    "compressed-tensors": Scheme(
        "compressed-tensors",
        "weight_scale",
        (
            *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
            *("weight_global_scale", "input_global_scale", *_ACTIVATIONS),
        ),
        _compressed,
    ),
    "fbgemm_fp8": Scheme("fbgemm FP8", "weight_scale", ("weight", "weight_scale", *_ACTIVATIONS), _compressed),
    "fp8": Scheme(
        "fine-grained FP8", "weight_scale_inv", ("weight", "weight_scale_inv", "activation_scale"), _scaled_by_inverse
    ),
    "gptq": Scheme("GPTQ", "qweight", ("qweight", "qzeros", "scales", "g_idx"), _gptq),
    "awq": Scheme("AWQ", "qweight", ("qweight", "qzeros", "scales"), _awq),
    "bitsandbytes-nf4": Scheme("bitsandbytes NF4", "weight.absmax", _BNB, _bnb_4bit),
    "bitsandbytes-fp4": Scheme("bitsandbytes FP4", "weight.absmax", _BNB, _bnb_4bit),
    "bitsandbytes-8bit": Scheme("bitsandbytes int8", "SCB", ("weight", "SCB", "weight_format"), _bnb_8bit),
}
