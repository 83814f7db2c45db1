"""Checkpoints by name: the bundled one, folders, and the Hugging Face cache that other tools share.

Nothing here downloads unless `pull` is called: a model name in a script must not start 60 GB of traffic by itself.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from . import modelfile, variants
from .errors import AccessError, CheckpointError, InputError, NetworkError, UnknownModelError

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo
    from huggingface_hub.hf_api import ModelInfo

BUNDLED = Path(__file__).parent / "pebble"
"""The demonstration checkpoint that ships with the package."""

_WANTED = (".json", ".jinja", ".safetensors")


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
        model: a folder or a file; a name that `cabochon create` made, or one as `parse` reads it of something in the
            Hugging Face cache; `pebble` or None for the bundled checkpoint.

    Raises:
        UnknownModelError: nothing of that name is here; the message says how to get it.
        CheckpointError: only a part of it has been downloaded.
    """
    if model is None:
        return BUNDLED
    path = Path(model).expanduser()
    if path.exists():
        return path
    if isinstance(model, str) and (recipe := modelfile.made(model)) is not None:
        return locate(recipe.base)
    if model == BUNDLED.name:
        return BUNDLED
    if isinstance(model, Path) or _is_path(model):
        raise UnknownModelError(f"There is no file or folder {model}.")
    repo, revision, file = parse(model)
    found = _cached_snapshot(repo, revision)
    if found is None or (file and not (found / file).is_file()):
        raise UnknownModelError(
            f"{model} isn't on this machine; {_hint(model, f'fetch it with: cabochon pull {model}')}"
        )
    missing = missing_files(found)
    if missing and not file:
        raise CheckpointError(
            f"Of {repo} only a part is on this machine ({missing[0]} is missing); go on with: cabochon pull {model}"
        )
    return found / file if file else found


def parse(name: str) -> tuple[str, str, str | None]:
    """A name -> (repository, revision, file).

    Names are `owner/name` or an alias like `E2B`, with `@revision` behind it if need be, and `owner/name/file.gguf` for
    one file of a repository that holds several.

    Raises:
        UnknownModelError: no repository has such a name; the message suggests one.
    """
    name, _, revision = name.partition("@")
    variant = variants.lookup(name)
    if variant is not None:
        return variant.repo, revision or "main", None
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts) or (len(parts) == 3 and not name.endswith(".gguf")):
        raise UnknownModelError(f"There is no model {name!r}; {_hint(name, 'see: cabochon models')}")
    return "/".join(parts[:2]), revision or "main", parts[2] if len(parts) == 3 else None


def _hint(name: str, otherwise: str) -> str:
    """For a name that is near one of the family's repositories, `pebble` or what `create` made: that one."""
    name = name.partition("@")[0]
    if near := difflib.get_close_matches(name, [BUNDLED.name, *modelfile.names()], 1, cutoff=0.8):
        return f"did you mean {near[0]}?"
    of_the_family = "/" not in name or name.startswith(f"{variants.OWNER}/gemma-4-")
    nearest = variants.suggest(name) if of_the_family and variants.lookup(name) is None else None
    return f"did you mean {nearest}?" if nearest else otherwise


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a checkpoint folder should have and hasn't."""
    if any(folder.glob("*.gguf")):
        return []
    wanted = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{index} isn't an index of weight files.") from None
    return [name for name in ("config.json", *wanted) if not (folder / name).is_file()]


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".safetensors", "/")) or name.count("/") > 2


def _repo_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _cached_snapshot(repo: str, revision: str) -> Path | None:
    """The folder of a revision (branch, tag or commit) in the cache, complete or not."""
    folder = _repo_folder(repo)
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


# The Hub --------------------------------------------------------------------------------------------------------------


