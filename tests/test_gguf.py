"""The GGUF container: equal to the format's own reader and writer, and calm in the face of damaged files."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from cabochon.errors import CheckpointError
from cabochon.weights.gguf import read_gguf, write_gguf
from cabochon.weights.gguf_blocks import BY_NAME

METADATA = {
    "general.architecture": "toy",
    "toy.size": 7,
    "toy.ratio": 0.5,
    "toy.on": True,
    "toy.words": ["a", "bé", ""],
}


def write_toy(path: Path, **more) -> dict[str, torch.Tensor]:
    tensors = {"a.weight": torch.randn(6, 64), "b.weight": torch.randn(3), "c.weight": torch.randn(2, 3, 32)}
    kinds = {"a.weight": "Q4_0", "b.weight": "F32", "c.weight": "Q8_0"}
    rows = [(n, tuple(t.shape), BY_NAME[kinds[n]], lambda t=t: t) for n, t in tensors.items()]
    write_gguf(path, METADATA | more, rows)
    return tensors


def test_what_we_write_the_formats_own_reader_reads(tmp_path):
    tensors = write_toy(tmp_path / "toy.gguf")
    theirs = gguf.GGUFReader(tmp_path / "toy.gguf")
    assert {t.name: tuple(int(n) for n in t.shape)[::-1] for t in theirs.tensors} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    ours = read_gguf(tmp_path / "toy.gguf")
    assert dict(ours.metadata) == METADATA
    for t in theirs.tensors:
        expected = gguf.quants.dequantize(t.data, t.tensor_type).reshape(ours.tensors[t.name].shape)
        np.testing.assert_array_equal(ours.tensors[t.name].dequantize().numpy(), expected)


def test_what_the_formats_own_writer_writes_we_read(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "toy")
    writer.add_array("toy.pattern", [True, False])
    writer.add_array("toy.names", ["x", "y"])
    writer.add_float64("toy.wide", 0.1)
    x = np.random.default_rng().normal(size=(4, 256)).astype(np.float32)
    writer.add_tensor("x", x)
    raw = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("x8", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = read_gguf(path)
    assert ours.metadata["toy.pattern"] == [True, False]
    assert ours.metadata["toy.names"] == ["x", "y"]
    assert ours.metadata["toy.wide"] == 0.1
    np.testing.assert_array_equal(ours.tensors["x"].dequantize().numpy(), x)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(ours.tensors["x8"].dequantize().numpy(), expected)


def test_split_files_are_one(tmp_path):
    parts = [tmp_path / f"toy-{i + 1:05}-of-00002.gguf" for i in range(2)]
    for i, part in enumerate(parts):
        kind = BY_NAME["F32"]
        split = {"split.no": i, "split.count": 2, "split.tensors.count": 2}
        write_gguf(part, METADATA | split, [(f"t{i}", (2,), kind, lambda i=i: torch.full((2,), float(i)))])
    for part in parts:
        assert [t.dequantize().tolist() for t in read_gguf(part).tensors.values()] == [[0, 0], [1, 1]]
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"toy-00002-of-00002\.gguf is missing"):
        read_gguf(parts[0])


def test_mutated_files_cost_one_sentence(tmp_path):
    """Truncations, flipped bytes, huge counts: readable or refused, never a crash, never more memory than the file."""
    write_toy(tmp_path / "toy.gguf")
    whole = (tmp_path / "toy.gguf").read_bytes()
    rng = random.Random(0)
    refused = 0
    for i in range(500):
        data = bytearray(whole)
        match i % 4:
            case 0:
                data = data[: rng.randrange(1, len(data))]
            case 1:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case 2:
                at = rng.randrange(0, len(data) - 8)
                data[at : at + 8] = struct.pack("<Q", rng.choice([2**63, 2**40, 2**64 - 1, 0]))
            case 3:
                at = rng.randrange(4, 400)
                data[at : at + 4] = struct.pack("<I", rng.randrange(2**32))
        (tmp_path / "bad.gguf").write_bytes(data)
        try:
            for tensor in read_gguf(tmp_path / "bad.gguf").tensors.values():
                tensor.dequantize()
        except CheckpointError as error:
            refused += 1
            assert str(error).count("\n") == 0
    assert refused > 250


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (b"GGML", "does not start with GGUF"),
        (b"GGUF\0\0\0\3", "big-endian"),
        (b"GGUF\1\0\0\0", "version 1"),
        (b"", "mapped"),
    ],
)
def test_other_files_are_named(tmp_path, start, sentence):
    (tmp_path / "x.gguf").write_bytes(start + b"\0" * 32 if start else b"")
    with pytest.raises(CheckpointError, match=sentence):
        read_gguf(tmp_path / "x.gguf")
