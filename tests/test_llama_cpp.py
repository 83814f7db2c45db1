"""Files exchanged with llama.cpp itself. Optional: set CABOCHON_LLAMA_CPP to the root of a llama-cpp-python source
distribution, CABOCHON_LLAMA_CPP_BUILD to where its llama.cpp was built (shared libraries and llama-quantize)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cabochon.chat.tokenizer import Tokenizer
from cabochon.config import read_config
from cabochon.hub import BUNDLED
from cabochon.llm import LLM
from cabochon.llm.loading import build
from cabochon.model.batch import whole_sequences
from cabochon.model.drafter import Drafter
from cabochon.weights.checkpoint import open_checkpoint
from cabochon.weights.gguf import read_gguf
from cabochon.weights.gguf_write import save_gguf, save_towers
from cabochon.weights.load import fill, save
from support.toys import calm_, random_ids, save_toy, toy_drafter_json, toy_model

SOURCES, BUILT = os.environ.get("CABOCHON_LLAMA_CPP"), os.environ.get("CABOCHON_LLAMA_CPP_BUILD")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SOURCES and BUILT), reason="CABOCHON_LLAMA_CPP and CABOCHON_LLAMA_CPP_BUILD are not set"),
]
SIZES = ["E2B", "31B", "26B-A4B"]
TYPES = ["BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q3_K_S", "Q2_K"]
ROUNDING = 2e-4
"""Mean KL in nats per token: llama.cpp rounds activations to 8 bits, we don't here."""


def shape(size):
    """A toy whose rows hold blocks of 256, over the bundled vocabulary."""
    words = len(Tokenizer.from_file(BUNDLED))
    text = {"hidden_size": 256, "head_dim": 64, "global_head_dim": 128, "vocab_size": words, "intermediate_size": 512}
    if size == "E2B":
        text |= {"vocab_size_per_layer_input": words, "hidden_size_per_layer_input": 256}
    if size == "26B-A4B":
        text |= {"moe_intermediate_size": 256}
    return text


def wide():
    """Ten layers of E2B in its true widths, five of which share keys and values, over the bundled vocabulary."""
    words = len(Tokenizer.from_file(BUNDLED))
    widths = {"hidden_size": 1536, "intermediate_size": 6144, "head_dim": 256, "global_head_dim": 512}
    per_layer = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": words}
    return widths | per_layer | {"vocab_size": words, "num_attention_heads": 8, "sliding_window": 512}