def pull(name: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Fetch a checkpoint into the Hugging Face cache and return its folder, or file. What is here already is kept.

    Args:
        name: as `parse` reads it.
        progress: called with (bytes done, bytes in all), from one thread.

    Raises:
        AccessError: the licence isn't accepted, or HF_TOKEN is missing or wrong.
        UnknownModelError: the Hub has no such repository, revision or file.
        NetworkError: the Hub can't be reached, or broke off; another call goes on where this one stopped.
        InputError: the disk is too full.
    """
    from huggingface_hub import HfApi

    # The client logs every retry; what fails in the end is told in one sentence.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    repo, revision, file = parse(name)
    with _explained(name, repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = _wanted_files(info, repo, file)
    folder = _repo_folder(repo)
    _check_room(
        folder, sum(size for at, size in sizes.items() if not (folder / "snapshots" / str(info.sha) / at).is_file())
    )
    meter = _Meter(sum(sizes.values()), progress)
    for at, size in sizes.items():
        with _explained(name, repo, revision, at):
            path = _fetch(repo, revision, at, folder, meter)
        meter.file_done(size)
    return path if file else path.parent


def _fetch(repo: str, revision: str, at: str, folder: Path, meter: _Meter) -> Path:
    """One file into the cache's layout: blobs/ETAG, linked from snapshots/COMMIT/NAME, the commit under refs/.

    The client's own `hf_hub_download` throws a partial file away when it fails; of 50 GB one wants to keep what came.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    url = hf_hub_url(repo, at, revision=revision)
    found = get_hf_file_metadata(url)
    commit, etag = found.commit_hash or revision, found.etag or at
    pointer, blob = folder / "snapshots" / commit / at, folder / "blobs" / etag
    for parent in (pointer.parent, blob.parent, folder / "refs"):
        parent.mkdir(parents=True, exist_ok=True)
    if revision != commit:
        (folder / "refs" / revision).write_text(commit, encoding="utf-8")
    if not blob.is_file():
        headers = build_hf_headers()
        if urlsplit(url).netloc != urlsplit(found.location).netloc:
            headers.pop("authorization", None)  # a signed address on another host; the token is none of its business
        part = blob.with_name(f"{etag}.part")
        bar = cast(Any, meter.bar)  # any callable that makes something like tqdm's bar will do
        with part.open("ab") as out:
            http_get(
                found.location, out, resume_size=out.tell(), headers=headers, expected_size=found.size, tqdm_class=bar
            )
        _check_digest(part, etag)
        part.replace(blob)
    if not pointer.exists():
        try:
            pointer.symlink_to(Path(os.path.relpath(blob, pointer.parent)))
        except OSError:  # a system without symbolic links
            shutil.copyfile(blob, pointer)
    return pointer


def _check_digest(part: Path, etag: str) -> None:
    """Large files are named by their sha256."""
    if len(etag) != 64:
        return
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != etag:
        part.unlink()
        raise NetworkError("What came is not what the Hub holds (its sha256 differs) and was thrown away; pull again.")


def _wanted_files(info: ModelInfo, repo: str, file: str | None) -> dict[str, int]:
    """Name -> bytes, small files first, so that a missing licence or a wrong name shows at once."""
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or [] if "/" not in sibling.rfilename}
    if file is not None:
        if file not in sizes:
            raise UnknownModelError(f"{repo} has no file {file}; it has {', '.join(sorted(sizes)) or 'none'}.")
        return {file: sizes[file]}
    wanted = {name: size for name, size in sizes.items() if Path(name).suffix in _WANTED}
    if not any(name.endswith(".safetensors") for name in wanted):
        ggufs = sorted(name for name in sizes if name.endswith(".gguf") and not name.startswith("mmproj"))
        hint = f"; pull one of its GGUF files: {repo}/{ggufs[0]}" if ggufs else ""
        raise UnknownModelError(f"{repo} holds no safetensors{hint}.")
    return dict(sorted(wanted.items(), key=lambda item: item[1]))


def _check_room(folder: Path, needed: int) -> None:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"The files need {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free under {there}; "
            "make room, or set HF_HOME to a folder on another disk."
        )


class _Meter:
    """Adds up the progress of several files; each `bar` has as much of tqdm's face as the Hub's client uses."""

    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self._total = total
        self._progress = progress
        self._before = 0
        self._file = 0

    def bar(self, *, initial: int = 0, **_: Any) -> _Meter:
        self._file = 0
        self.update(initial)
        return self

    def update(self, count: float = 1) -> None:
        self._file += int(count)
        self._progress(min(self._before + self._file, self._total), self._total)

    def file_done(self, size: int) -> None:
        self._before, self._file = self._before + size, 0
        self._progress(self._before, self._total)

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def refresh(self) -> None:
        pass


