"""A model as the GGUF files that llama.cpp loads: names, metadata and vocabulary as its own converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError
from .gguf import ToWrite, write_gguf
from .gguf_blocks import BY_NAME, BlockType
from .gguf_model import metadata_of
from .gguf_towers import tower_metadata, tower_name, turned
from .params import Param, parameters

FORMATS = {"bf16": "BF16", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_FILE_TYPE = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}


def save_gguf(
    path: Path,
    config: ModelConfig,
    weight: Callable[[str], Tensor],
    format: str,
    *,
    tokenizer_json: str | None = None,
    template: str | None = None,
    name: str = "cabochon",
) -> None:
    """Write the text network of `config`; `weight` fetches a tensor by our name when its turn comes.

    Matrices go into `format` (see FORMATS), what must stay exact (norms, scalars, the router) into F32. With q4_0 the
    embedding, which is also the head, is kept in Q8_0.

    Raises:
        InputError: the format is unknown, or a matrix's rows are no multiple of its block.
    """
    if format not in FORMATS:
        raise InputError(f"GGUF files can be written as {', '.join(FORMATS)}, not as {format!r}.")
    kind = BY_NAME[FORMATS[format]]
    if config.drafter is not None:  # the file has no place for clusters
        config = replace(config, drafter=replace(config.drafter, use_ordered_embeddings=False))
    rows: list[ToWrite] = [("rope_freqs.weight", (_half(config),), BY_NAME["F32"], partial(_turning, config))]
    rows += [(p.gguf, p.shape, _kind(p, kind), partial(weight, p.name)) for p in parameters(config) if p.gguf]
    metadata = metadata_of(config, tokenizer_json, template, name) | {"general.file_type": _FILE_TYPE[kind.name]}
    write_gguf(path, metadata, rows)


def save_towers(path: Path, config: ModelConfig, weight: Callable[[str], Tensor], *, name: str = "cabochon") -> None:
    """Write eyes and ears of `config` as the mmproj file that belongs to a text file.

    Matrices are kept in bfloat16; convolutions, tables and whatever has one axis in float32.
    """
    rows: list[ToWrite] = []
    for param in parameters(config):
        if (theirs := tower_name(param.hf)) is None:
            continue
        shape = tuple(turned(param, torch.empty(param.shape, device="meta")).shape)
        exact = len(shape) != 2 or "conv" in param.hf
        rows.append((theirs, shape, BY_NAME["F32" if exact else "BF16"], partial(_turned, param, weight)))
    write_gguf(path, tower_metadata(config, name) | {"general.file_type": _FILE_TYPE["BF16"]}, rows)


def _turned(param: Param, weight: Callable[[str], Tensor]) -> Tensor:
    return turned(param, weight(param.name).float())


def _kind(param: Param, kind: BlockType) -> BlockType:
    if not param.quantize:
        return BY_NAME["F32"]
    if param.part in ("embedding", "per_layer_embedding") and kind.name == "Q4_0":
        kind = BY_NAME["Q8_0"]
    if param.shape[-1] % kind.values:
        raise InputError(
            f"{param.name} has rows of {param.shape[-1]} numbers, which {kind.name} can't hold "
            f"(blocks of {kind.values}); "
            "write bf16."
        )
    return kind


def _half(config: ModelConfig) -> int:
    return next(spec.head_dim for spec in config.text.layers if spec.kind == "global") // 2


def _turning(config: ModelConfig) -> Tensor:
    """Divisors of the global layers' frequencies: 1 where a pair turns, so large where it doesn't that nothing does."""
    rotated = next(spec.rope.rotated for spec in config.text.layers if spec.kind == "global") // 2
    return torch.cat([torch.ones(rotated), torch.full((_half(config) - rotated,), 1e30)])