def ours(path, ids):
    opened = open_checkpoint(path)
    model = build(opened.config, opened.source, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return model(whole_sequences([torch.tensor(ids)])).log_softmax(-1)


def theirs(path, ids):
    code = (
        "import sys, numpy, llama_cpp; path, out, *ids = sys.argv[1:]; "
        "model = llama_cpp.Llama(path, n_ctx=128, logits_all=True, verbose=True, n_threads=1); "
        "model.eval([int(i) for i in ids]); numpy.save(out, model.scores[: len(ids)])"
    )
    out = path.with_suffix(".npy")
    env = os.environ | {"LLAMA_CPP_LIB_PATH": f"{BUILT}/bin", "PYTHONPATH": SOURCES}
    command = [sys.executable, "-c", code, str(path), str(out), *map(str, ids)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    import numpy

    return torch.from_numpy(numpy.load(out))


def distance(a, b):
    return float((a.exp() * (a - b)).sum(-1).mean())


def some_ids():
    return [2] + [i % 3000 + 300 for i in random_ids(60)]


@pytest.mark.parametrize("format", ["bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("size", SIZES)
def test_our_files_run_there(tmp_path, size, format):
    model = toy_model(size, **shape(size))
    path, words = tmp_path / "toy.gguf", (BUNDLED / "tokenizer.json").read_text()
    save_gguf(path, model.config, model.state_dict().__getitem__, format, tokenizer_json=words)
    ids = some_ids()
    kl = distance(ours(path, ids), theirs(path, ids).log_softmax(-1))
    print(f"{size} {format}: KL to llama.cpp {kl:.1e}")
    assert kl < ROUNDING


def test_errors_of_logits_beside_theirs(tmp_path):
    """Weights and activations rounded as each engine runs them, beside the float32 network they were made from.

    In bfloat16 both round what goes into a product; they store keys and values with three bits more than we do.
    """
    folder = save_toy(tmp_path / "exact", "E2B", dtype=torch.bfloat16, **wide())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    whole = open_checkpoint(folder)
    exact = build(whole.config, whole.source, torch.device("cpu"), torch.float32)
    ids = some_ids()
    with torch.no_grad():
        true = exact(whole_sequences([torch.tensor(ids)]))

    def error(logits):
        return float((logits - true).norm() / true.norm())

    words = (BUNDLED / "tokenizer.json").read_text()
    for native, file in (("bfloat16", "bf16"), ("int8", "q8_0"), ("int4", "q4_0")):
        path = tmp_path / f"{file}.gguf"
        save_gguf(path, whole.config, exact.state_dict().__getitem__, file, tokenizer_json=words)
        made = LLM(folder, device="cpu", quantization=None if native == "bfloat16" else native)
        here, read = error(made.logits(ids)), error(LLM(path, device="cpu", dtype="bfloat16").logits(ids))
        there = error(theirs(path, ids))
        print(f"{native}: {here:.2e}; {file} {read:.2e}, by llama.cpp {there:.2e}")
        of_file, of_ours = (
            (1.5, 1.5) if native == "bfloat16" else (1.05, 1.5)
        )  # int8 has a scale per row, int4's head 4 bits
        assert read < of_file * there and here < of_ours * there


@pytest.mark.parametrize("size", SIZES)
def test_their_files_run_here(tmp_path, size):
    """Written by llama.cpp's converter, quantised by llama-quantize."""
    folder = save_toy(tmp_path / "hf", size, **shape(size))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    whole = tmp_path / "whole.gguf"
    converter = Path(SOURCES) / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    run(sys.executable, converter, folder, "--outtype", "f32", "--outfile", whole)
    ids = some_ids()
    for kind in TYPES:
        path = tmp_path / f"{kind}.gguf"
        run(Path(BUILT) / "bin" / "llama-quantize", "--pure", whole, path, kind)
        kl = distance(ours(path, ids), theirs(path, ids).log_softmax(-1))
        print(f"{size} {kind}: KL to llama.cpp {kl:.1e}")
        assert kl < 10 * ROUNDING


@pytest.mark.parametrize("size", ["E2B", "12B", "31B"])
def test_their_towers_and_ours_are_the_same(tmp_path, size):
    """The converter's mmproj file gives back the checkpoint, and ours has its names, shapes and values."""
    folder = save_toy(tmp_path / "hf", size, media=True, **shape(size))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    converter = Path(SOURCES) / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    run(sys.executable, converter, folder, "--mmproj", "--outtype", "f32", "--outfile", tmp_path / "mmproj-theirs.gguf")
    whole = open_checkpoint(folder)
    exact = build(whole.config, whole.source, torch.device("cpu"), torch.float32).state_dict()
    words = (BUNDLED / "tokenizer.json").read_text()
    save_gguf(tmp_path / "text.gguf", whole.config, exact.__getitem__, "bf16", tokenizer_json=words)
    pair = open_checkpoint(tmp_path / "text.gguf")
    assert (pair.config.vision, pair.config.audio) == (whole.config.vision, whole.config.audio)
    read = build(pair.config, pair.source, torch.device("cpu"), torch.float32).state_dict()
    towers = [name for name in exact if not name.startswith("language_model.")]
    for name in towers:
        torch.testing.assert_close(read[name], exact[name], rtol=1e-6, atol=1e-6, msg=name)
    save_towers(tmp_path / "ours.gguf", whole.config, exact.__getitem__)
    theirs, ours = (read_gguf(tmp_path / name) for name in ("mmproj-theirs.gguf", "ours.gguf"))
    assert {n: t.shape for n, t in ours.tensors.items()} == {n: t.shape for n, t in theirs.tensors.items()}
    for name, tensor in ours.tensors.items():
        torch.testing.assert_close(tensor.dequantize(), theirs.tensors[name].dequantize(), rtol=2**-8, atol=1e-6)
    said = {k: v for k, v in theirs.metadata.items() if k.startswith("clip.")}
    assert {k: ours.metadata.get(k) for k in said} == said
    print(f"{size}: {len(theirs.tensors)} tensors")


@pytest.mark.parametrize("size", ["E2B", "26B-A4B", "31B"])
def test_their_drafters_are_read(tmp_path, size):
    """Every tensor of the converter's file is the checkpoint's; it leaves clusters out, and can't take a toy 12B."""
    raw = toy_drafter_json(size)
    drafter = calm_(Drafter(read_config(raw)))
    save(tmp_path, drafter, drafter.config)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((BUNDLED / name).read_bytes())
    converter = Path(SOURCES) / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    run(sys.executable, converter, tmp_path, "--outtype", "f32", "--outfile", tmp_path / "theirs.gguf")
    opened = open_checkpoint(tmp_path / "theirs.gguf")
    assert opened.config.text == drafter.config.text
    with torch.device("meta"):
        again = Drafter(opened.config)
    fill(again, opened.source, opened.config, dtype=torch.float32)
    whole = drafter.state_dict()
    assert {name for name in whole if not name.startswith("masked_embedding.")} == again.state_dict().keys()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, whole[name]), name


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