@contextmanager
def _explained(name: str, repo: str, revision: str, file: str | None = None) -> Iterator[None]:
    """Failures of the Hub's client as one sentence with the remedy."""
    import httpx
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.GatedRepoError:
        raise AccessError(
            f"{repo} is gated: accept its licence at {page}, make a token at {constants.ENDPOINT}/settings/tokens "
            "and set HF_TOKEN to it."
        ) from None
    except errors.RevisionNotFoundError:
        raise UnknownModelError(f"{repo} has no revision {revision}; see {page}/commits/main.") from None
    except errors.RepositoryNotFoundError:
        otherwise = "check the spelling, and HF_TOKEN if it is private"
        raise UnknownModelError(f"The Hub shows no repository {repo}; {_hint(name, otherwise)}.") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise AccessError(
                f"The Hub refuses access to {repo} ({status}); set HF_TOKEN to a valid token from "
                f"{constants.ENDPOINT}/settings/tokens."
            ) from None
        raise NetworkError(f"The Hub answered {status} for {file or repo}; try again later.") from None
    except (httpx.ConnectError, httpx.ConnectTimeout, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise NetworkError(
            f"The Hub at {constants.ENDPOINT} can't be reached; check the network and HF_HUB_OFFLINE, "
            "or give the path of a folder that holds the checkpoint."
        ) from None
    except (httpx.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise InputError("The disk is full; make room, or set HF_HOME to a folder on another disk.") from None
        if isinstance(error, OSError) and error.filename is not None:
            raise InputError(
                f"{error.filename} can't be written ({error.strerror}); set HF_HOME to a folder of yours."
            ) from None
        raise NetworkError(
            f"The download of {file or repo} broke off; the same command again goes on where it stopped."
        ) from None


# What is here ---------------------------------------------------------------------------------------------------------


def cached() -> list[Cached]:
    """The family's checkpoints in the Hugging Face cache, by name."""
    cache = _cache()
    return [
        Cached(repo.repo_id, revision.commit_hash, revision.snapshot_path, revision.size_on_disk, complete)
        for repo in (cache.repos if cache else ())
        for revision in sorted(repo.revisions, key=lambda each: each.last_modified)
        if repo.repo_type == "model" and (complete := _is_ours(revision.snapshot_path)) is not None
    ]


def remove(name: str) -> int:
    """Delete a repository, or with `@revision` one commit of it, from the cache; returns the bytes set free.

    Raises:
        UnknownModelError: it isn't in the cache.
    """
    repo, revision, _ = parse(name)
    only = _cached_snapshot(repo, revision) if "@" in name else None
    cache = _cache()
    commits = [
        each.commit_hash
        for found in (cache.repos if cache else ())
        if found.repo_id == repo
        for each in found.revisions
        if "@" not in name or (only is not None and each.commit_hash == only.name)
    ]
    if cache is None or not commits:
        raise UnknownModelError(f"{name} isn't on this machine; see: cabochon list")
    strategy = cache.delete_revisions(*commits)
    freed = strategy.expected_freed_size
    strategy.execute()
    return int(freed)


def _cache() -> HFCacheInfo | None:
    """The Hugging Face cache; None on a fresh machine, which may be one where nothing can be written."""
    from huggingface_hub import constants, scan_cache_dir

    there = Path(constants.HF_HUB_CACHE).is_dir()
    return scan_cache_dir(constants.HF_HUB_CACHE) if there else None


def _is_ours(folder: Path) -> bool | None:
    """Whether a snapshot is complete; None if it is no checkpoint of the family."""
    if any(folder.glob("*.gguf")):
        return True if "gemma" in folder.parent.parent.name.lower() else None
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        return None
    try:
        return not missing_files(folder) if str(kind).startswith("gemma4") else None
    except CheckpointError:
        return False
