"""One door to every kind of checkpoint: a folder of safetensors, plain or quantised by another tool, or a GGUF file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ..config import GenerationConfig, ModelConfig, read_config, read_generation_config
from ..errors import CheckpointError, brief
from . import own
from .gguf import GGUFFile, read_gguf
from .gguf_model import config_of, listed, stops_of, tokenizer_of
from .gguf_source import GGUFSource
from .gguf_towers import tower_config
from .load import Source
from .params import own_format
from .safetensors import SafetensorsSource
from .scheme_source import SchemeSource

log = logging.getLogger("cabochon.weights")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says of itself, and where its tensors come from. Nothing of them has been read yet."""

    config: ModelConfig
    source: Source
    generation: GenerationConfig
    folder: Path | None
    """Where tokenizer and template lie as files; None where they are in `tokenizer` and `template`."""
    tokenizer: str | None = None
    template: str | None = None

    @property
    def kept(self) -> frozenset[str]:
        """Our names of the matrices that stay in another maker's int4 when nothing else is asked for."""
        return self.source.kept() if isinstance(self.source, GGUFSource) else frozenset()


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a folder with config.json, a folder with one GGUF model, or a .gguf file."""
    gguf = path if path.is_file() else _only_gguf(path)
    if gguf is not None:
        return _open_gguf(gguf)
    config = read_config(path)
    stored = SafetensorsSource(path)
    return Checkpoint(config, _source(stored, config), read_generation_config(path), path)


def _source(stored: SafetensorsSource, config: ModelConfig) -> Source:
    if not config.quantization:
        return stored
    if own_format(config) is not None:
        return own.OwnSource(stored, config)
    return SchemeSource(stored, config.quantization)


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF model in a folder without config.json (towers and later parts of a split put aside)."""
    if (folder / "config.json").exists():
        return None
    found = sorted(f for f in folder.glob("*.gguf") if "mmproj" not in f.name)
    found = [f for f in found if "-of-" not in f.name or "-00001-of-" in f.name]
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise CheckpointError(f"{folder} holds {len(found)} GGUF models ({names}); name the one to run.")
    return found[0] if found else None


def _open_gguf(path: Path) -> Checkpoint:
    file = read_gguf(path)
    raw = config_of(file)
    towers = _towers_beside(path, raw["text_config"]["hidden_size"])
    if towers is not None:
        raw |= tower_config(towers, listed(file.metadata, "tokenizer.ggml.tokens", str))
    config = read_config(raw)
    return Checkpoint(
        config=config,
        source=GGUFSource(file, config, str(path), towers),
        generation=GenerationConfig(eos=tuple(stops_of(file.metadata))),
        folder=None,
        tokenizer=tokenizer_of(file.metadata) if "tokenizer.ggml.tokens" in file.metadata else None,
        template=_template(file.metadata.get("tokenizer.chat_template")),
    )


def _towers_beside(path: Path, width: int) -> GGUFFile | None:
    """The mmproj file in the same folder that fits a text network of `width`: named after it, or the largest."""
    beside = path.parent.glob("*mmproj*.gguf")
    for found in sorted(beside, key=lambda file: (file.name != f"mmproj-{path.name}", -file.stat().st_size)):
        towers = read_gguf(found)
        if towers.metadata.get("clip.vision.projection_dim") == width:
            log.info("images and sound go through %s", found.name)
            return towers
    return None


def _template(said: object) -> str | None:
    if not isinstance(said, str | None):
        raise CheckpointError(f"the GGUF file's tokenizer.chat_template is {brief(said)}; it must be a text.")
    return said
