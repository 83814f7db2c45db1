"""From one stored form to another: the writers behind `cabochon quantize`, each tensor fetched when its turn comes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..formats import QUANTIZED
from ..quant import QuantTensor, dequantize
from . import compressed, gguf_write, own
from .checkpoint import Checkpoint
from .load import Source
from .params import Param, as_kept, parameters

FORMATS = (*QUANTIZED, *(f"gguf:{f}" for f in gguf_write.FORMATS), *(f"ct:{f}" for f in compressed.FORMATS))
"""int8, int4: ours. gguf:...: one file for llama.cpp. ct:...: a compressed-tensors folder for vLLM."""
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def write(
    found: Checkpoint,
    out: Path,
    format: str,
    name: str,
    tick: Callable[[Param], None] = lambda _: None,
    rounded: Iterator[tuple[Param, Tensor | QuantTensor]] | None = None,
) -> None:
    """Write the checkpoint `found` to `out` (a new folder, or a new file for gguf:..., with a second one for its
    towers) in one of `FORMATS`.

    `rounded` are all its parameters for int8 or int4 (see `calibrate`), when they are not simply rounded one by one.

    Raises:
        InputError: the format is unknown, `out` exists or can't be written, or a matrix does not fit the format.
    """
    if format not in FORMATS:
        raise InputError(f"The format is {format!r}, but must be one of {', '.join(FORMATS)}.")
    kind, _, inner = format.partition(":")
    if kind == "ct" and found.config.drafter is not None:
        raise InputError(f"{format} is for models; a drafter can be written as int8, int4 or gguf:....")
    mine = [out, towers_beside(out)] if kind == "gguf" and found.config.vision is not None else [out]
    for path in mine:
        if path.exists():
            raise InputError(f"{path} exists already; name a new {'file' if kind == 'gguf' else 'folder'}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if kind == "gguf":
            _write_gguf(found, out, inner, name, tick)
        else:
            _write_folder(found, out, kind, inner, tick, rounded)
    except BaseException as error:
        # Half a checkpoint looks like a whole one, and would be in the way of the next try.
        for path in mine:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise InputError(f"{out} can't be written ({getattr(error, 'strerror', None) or error}).") from None
        raise


def _write_gguf(found: Checkpoint, out: Path, inner: str, name: str, tick: Callable[[Param], None]) -> None:
    params = {param.name: param for param in parameters(found.config)}

    def weight(ours: str) -> Tensor:
        tick(params[ours])
        return fetch(found.source, params[ours])

    if found.config.vision is not None:
        gguf_write.save_towers(towers_beside(out), found.config, weight, name=name)
    gguf_write.save_gguf(
        out,
        found.config,
        weight,
        inner,
        tokenizer_json=_words(found),
        template=_template(found),
        name=name,
    )


def _write_folder(
    found: Checkpoint,
    out: Path,
    kind: str,
    inner: str,
    tick: Callable[[Param], None],
    rounded: Iterator[tuple[Param, Tensor | QuantTensor]] | None,
) -> None:
    if kind == "ct":
        compressed.save_compressed(out, found.config, _all(found, tick), inner)
    else:
        kept = replace(found, config=as_kept(found.config, kind))
        own.save_own(out, found.config, rounded or _all(kept, tick), kind)
    for file in _BESIDE:
        if found.folder is not None and (found.folder / file).is_file():
            shutil.copy(found.folder / file, out / file)
    if found.folder is None and found.tokenizer is not None:
        (out / "tokenizer.json").write_text(found.tokenizer, encoding="utf-8")
        if found.template is not None:
            (out / "chat_template.jinja").write_text(found.template, encoding="utf-8")


def towers_beside(out: Path) -> Path:
    """Where eyes and ears of the text network in the file `out` are written."""
    return out.with_name(f"mmproj-{out.name}")


def _all(found: Checkpoint, tick: Callable[[Param], None]) -> Iterator[tuple[Param, Tensor]]:
    for param in parameters(found.config):
        tick(param)
        yield param, fetch(found.source, param)


def fetch(source: Source, param: Param) -> Tensor:
    """The tensor of one parameter, in whatever float type it is stored; what is quantised comes as float32."""
    shapes = source.shapes()
    name = next((n for n in (param.hf, *param.also) if n in shapes), None)
    if name is None:
        raise CheckpointError(f"{source.origin} has no {param.hf}; download it again.")
    tensor = source.read(name)
    return dequantize(tensor) if isinstance(tensor, QuantTensor) else tensor


def _words(found: Checkpoint) -> str | None:
    path = found.folder / "tokenizer.json" if found.folder is not None else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else found.tokenizer


def _template(found: Checkpoint) -> str | None:
    path = found.folder / "chat_template.jinja" if found.folder is not None else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else found.template
