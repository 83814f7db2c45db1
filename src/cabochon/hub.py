"""Checkpoints by name: the bundled one, folders, and the Hugging Face cache that other tools share.

Nothing here downloads unless `pull` is called: a model name in a script must not start 60 GB of traffic by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import variants
from .errors import CheckpointError, UnknownModelError

if TYPE_CHECKING:
    pass

BUNDLED = Path(__file__).parent / "pebble"
"""The demonstration checkpoint that ships with the package."""

_WANTED = ("*.json", "*.jinja", "*.safetensors")
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Cached:
    """A checkpoint on this machine."""

    repo: str
    revision: str
    """The commit."""
    path: Path
    size: int
    """Bytes on disk."""
    complete: bool
    """False when a download stopped on the way."""


def locate(model: str | Path | None = None) -> Path:
    """The folder (or file) of a checkpoint that is on this machine already.

    Args:
        model: a folder or a file; `owner/name`, `owner/name@revision` or an alias like `E2B` of something in the
            Hugging Face cache; None for the bundled checkpoint.

    Raises:
        UnknownModelError: nothing of that name is here; the message says how to get it.
        CheckpointError: only a part of it has been downloaded.
    """
    if model is None:
        return BUNDLED
    path = Path(model).expanduser()
    if path.exists():
        return path
    if isinstance(model, Path) or _is_path(model):
        raise UnknownModelError(f"There is no file or folder {model}.")
    repo, revision = parse(model)
    found = _cached_snapshot(repo, revision)
    if found is None:
        raise UnknownModelError(
            f"{model} isn't on this machine; {_hint(model, f'fetch it with: cabochon pull {model}')}"
        )
    missing = missing_files(found)
    if missing:
        raise CheckpointError(
            f"Of {repo} only a part is on this machine ({missing[0]} is missing); go on with: cabochon pull {model}"
        )
    return found


def parse(name: str) -> tuple[str, str]:
    """`owner/name[@revision]` or an alias -> (repository, revision).

    Raises:
        UnknownModelError: no repository has such a name; the message suggests one.
    """
    name, _, revision = name.partition("@")
    variant = variants.lookup(name)
    if variant is not None:
        return variant.repo, revision or "main"
    if name.count("/") != 1 or not all(name.split("/")):
        raise UnknownModelError(f"There is no model {name!r}; {_hint(name, 'see: cabochon models')}")
    return name, revision or "main"


def _hint(name: str, otherwise: str) -> str:
    """For a name of the family that isn't one of its repositories: the nearest one."""
    name = name.partition("@")[0]
    of_the_family = "/" not in name or name.startswith(f"{variants.OWNER}/gemma-4-")
    nearest = variants.suggest(name) if of_the_family and variants.lookup(name) is None else None
    return f"did you mean {nearest}?" if nearest else otherwise


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a checkpoint folder should have and hasn't."""
    wanted = ["config.json"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted += sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif not any(folder.glob("*.gguf")):
        wanted += ["model.safetensors"]
    else:
        wanted = []
    return [name for name in wanted if not (folder / name).is_file()]


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".gguf", ".safetensors", "/"))


def _cached_snapshot(repo: str, revision: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(str(snapshot_download(repo, revision=revision, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
