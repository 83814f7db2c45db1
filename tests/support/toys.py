"""Toy checkpoints in the shape of every released size, small enough for any test.

A toy keeps what makes its size special (pattern of layers, KV sharing, per-layer embeddings, double-wide MLP,
value = key, experts, head widths that differ by kind) and shrinks the rest: window 16, head widths 16 and 32, 320
tokens. Its config is a config.json as published checkpoints spell it, so that `transformers` and we read the same.

Weights are calm: q and k norms of about head_dim ** -0.25 and post norms of about 0.3 keep scores and residuals small,
so that float32 and float64 agree to a few 1e-6 and a larger difference means a mistake.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cabochon.config import ModelConfig, read_config
from cabochon.model.gemma4 import Gemma4
from cabochon.variants import find
from cabochon.weights.random import calm_tensor

SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
VOCAB = 320
WINDOW = 16
IDS = {
    "boi_token_id": 307,
    "boa_token_id": 308,
    "image_token_id": 309,
    "audio_token_id": 310,
    "eoi_token_id": 311,
    "eoa_token_index": 312,
    "video_token_id": 313,
}
_TEXT: dict[str, dict[str, Any]] = {
    "E2B": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "num_attention_heads": 4},
    "E4B": {"num_hidden_layers": 12, "num_kv_shared_layers": 6, "num_attention_heads": 4},
    "12B": {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    "26B-A4B": {
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 24,
        "intermediate_size": 72,
    },
    "31B": {
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
    },
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "position_embedding_size": 256,
}
_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [128, 4],  # the reference takes the first for the number of mel bands
    "output_proj_dims": 24,
}


def toy_json(size: str, *, media: bool = False, **text: Any) -> dict[str, Any]:
    """config.json of a toy in the shape of `size` ("E2B", ...); `text` overrides keys of its text_config.

    Without `media` the towers are left out (except that the ids of media tokens stay).
    """
    raw = copy.deepcopy(find(size).config())
    own = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": WINDOW,
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        "max_position_embeddings": 4096,
        **_TEXT[size],
        **text,
    }
    period = find(size).size.period
    own.setdefault("layer_types", _layer_types(own["num_hidden_layers"], period))
    if raw["text_config"]["hidden_size_per_layer_input"]:
        own.setdefault("hidden_size_per_layer_input", 8)
    raw["text_config"].update(own)
    raw.update(IDS)
    _shrink_media(raw, media)
    return with_dtype(raw, torch.float32)


def toy_drafter_json(size: str, **text: Any) -> dict[str, Any]:
    """config.json of an assistant that fits `toy_json(size)`."""
    target = toy_json(size)["text_config"]
    raw = copy.deepcopy(find(f"{size}-assistant").config())
    keep = ("head_dim", "global_head_dim", "sliding_window", "vocab_size", "max_position_embeddings")
    heads = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads")
    shared = {key: target[key] for key in (*keep, *heads)}
    raw["text_config"].update({**shared, "hidden_size": 32, "intermediate_size": 48, **text})
    raw.update({key: value for key, value in IDS.items() if key in raw})
    raw.update(backbone_hidden_size=target["hidden_size"], num_centroids=32, centroid_intermediate_top_k=8)
    return with_dtype(raw, torch.float32)


def with_dtype(raw: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`raw` with the dtype of every part set; `transformers` rounds constants to it even in a module cast later."""
    name = str(dtype).removeprefix("torch.")
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        part["dtype"] = name
    return raw


def toy_config(size: str, *, media: bool = False, **text: Any) -> ModelConfig:
    return read_config(toy_json(size, media=media, **text))


def calm_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and persistent buffer with calm values that depend on `seed` and the parameter's name only.

    The leading `model.` of `transformers`' names is left out, so that its module and ours get the same weights.
    """
    with torch.no_grad():
        for name, tensor in _stored(module):
            plain = _file_name(name.removeprefix("model."))
            tensor.copy_(calm_tensor(plain, tuple(tensor.shape), seed=seed).to(tensor.dtype))
    return module


def _file_name(name: str) -> str:
    """`transformers` keeps the 12B's picture layers under other names than the file does; ours are the file's."""
    if name.startswith(("embed_vision.patch_", "embed_vision.pos_")):
        return name.replace("embed_vision", "vision_embedder", 1)
    return name.replace("embed_vision.multimodal_embedder.", "embed_vision.", 1)


def toy_model(size: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **text: Any) -> Gemma4:
    """Our network with calm weights."""
    model = Gemma4(toy_config(size, **text)).to(dtype)
    calm_(model, seed)
    return model.eval()


def save_toy(folder: Path, size: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **text: Any) -> Path:
    """A checkpoint folder (config.json, model.safetensors, no tokenizer) that we and `transformers` load."""
    from safetensors.torch import save_file

    raw = with_dtype(toy_json(size, **text), dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    model = toy_model(size, seed=seed, dtype=dtype, **text)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_ids(count: int, seed: int = 0) -> list[int]:
    """Token ids that are neither control tokens of the toys nor padding."""
    drawn = torch.randint(4, 300, (count,), generator=torch.Generator().manual_seed(seed))
    return [int(i) for i in drawn]


def _stored(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    kept = module.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in kept.items():
        if tensor.data_ptr() not in seen:  # a tied head appears twice
            yield name, tensor
        seen.add(tensor.data_ptr())


def _layer_types(layers: int, period: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


def _shrink_media(raw: dict[str, Any], media: bool) -> None:
    width = raw["text_config"]["hidden_size"]
    if not media:
        raw.update(vision_config=None, audio_config=None)
    elif raw["model_type"] == "gemma4_unified":
        raw["vision_config"].update(mm_embed_dim=width, output_proj_dims=width, mm_posemb_size=32)
    else:
        raw["vision_config"].update(_VISION)
        if raw["audio_config"]:
            raw["audio_config"].update(_AUDIO)
