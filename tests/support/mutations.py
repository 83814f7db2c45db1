"""Checkpoints with one thing wrong, loaded in a process of little memory.

    python -m support.mutations KIND COUNT SEED

prints one JSON object: how many were refused, how many loaded all the same, and what went wrong otherwise.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cabochon.chat.tokenizer import Tokenizer
from cabochon.errors import CabochonError
from cabochon.hub import BUNDLED
from cabochon.llm.loading import build, tokenizer_of
from cabochon.weights.checkpoint import Checkpoint, open_checkpoint
from cabochon.weights.compressed import save_compressed
from cabochon.weights.convert import write
from cabochon.weights.gguf import read_gguf, write_gguf
from cabochon.weights.gguf_blocks import BY_NAME
from cabochon.weights.gguf_write import save_gguf, save_towers
from cabochon.weights.load import save
from cabochon.weights.params import parameters
from support.toys import save_toy, toy_model

ROOM = 512 << 20
"""Bytes of address space beyond what the process has when it begins."""
_NASTY: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "F32", "BF16", "U8", "F8_E8M0", "F128", "../../etc/passwd", "a\nb", "é" * 500),
    *([], {}, [[]], [1, 2], [-1], [2**40, 2**40], [0, 8], ["x"], {"a": 1}, [None] * 1000),
]


def plain(folder: Path) -> Path:
    return save_toy(folder, "E2B", dtype=torch.bfloat16)


def sharded(folder: Path) -> Path:
    model = toy_model("E2B", dtype=torch.bfloat16)
    save(folder, model, model.config, shard_bytes=30_000)
    return folder


def compressed(folder: Path) -> Path:
    model = toy_model("31B", hidden_size=64, intermediate_size=64)
    weights = model.state_dict()
    save_compressed(folder, model.config, ((p, weights[p.name]) for p in parameters(model.config)), "w4a16")
    return folder


def own(folder: Path) -> Path:
    write(open_checkpoint(plain(folder / "plain")), folder / "own", "int4", "toy")
    return folder / "own"


def gguf(folder: Path) -> Path:
    model = toy_model("31B", media=True, vocab_size=len(Tokenizer.from_file(BUNDLED)))
    folder.mkdir()
    words, weight = (BUNDLED / "tokenizer.json").read_text(), model.state_dict().__getitem__
    save_gguf(folder / "toy.gguf", model.config, weight, "q8_0", tokenizer_json=words)
    save_towers(folder / "mmproj-toy.gguf", model.config, weight)
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {f.__name__: f for f in (plain, sharded, compressed, own, gguf)}


def load(folder: Path) -> Checkpoint:
    """All that loading does with a file: header, config, every tensor."""
    found = open_checkpoint(folder)
    build(found.config, found.source, torch.device("cpu"), torch.float32)
    tokenizer_of(found, folder.name)
    return found


def bend(value: Any, rng: random.Random) -> Any:
    """`value` with one member, however deep, replaced, removed or renamed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(_NASTY)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [bend(item, rng) if i == at else item for i, item in enumerate(value)]
    key = rng.choice(list(value))
    match rng.randrange(6):
        case 0:
            return {k: v for k, v in value.items() if k != key}
        case 1:
            return {("x" + k if k == key else k): v for k, v in value.items()}
        case 2:
            return value | {key: value[rng.choice(list(value))]}
    return value | {key: bend(value[key], rng)}


def bend_json(path: Path, rng: random.Random) -> None:
    content = json.loads(path.read_text())
    part = content
    if "quantization_config" in content and rng.random() < 0.7:
        part = content["quantization_config"]
        content["quantization_config"] = bend(part, rng)
    else:
        content = bend(content, rng)
    path.write_text(json.dumps(content))


def bend_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    match rng.randrange(4):
        case 0:
            data = data[: rng.randrange(len(data))]
        case 1:
            for _ in range(rng.choice([1, 8])):
                data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
        case 2:
            at = rng.choice([0, 4, 8, 16, rng.randrange(min(len(data), 4000) - 8)])
            data[at : at + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice([2**63, 2**40, 2**64 - 1, 2**20, 0]))
        case 3:
            data = bytearray(data[:8][::-1]) + data[8:]
    path.write_bytes(bytes(data))


def bend_header(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    new = json.dumps(bend(header, rng)).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def bend_metadata(path: Path, rng: random.Random) -> None:
    """Another value, of any type that the format knows, under one of the keys."""
    file = read_gguf(path)
    nasty = [value for value in _NASTY if isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**63)]
    lists = [[], [2**62, -1], ["x", "y"], [True], [1.5] * 3, [0] * 6]
    metadata = dict(file.metadata) | {rng.choice(list(file.metadata)): rng.choice([*nasty, *lists])}
    f32 = BY_NAME["F32"]
    other = path.with_suffix(".new")  # the tensors are still mapped from the old one
    write_gguf(other, metadata, [(t.name, t.shape, f32, t.dequantize) for t in file.tensors.values()])
    other.replace(path)


def mutate(folder: Path, rng: random.Random) -> str:
    """Spoil one file of a checkpoint; says how."""
    file = rng.choice(sorted(folder.iterdir()))
    ways = {
        ".json": (bend_json, bend_bytes),
        ".safetensors": (bend_header, bend_bytes),
        ".gguf": (bend_metadata, bend_bytes),
    }
    way = rng.choices(ways[file.suffix], weights=(3, 1))[0]
    way(file, rng)
    return f"{way.__name__} {file.name}"


def main(kind: str, count: int, seed: int) -> dict[str, Any]:
    rng, seen, faults = random.Random(f"{kind}{seed}"), Counter[str](), []
    with tempfile.TemporaryDirectory() as place:
        whole = KINDS[kind](Path(place) / "whole")
        load(whole)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
        for i in range(count):
            spoiled = Path(place) / "spoiled"
            shutil.copytree(whole, spoiled)
            how = mutate(spoiled, rng)
            try:
                load(spoiled)
                seen["loaded"] += 1
            except CabochonError as error:
                seen["refused"] += 1
                if "\n" in str(error) or len(str(error)) > 3000:
                    faults.append(f"{i}, {how}: not a sentence: {str(error)[:300]!r}")
            except BaseException:
                faults.append(f"{i}, {how}: {''.join(traceback.format_exc()[-700:])}")
            shutil.rmtree(spoiled)
    return {**seen, "faults": faults}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
