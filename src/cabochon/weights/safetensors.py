"""Tensors out of safetensors files, one at a time, straight into memory of their own.

The files are read, not mapped: a mapped tensor's pages count as the process's memory until the last of them is gone,
and a copy would have to follow anyway. So the peak is the model plus the one tensor that is being converted. What is
repacked at once, and tables of which a step needs a few rows, are better left in the file (`mapped`).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, brief
from ..ops.cpu import prefer_huge_pages
from .header import INDEX, SINGLE, Entry, expect, read_folder, read_header
from .params import Shape

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SHARD_BYTES = 5_000_000_000


class SafetensorsSource:
    """The tensors of a checkpoint folder or of one file."""

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self.entries: Mapping[str, Entry] = read_folder(path) if path.is_dir() else read_header(path)

    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def nbytes(self, name: str) -> int:
        return self.entries[name].nbytes

    def expect(self, name: str) -> None:
        entry = self.entries[name]
        expect(entry.file, entry.begin, entry.nbytes)

    def read(self, name: str) -> Tensor:
        """The tensor `name` in its stored type, in memory of its own."""
        entry = self._entry(name)
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        prefer_huge_pages(raw)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            view, done = raw.numpy().data, 0
            while done < entry.nbytes:
                got = file.readinto(view[done : done + (1 << 30)])  # one read call moves at most 2 GiB
                if not got:
                    raise CheckpointError(f"{entry.file} ended inside {name}; download it again")
                done += got
        return raw.view(DTYPES[entry.dtype]).view(entry.shape)

    def mapped(self, name: str) -> Tensor:
        """The tensor `name` where it lies in the file: what is never looked at takes no memory."""
        entry = self._entry(name)
        inside = entry.begin % mmap.ALLOCATIONGRANULARITY
        with entry.file.open("rb", buffering=0) as file:
            size, begin = inside + entry.nbytes, entry.begin - inside
            memory = mmap.mmap(file.fileno(), size, offset=begin, access=mmap.ACCESS_COPY)
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=entry.nbytes, offset=inside)
        return raw.view(DTYPES[entry.dtype]).view(entry.shape)

    def _entry(self, name: str) -> Entry:
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.file} keeps {name} as {brief(entry.dtype)}; known types are {', '.join(DTYPES)}"
            )
        return entry


def save(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `tensors` as one file, or as shards of about `shard_bytes` with an index, as `transformers` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    written: list[list[str]] = []
    size = total = 0

    def finish() -> None:
        # How many there will be, and so the name, is known at the end; but no more than one is ever in memory.
        save_file(shard, folder / _part(len(written)), metadata={"format": "pt"})
        written.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            finish()
            size = 0
        shard[name] = tensor.detach().cpu().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    finish()
    if len(written) == 1:
        (folder / _part(0)).replace(folder / SINGLE)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(written):
        final = f"model-{number + 1:05}-of-{len(written):05}.safetensors"
        (folder / _part(number)).replace(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _part(number: int) -> str:
    return f"part-{number:05}"
