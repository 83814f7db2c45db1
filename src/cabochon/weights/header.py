"""The header of safetensors files, without torch: what a file holds and where, and how long a header will be.

A file is `8 bytes length | JSON of that length | tensors`. Everything is checked against the bytes that are really
there before anything is read, because a broken download is the commonest fault of all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, brief

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """What the file at `path` holds. Raises `CheckpointError` when it is truncated or no safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path} is cut off or no safetensors file ({size:,} bytes); download it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}); download the checkpoint again") from error
    except ValueError as error:
        raise CheckpointError(f"{path} has a damaged header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header (no object); download it again")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, item, 8 + length) for name, item in header.items()}
    end = max((entry.begin + entry.nbytes for entry in entries.values()), default=8 + length)
    if end > size:
        raise CheckpointError(f"{path} is cut off: {size:,} bytes of {end:,}; download it again")
    return entries


def read_folder(folder: Path) -> dict[str, Entry]:
    """What all safetensors files of a checkpoint hold: one file, or the shards that the index lists."""
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return read_header(folder / SINGLE)
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}; download the checkpoint again")
    try:
        places: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = sorted({Path(shard).name for shard in places.values()})  # a name, never a way out of the folder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error}); download it again") from error
    if missing := [shard for shard in shards if not (folder / shard).exists()]:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX} lists; download the checkpoint again"
        )
    entries: dict[str, Entry] = {}
    for shard in shards:
        entries |= read_header(folder / shard)
    if lost := [name for name in places if name not in entries]:
        raise CheckpointError(f"{INDEX} lists {lost[0]} and {len(lost) - 1} more tensors that no shard holds")
    return entries


def expect(file: Path, begin: int, nbytes: int) -> None:
    """Have the system start reading a part of a file that is wanted soon; where it can't be asked, nothing happens."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), begin, nbytes, os.POSIX_FADV_WILLNEED)


def file_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> int:
    """Size of the file that holds `tensors` (name, dtype like "BF16", shape), header included.

    Layout of the reference writer: wide types first, then by name; the header is padded with blanks to a multiple of 8.
    """
    rows = sorted(tensors, key=lambda row: (-ITEM_BYTES[row[1]], row[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, dtype, shape in rows:
        end = at + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + math.ceil(length / 8) * 8 + at


def _entry(path: Path, name: str, item: Any, base: int) -> Entry:
    try:
        dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        nbytes = ITEM_BYTES[dtype] * math.prod(shape) if dtype in ITEM_BYTES else None
        sound = begin >= 0 and end >= begin and all(isinstance(n, int) and n >= 0 for n in shape)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes {name} wrongly ({error}); download it again") from error
    if not sound or (nbytes is not None and nbytes != end - begin):
        kind = dtype if dtype in ITEM_BYTES else brief(dtype)
        raise CheckpointError(f"{path} describes {name} wrongly: {kind} {brief(list(shape))} in {end - begin} bytes")
    return Entry(path, dtype, shape, base + begin, end - begin)
