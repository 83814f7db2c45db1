"""The GGUF container, versions 2 and 3, little-endian: metadata and memory-mapped tensors, split files included.

A file is untrusted: every count, length and offset is checked against the bytes that are really there before anything
is allocated, so a damaged or hostile file costs one sentence and no memory. Strings are decoded strictly as UTF-8.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .gguf_blocks import BLOCK_TYPES, BlockType

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One stored tensor. `shape` is in torch's order (rows first), the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    raw: np.ndarray[Any, np.dtype[np.uint8]]
    """A view into the map; nothing is read until it is touched."""
    file: Path
    begin: int
    """Offset of its first byte in the file."""

    def blocks(self) -> Tensor:
        """[blocks, bytes per block] uint8, still mapped."""
        return torch.from_numpy(self.raw).view(-1, self.kind.bytes)

    def dequantize(self) -> Tensor:
        """The values as float32 of `shape`; reads and expands 64 Ki blocks at a time."""
        blocks = self.blocks()
        out = torch.empty(blocks.shape[0], self.kind.values)
        for top in range(0, blocks.shape[0], 1 << 16):
            part = slice(top, top + (1 << 16))
            out[part] = self.kind.dequantize(blocks[part])
        return out.view(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What a GGUF file (with its further parts, if it is split) says and holds."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """Map a GGUF file; of a split one any part may be named.

    Raises CheckpointError when the file is damaged, big-endian, of another version or misses a part.
    """
    path = Path(path)
    first = _read_part(path)
    count = first.metadata.get("split.count", 1)
    if count == 1:
        return first
    tensors: dict[str, GGUFTensor] = {}
    metadata: Mapping[str, Any] = first.metadata
    for i, part in enumerate(_part_paths(path, count)):
        piece = first if part == path else _read_part(part)
        if piece.metadata.get("split.no") != i:
            raise CheckpointError(f"{part} says it is part {piece.metadata.get('split.no')} of a split, not part {i}.")
        metadata = piece.metadata if i == 0 else metadata
        tensors |= piece.tensors
    expected = metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise CheckpointError(
            f"The parts of {path} hold {len(tensors)} tensors, but the first one announces {expected}."
        )
    return GGUFFile(metadata, tensors)


def _part_paths(path: Path, count: int) -> list[Path]:
    named = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not named or int(named[2]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, but its name does not end in -00001-of-{count:05}.gguf; restore the name."
        )
    paths = [path.with_name(f"{named[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise CheckpointError(f"{path} is split and {', '.join(missing)} is missing; put all parts in one folder.")
    return paths


def _read_part(path: Path) -> GGUFFile:
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be mapped: {error}.") from None
    try:
        return _Cursor(path, data).file()
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file ({error}); download it again.") from None


class _Cursor:
    """A position in the header of one file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}; download it again.")

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def count(self, smallest: int, what: str) -> int:
        """A 64-bit count of things that take at least `smallest` bytes each and so must fit in the rest of the file."""
        value: int = self.scalar("<Q")
        if value * smallest > len(self.data) - self.at:
            raise self.fail(f"{value} {what} can't fit in the {len(self.data) - self.at} bytes that follow")
        return value

    def string(self) -> str:
        length = self.count(1, "bytes of a string")
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 1:
            raise self.fail(f"a metadata value has the unknown type {kind}")
        inner = self.scalar("<I")
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner])
            length = self.count(size, "array values")
            self.at += length * size
            dtype = np.dtype("?" if inner == 7 else _SCALARS[inner])
            return np.frombuffer(self.data, dtype, length, self.at - length * size).tolist()
        return [self.value(inner, depth + 1) for _ in range(self.count(8, "array values"))]

    def file(self) -> GGUFFile:
        if bytes(self.data[:4]) != MAGIC:
            raise CheckpointError(f"{self.path} does not start with GGUF; it is another kind of file.")
        self.at = 4
        version = self.scalar("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            why = "is big-endian" if swapped else f"has version {version}"
            raise CheckpointError(f"{self.path} {why}; little-endian GGUF versions 2 and 3 are read. Convert it again.")
        tensor_count = self.count(24, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(self.count(13, "metadata entries")):
            key = self.string()
            metadata[key] = self.value(self.scalar("<I"))
        infos = [self.info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"the alignment {alignment!r} is no power of two")
        return GGUFFile(metadata, self.tensors(infos, -(-self.at // alignment) * alignment, alignment))

    def info(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self.string()
        dimensions = self.scalar("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.fail(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.scalar("<Q") for _ in range(dimensions))[::-1]
        number, offset = self.scalar("<I"), self.scalar("<Q")
        if number not in BLOCK_TYPES:
            known = ", ".join(t.name for t in BLOCK_TYPES.values())
            raise CheckpointError(f"{self.path}: tensor {name!r} has the type {number}, which is not one of {known}.")
        kind = BLOCK_TYPES[number]
        if 0 in shape or shape[-1] % kind.values:
            raise self.fail(f"tensor {name!r} of type {kind.name} has rows of {shape[-1]} values, shape {shape}")
        return name, shape, kind, offset

    def tensors(
        self, infos: Sequence[tuple[str, tuple[int, ...], BlockType, int]], start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        found: dict[str, GGUFTensor] = {}
        bytes_of = np.frombuffer(self.data, np.uint8)
        end = 0
        for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
            size = math.prod(shape) // kind.values * kind.bytes
            if name in found:
                raise self.fail(f"tensor {name!r} is listed twice")
            if offset % alignment or offset < end:
                raise self.fail(f"tensor {name!r} starts at offset {offset}, inside another tensor or unaligned")
            end = offset + size
            if start + end > len(self.data):
                raise self.fail(f"tensor {name!r} ends {start + end - len(self.data)} bytes after the file does")
            found[name] = GGUFTensor(
                name, shape, kind, bytes_of[start + offset : start + end], self.path, start + offset
            )
        return found


# Writing ------------------------------------------------------------------------------------------------------------


ToWrite = tuple[str, tuple[int, ...], BlockType, Callable[[], Tensor]]
"""A tensor to write: name, shape, type, and the function that fetches its values when their turn comes."""


def write_gguf(path: str | Path, metadata: Mapping[str, Any], tensors: Sequence[ToWrite], alignment: int = 32) -> None:
    """Stream one version 3 file; one tensor is in memory at a time."""
    with Path(path).open("wb") as out:
        out.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            out.write(_pack_string(key) + _pack_value(value))
        offset = 0
        for name, shape, kind, _ in tensors:
            out.write(_pack_string(name) + struct.pack("<I", len(shape)))
            out.write(struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", kind.number, offset))
            size = math.prod(shape) // kind.values * kind.bytes
            offset += -(-size // alignment) * alignment
        for _, _, kind, values in tensors:
            out.write(b"\0" * (-out.tell() % alignment))
            assert kind.quantize is not None, f"{kind.name} is read-only"
            out.write(kind.quantize(values().float().reshape(-1, kind.values)).numpy().tobytes())
        out.write(b"\0" * (-out.tell() % alignment))


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _type_of(value: Any) -> int:
    """The metadata type that a Python value is written as; integers as uint32 where they fit, as llama.cpp expects."""
    match value:
        case bool():
            return 7
        case int():
            return 4 if 0 <= value < 2**32 else 5 if -(2**31) <= value < 0 else 11
        case float():
            return 6
        case str():
            return _STRING
        case list():
            return _ARRAY
    raise TypeError(f"GGUF metadata can't hold {type(value).__name__}")


def _pack_value(value: Any) -> bytes:
    kind = _type_of(value)
    if kind == _STRING:
        return struct.pack("<I", kind) + _pack_string(value)
    if kind == _ARRAY:
        # Lists of integers are signed: llama.cpp refuses token types of any other kind.
        inner = max((5 if _type_of(v) == 4 and v < 2**31 else _type_of(v) for v in value), default=5)
        body = b"".join(_pack_string(v) if inner == _STRING else struct.pack(_SCALARS[inner], v) for v in value)
        return struct.pack("<IIQ", kind, inner, len(value)) + body
    return struct.pack("<I", kind) + struct.pack(_SCALARS[kind], value)
