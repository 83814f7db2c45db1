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

from ..errors import CheckpointError

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
        name = settings.get("format")
        groups = settings.get("config_groups") or {}
        formats = {group.get("format") or name for group in groups.values()} or {name}
        if len(formats) != 1:
            raise CheckpointError(f"this compressed-tensors checkpoint mixes the formats {sorted(map(str, formats))}.")
        method = formats.pop()
    if method == "bitsandbytes":
        method = "bitsandbytes-8bit" if settings.get("load_in_8bit") else f"bitsandbytes-{_bnb_kind(settings)}"
    if method == "awq" and settings.get("version", "gemm").lower() != "gemm":
        raise CheckpointError(f"AWQ checkpoints in the {settings['version']!r} layout can't be read; 'gemm' ones can.")
    if method not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise CheckpointError(f"the quantisation {method!r} can't be read; known are {known}. Take another repository.")
    return SCHEMES[method]


def _bnb_kind(settings: Mapping[str, Any]) -> str:
    return str(settings.get("bnb_4bit_quant_type", "fp4")).lower()


def _need(fetch: Fetch, suffix: str) -> Tensor:
    tensor = fetch(suffix)
    if tensor is None:
        raise CheckpointError(f"its {suffix} is missing")
    return tensor


def unpack_nibbles(words: Tensor, dim: int) -> Tensor:
    """int32 words -> eight unsigned 4-bit codes each along `dim`, lowest bits first (as int32)."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.dim() - dim - 1))) & 15
    return codes.flatten(dim, dim + 1)


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """A scale per tensor, row, group of columns or block, repeated to `shape`."""
    scale = scale.float()
    if scale.dim() < 2:
        scale = scale.reshape(-1, 1)
    for axis in (0, 1):
        if scale.shape[axis] not in (1, shape[axis]):
            repeat = -(-shape[axis] // scale.shape[axis])
            # Block sizes are powers of two; the last block may be cut.
            repeat = 1 << (repeat - 1).bit_length()
            scale = scale.repeat_interleave(repeat, axis)[: shape[0] if axis == 0 else None]
            scale = scale[:, : shape[1]] if axis == 1 else scale
    return scale.expand(shape)


def _pack_quantized(fetch: Fetch, settings: Mapping[str, Any]) -> Tensor:
    """compressed-tensors w4a16: `weight_packed` int32 [O, I/8], codes offset by 8, a scale per group of columns."""
    bits = _weights_setting(settings, "num_bits", 4)
    if bits != 4:
        raise CheckpointError(f"its {bits}-bit packing is unknown; 4 bits can be read")
    shape = torch.Size(_need(fetch, "weight_shape").tolist())
    codes = unpack_nibbles(_need(fetch, "weight_packed"), 1)[:, : shape[1]].float() - 8
    zero = fetch("weight_zero_point")
    if zero is not None:
        points = unpack_nibbles(zero, 0)[: shape[0]].float() - 8 if zero.dtype == torch.int32 else zero.float()
        codes = codes - _spread(points, shape)
    order = fetch("weight_g_idx")
    scale = _need(fetch, "weight_scale").float()
    if order is not None and bool((order >= 0).all()):
        return codes * scale[:, order.long()]
    return codes * _spread(scale, shape)


def _weights_setting(settings: Mapping[str, Any], key: str, default: Any) -> Any:
    for group in (settings.get("config_groups") or {}).values():
        return (group.get("weights") or {}).get(key, default)
    return default


def _scaled(fetch: Fetch, _: Mapping[str, Any]) -> Tensor:
    """int8 or fp8 `weight` [O, I] times `weight_scale` per tensor, row or block."""
    weight = _need(fetch, "weight")
    zero = fetch("weight_zero_point")
    if zero is not None and bool((zero != 0).any()):
        raise CheckpointError("it has zero points in a scheme that should be symmetric")
    return weight.float() * _spread(_need(fetch, "weight_scale"), weight.shape)


def _scaled_by_inverse(fetch: Fetch, settings: Mapping[str, Any]) -> Tensor:
    """Fine-grained FP8: `weight_scale_inv` per block of `weight_block_size` (multiplied, in spite of its name)."""
    weight = _need(fetch, "weight")
    return weight.float() * _spread(_need(fetch, "weight_scale_inv"), weight.shape)


def _gptq(fetch: Fetch, settings: Mapping[str, Any]) -> Tensor:
    """`qweight` int32 [I/8, O] packed along I; `qzeros` [groups, O/8]; `scales` [groups, O]; `g_idx` [I]."""
    if settings.get("bits", 4) != 4:
        raise CheckpointError(f"its {settings['bits']}-bit packing is unknown; 4 bits can be read")
    codes = unpack_nibbles(_need(fetch, "qweight"), 0)
    scales = _need(fetch, "scales").float()
    # Version 1 stores the zero point minus one.
    zeros = unpack_nibbles(_need(fetch, "qzeros"), 1) + (settings.get("checkpoint_format", "gptq") == "gptq")
    order = fetch("g_idx")
    size = codes.shape[0] // scales.shape[0]
    group = order.long() if order is not None else torch.arange(codes.shape[0]) // size
    weight: Tensor = (codes - zeros[group]).float() * scales[group]
    return weight.T.contiguous()


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of column j's nibble among the eight of a word."""


def _awq(fetch: Fetch, settings: Mapping[str, Any]) -> Tensor:
    """`qweight` int32 [I, O/8] with interleaved nibbles; `qzeros` [groups, O/8]; `scales` [groups, O]."""
    if settings.get("bits", settings.get("w_bit", 4)) != 4:
        raise CheckpointError("only 4-bit AWQ can be read")

    def columns(words: Tensor) -> Tensor:
        words_of_eight: Tensor = unpack_nibbles(words, 1).view(words.shape[0], -1, 8)
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

SCHEMES = {
    "pack-quantized": Scheme(
        "compressed-tensors pack-quantized",
        "weight_packed",
        ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        _pack_quantized,
    ),
    "int-quantized": Scheme(
        "compressed-tensors int-quantized",
        "weight_scale",
        ("weight", "weight_scale", "weight_zero_point", *_ACTIVATIONS),
        _scaled,
    ),
    "float-quantized": Scheme(
        "compressed-tensors float-quantized",
        "weight_scale",
        ("weight", "weight_scale", "weight_zero_point", *_ACTIVATIONS),
        _scaled,
    ),
    "naive-quantized": Scheme(
        "compressed-tensors naive-quantized",
        "weight_scale",
        ("weight", "weight_scale", "weight_zero_point", *_ACTIVATIONS),
        _scaled,
    ),
    "fbgemm_fp8": Scheme("fbgemm FP8", "weight_scale", ("weight", "weight_scale", *_ACTIVATIONS), _scaled),
    "fp8": Scheme("fine-grained FP8", "weight_scale_inv", ("weight", "weight_scale_inv"), _scaled_by_inverse),
    "gptq": Scheme("GPTQ", "qweight", ("qweight", "qzeros", "scales", "g_idx"), _gptq),
    "awq": Scheme("AWQ", "qweight", ("qweight", "qzeros", "scales"), _awq),
    "bitsandbytes-nf4": Scheme("bitsandbytes NF4", "weight.absmax", _BNB, _bnb_4bit),
    "bitsandbytes-fp4": Scheme("bitsandbytes FP4", "weight.absmax", _BNB, _bnb_4bit),
    "bitsandbytes-8bit": Scheme("bitsandbytes int8", "SCB", ("weight", "SCB", "weight_format"), _bnb_8bit),
}
