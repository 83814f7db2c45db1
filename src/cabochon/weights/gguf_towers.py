"""The eyes and ears that lie beside a text network: llama.cpp's `mmproj` file.

It names tensors in its own way, keeps some of them turned or transformed, and leaves out what it has in code. What it
leaves out is taken from the published model of the same kind, what shapes tell is read off the tensors.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import AudioConfig, ModelConfig, UnifiedAudioConfig, UnifiedVisionConfig, VisionConfig
from ..errors import CheckpointError, brief
from ..variants import find
from .gguf import GGUFFile, GGUFTensor
from .params import Param, Shape

_MEDIA_TOKENS = {
    "boi_token_id": "<|image>",
    "image_token_id": "<|image|>",
    "eoi_token_id": "<image|>",
    "boa_token_id": "<|audio>",
    "audio_token_id": "<|audio|>",
    "eoa_token_index": "<audio|>",
    "video_token_id": "<|video|>",
}
_KINDS = {"gemma4v": "E2B", "gemma4uv": "12B"}
"""Vision projector -> a published model whose config.json has what the file leaves out."""
_MOST_PIXELS = "clip.vision.image_max_pixels"
"""What other families' files call the size of an image that nobody asked to be smaller or larger."""

_BLOCK = {
    "v": {
        "input_layernorm": "ln1",
        "post_attention_layernorm": "attn_post_norm",
        "pre_feedforward_layernorm": "ln2",
        "post_feedforward_layernorm": "ffn_post_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_out",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "a": {
        "feed_forward1.ffw_layer_1": "ffn_up",
        "feed_forward1.ffw_layer_2": "ffn_down",
        "feed_forward1.pre_layer_norm": "ffn_norm",
        "feed_forward1.post_layer_norm": "ffn_post_norm",
        "feed_forward2.ffw_layer_1": "ffn_up_1",
        "feed_forward2.ffw_layer_2": "ffn_down_1",
        "feed_forward2.pre_layer_norm": "ffn_norm_1",
        "feed_forward2.post_layer_norm": "ffn_post_norm_1",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.post": "attn_out",
        "self_attn.relative_k_proj": "attn_k_rel",
        "lconv1d.linear_start": "conv_pw1",
        "lconv1d.linear_end": "conv_pw2",
        "lconv1d.depthwise_conv1d": "conv_dw",
        "lconv1d.pre_layer_norm": "conv_norm",
        "lconv1d.conv_norm": "norm_conv",
        "norm_pre_attn": "attn_pre_norm",
        "norm_post_attn": "attn_post_norm",
        "norm_out": "ln2",
    },
}
_OUTSIDE = {
    "model.vision_tower.patch_embedder.input_proj.weight": "v.patch_embd.weight",
    "model.vision_tower.patch_embedder.position_embedding_table": "v.position_embd.weight",
    "model.vision_tower.std_bias": "v.std_bias",
    "model.vision_tower.std_scale": "v.std_scale",
    "model.embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    "model.embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
    "model.audio_tower.subsample_conv_projection.layer0.conv.weight": "a.conv1d.0.weight",
    "model.audio_tower.subsample_conv_projection.layer0.norm.weight": "a.conv1d.0.norm.weight",
    "model.audio_tower.subsample_conv_projection.layer1.conv.weight": "a.conv1d.1.weight",
    "model.audio_tower.subsample_conv_projection.layer1.norm.weight": "a.conv1d.1.norm.weight",
    "model.audio_tower.subsample_conv_projection.input_proj_linear.weight": "a.input_projection.weight",
    "model.audio_tower.output_proj.weight": "a.pre_encode.out.weight",
    "model.audio_tower.output_proj.bias": "a.pre_encode.out.bias",
    "model.vision_embedder.patch_dense.weight": "v.patch_embd.weight",
    "model.vision_embedder.patch_dense.bias": "v.patch_embd.bias",
    "model.vision_embedder.pos_embedding": "v.position_embd.weight",
    **{
        f"model.vision_embedder.{ours}.{part}": f"v.patch_norm.{number}.{part}"
        for number, ours in enumerate(("patch_ln1", "patch_ln2", "pos_norm"), 1)
        for part in ("weight", "bias")
    },
}
_LAYER = re.compile(r"model\.(vision|audio)_tower\.(?:encoder\.)?layers\.(\d+)\.(.*?)(?:\.linear)?\.(\w+)")


def tower_name(hf: str) -> str | None:
    """llama.cpp's name of a tower's tensor; None for what is no tower's."""
    if hf in _OUTSIDE:
        return _OUTSIDE[hf]
    match = _LAYER.fullmatch(hf)
    if match is None:
        return None
    tower, layer, module, leaf = match.groups()
    if leaf == "per_dim_scale":
        return f"a.blk.{layer}.per_dim_scale.weight"
    return f"{tower[0]}.blk.{layer}.{_BLOCK[tower[0]][module]}.{leaf}"


def restore(param: Param, tensor: GGUFTensor) -> Tensor:
    """The values of a tower's tensor, float32, as the checkpoint has them."""
    return _turn(param).back(tensor.dequantize()).reshape(param.shape)


def turned(param: Param, values: Tensor) -> Tensor:
    """A tower's tensor as llama.cpp keeps it, which has no scalars and no axes of one."""
    values = _turn(param).forth(values)
    return values.reshape([width for width in values.shape if width != 1 or values.dim() == 4] or [1])


@dataclass(frozen=True, slots=True)
class _Turn:
    """What happens to a tensor's values on the way into the file, and out of it."""

    forth: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def _turn(param: Param) -> _Turn:
    return next((turn for end, turn in _TURNS.items() if param.hf.endswith(end)), _Turn(torch.clone, torch.clone))


def _side(values: Tensor) -> int:
    """Of a square patch whose pixels of three colours are the last axis."""
    return math.isqrt(values.shape[-1] // 3)


def _by_colour(values: Tensor) -> Tensor:
    """The last axis from (row, column, colour) to (colour, row, column)."""
    pixels: Tensor = values.unflatten(-1, (_side(values), _side(values), 3))
    return pixels.movedim(-1, -3).flatten(-3)


def _by_pixel(values: Tensor) -> Tensor:
    """The last axis from (colour, row, column) to (row, column, colour)."""
    planes: Tensor = values.unflatten(-1, (3, _side(values), _side(values)))
    return planes.movedim(-3, -1).flatten(-3)


_TURNS: Mapping[str, _Turn] = {
    "patch_embedder.input_proj.weight": _Turn(
        lambda values: values.unflatten(-1, (_side(values), _side(values), 3)).permute(0, 3, 1, 2),
        lambda values: values.permute(0, 2, 3, 1),
    ),
    # log(1 + e^x) and its inverse
    "per_dim_scale": _Turn(
        lambda values: torch.nn.functional.softplus(values.double()).float(),
        lambda values: values.double().expm1().log().float(),
    ),
    "vision_embedder.pos_embedding": _Turn(lambda values: values.movedim(1, 0), lambda values: values.movedim(1, 0)),
    **{
        f"vision_embedder.patch_{end}": _Turn(_by_colour, _by_pixel)
        for end in ("dense.weight", "ln1.weight", "ln1.bias")
    },
}


def tower_config(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    """What config.json says of the towers in `file`: vision_config, audio_config, the ids of media tokens.

    Raises:
        CheckpointError: the file holds other towers, or lacks a tensor that tells a size.
    """
    kind = file.metadata.get("clip.vision.projector_type")
    if file.metadata.get("general.architecture") != "clip" or not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(
            f"the mmproj file holds a {brief(kind)} tower; known are {', '.join(_KINDS)}. Take the model's own file."
        )
    like = copy.deepcopy(find(_KINDS[kind]).config())
    ids = {token: i for i, token in enumerate(tokens)}
    found: dict[str, Any] = {key: ids[token] for key, token in _MEDIA_TOKENS.items() if token in ids}
    unified = kind == "gemma4uv"
    if unified:
        found["model_type"] = "gemma4_unified"
    vision = found["vision_config"] = like["vision_config"] | (_unified_vision(file) if unified else _vision(file))
    if isinstance(pixels := file.metadata.get(_MOST_PIXELS), int):
        usual = pixels // (vision["patch_size"] * vision["pooling_kernel_size"]) ** 2
        vision["num_soft_tokens" if unified else "default_output_length"] = usual
        found["vision_soft_tokens_per_image"] = usual
    found["audio_config"] = None
    if file.metadata.get("clip.has_audio_encoder"):
        heard = {"audio_embed_dim": _shape(file, "mm.a.input_projection.weight", 2)[1]} if unified else _audio(file)
        found["audio_config"] = like["audio_config"] | heard
    return found


def _vision(file: GGUFFile) -> dict[str, Any]:
    said = _said(file, "vision")
    return said | {
        "num_key_value_heads": said["num_attention_heads"],
        "head_dim": _shape(file, "v.blk.0.attn_q_norm.weight", 1)[0],
        "patch_size": _shape(file, "v.patch_embd.weight", 4)[-1],
        "position_embedding_size": _shape(file, "v.position_embd.weight", 3)[1],
        "standardize": "v.std_bias" in file.tensors,
        "use_clipped_linears": "v.blk.0.attn_q.input_max" in file.tensors,
    }


def _unified_vision(file: GGUFFile) -> dict[str, Any]:
    width, pixels = _shape(file, "v.patch_embd.weight", 2)
    return {
        "mm_embed_dim": width,
        "output_proj_dims": width,
        "mm_posemb_size": _shape(file, "v.position_embd.weight", 3)[1],
        "model_patch_size": math.isqrt(pixels // 3),
    }


def _audio(file: GGUFFile) -> dict[str, Any]:
    said = _said(file, "audio")
    del said["intermediate_size"]  # four times the width, in both
    return said | {
        "conv_kernel_size": _shape(file, "a.blk.0.conv_dw.weight", 2)[1],
        "output_proj_dims": _shape(file, "a.pre_encode.out.weight", 2)[0],
        "subsampling_conv_channels": [_shape(file, f"a.conv1d.{i}.weight", 4)[0] for i in (0, 1)],
        "use_clipped_linears": "a.blk.0.attn_q.input_max" in file.tensors,
    }


_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}


def _said(file: GGUFFile, tower: str) -> dict[str, Any]:
    return {ours: file.metadata.get(f"clip.{tower}.{theirs}") for ours, theirs in _SIZES.items()}


def _shape(file: GGUFFile, name: str, axes: int) -> Shape:
    tensor = file.tensors.get(name)
    if tensor is None or len(tensor.shape) != axes:
        raise CheckpointError(f"the mmproj file has no tensor {name} of {axes} axes; convert the model again.")
    return tensor.shape


def tower_metadata(config: ModelConfig, name: str) -> dict[str, Any]:
    """The metadata that llama.cpp's loader wants for the towers of `config`; the inverse of `tower_config`."""
    vision, audio = config.vision, config.audio
    assert vision is not None
    unified = isinstance(vision, UnifiedVisionConfig)
    said: dict[str, Any] = {"general.architecture": "clip", "general.type": "mmproj", "general.name": name}
    said |= {
        "clip.has_vision_encoder": True,
        "clip.vision.projector_type": "gemma4uv" if unified else "gemma4v",
        "clip.vision.projection_dim": config.text.hidden_size,
        "clip.vision.image_size": 224,  # wanted by the loader, read by nobody
        _MOST_PIXELS: vision.soft_tokens * (vision.patch_size * vision.pooling_kernel_size) ** 2,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.image_mean": [0.0] * 3,
        "clip.vision.image_std": [1.0] * 3,
        "clip.vision.attention.layer_norm_epsilon": vision.rms_norm_eps,
    }
    said |= _sizes("vision", vision.mm_embed_dim if isinstance(vision, UnifiedVisionConfig) else vision)
    if audio is not None:
        said |= {
            "clip.has_audio_encoder": True,
            "clip.audio.projector_type": "gemma4ua" if unified else "gemma4a",
            "clip.audio.projection_dim": config.text.hidden_size,
            "clip.audio.num_mel_bins": 128,
            "clip.audio.attention.layer_norm_epsilon": audio.rms_norm_eps,
        }
        said |= _sizes("audio", audio.audio_embed_dim if isinstance(audio, UnifiedAudioConfig) else audio)
    return said | {"general.quantization_version": 2}


def _sizes(tower: str, of: VisionConfig | AudioConfig | int) -> dict[str, int]:
    """The 12B's towers have a width and no layers."""
    if isinstance(of, int):
        sizes = (of, 0, 0, 0)
    else:
        inner = of.intermediate_size if isinstance(of, VisionConfig) else 4 * of.hidden_size
        sizes = (of.hidden_size, inner, of.num_hidden_layers, of.num_attention_heads)
    return {f"clip.{tower}.{key}": size for key, size in zip(_SIZES.values(), sizes, strict=True)}
