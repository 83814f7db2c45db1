"""`cabochon quantize` and `inspect` over the bundled checkpoint: every format is written, loaded again and speaks."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cabochon import LLM, SamplingParams
from cabochon.chat.messages import Media, Message, Text
from cabochon.errors import InputError
from cabochon.hub import BUNDLED
from cabochon.llm.loading import load
from cabochon.quant import QuantTensor
from cabochon.weights import convert
from cabochon.weights.checkpoint import open_checkpoint
from support.media_files import wav
from support.speaking import save_seeing

CABOCHON = Path(sys.executable).parent / "cabochon"
COST = {"int8": 5e-3, "int4": 0.5, "gguf:q8_0": 5e-3, "gguf:q4_0": 0.5, "ct:w4a16": 0.5, "ct:fp8": 0.05}


def cabochon(*words):
    command = [CABOCHON, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("format", convert.FORMATS)
def test_every_format_is_written_and_speaks(tmp_path, format):
    out = tmp_path / ("m.gguf" if format.startswith("gguf:") else "m")
    convert.write(open_checkpoint(BUNDLED), out, format, "pebble")
    ids = LLM().tokenizer.encode("12 plus 30 is 42, and 42 minus 12 is 30.")
    there, here = LLM(out, dtype="float32"), LLM(dtype="float32")
    before, after = (llm.logits([2, *ids]).log_softmax(-1) for llm in (here, there))
    assert float((before.exp() * (before - after)).sum(-1).mean()) < COST.get(format, 1e-6)
    assert there.chat(
        [{"role": "user", "content": "Hello"}], params=SamplingParams(max_tokens=8)
    ).usage.completion_tokens


@pytest.mark.parametrize("size", ["E2B", "12B"])
def test_a_gguf_pair_sees(tmp_path, size):
    """What a picture and a sound do to the reply goes through the second file."""
    whole = save_seeing(tmp_path / "whole", size)
    convert.write(open_checkpoint(whole), tmp_path / "pair" / "m.gguf", "gguf:bf16", "toy")
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((96, 96)).convert("RGB").save(picture, "PNG")
    tone = np.sin(np.arange(8000) / 9)
    shown = Message("user", (Media("image", picture.getvalue()), Media("audio", wav(tone)), Text("What is this?")))
    loaded = [load(path, dtype="float32") for path in (whole, tmp_path / "pair")]
    asked = [LLM.of(each).front.chat([shown]).request for each in loaded]
    assert asked[0].token_ids == asked[1].token_ids
    assert [span.length for span in asked[0].spans] == [span.length for span in asked[1].spans]
    for span in asked[0].spans:
        (before,), (after,) = (each.model.encode([span.item]) for each in loaded)
        assert (after - before).norm() < 0.03 * before.norm()  # a dozen roundings of 2**-9 on the way


def test_our_own_folder_is_loaded_as_it_lies(tmp_path):
    convert.write(open_checkpoint(BUNDLED), tmp_path / "m", "int4", "pebble")
    stored = load(tmp_path / "m", dtype="bfloat16").model.language_model.layers[0].mlp.up_proj.weight
    direct = load(BUNDLED, dtype="bfloat16", quantization="int4").model.language_model.layers[0].mlp.up_proj.weight
    assert isinstance(stored, QuantTensor)
    assert torch.equal(stored.codes, direct.codes)
    assert torch.equal(stored.scales, direct.scales)


def test_the_command_checks_what_it_wrote(tmp_path):
    done = cabochon("quantize", BUNDLED, tmp_path / "m.gguf", "--format", "gguf:q8_0")
    assert done.returncode == 0, done.stderr
    assert "mean KL to the original" in done.stdout
    looked = cabochon("inspect", tmp_path / "m.gguf")
    assert looked.returncode == 0, looked.stderr
    assert "Q8_0" in looked.stdout
    again = cabochon("quantize", BUNDLED, tmp_path / "m.gguf", "--format", "gguf:q8_0")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(InputError, match="int8, int4, gguf:bf16"):
        convert.write(open_checkpoint(BUNDLED), tmp_path / "m", "nf4", "pebble")


def test_the_page_says_what_every_format_costs():
    """`benchmarks/quantised_quality.py --write` was run since a format was added."""
    page = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `([\w:]+)` \| [\d.]+ \| \d", page, re.MULTILINE))
    assert told == {"bfloat16", *convert.FORMATS, "nf4"}
