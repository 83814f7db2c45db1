"""`cabochon quantize` and `inspect` over the bundled checkpoint: every format is written, loaded again and speaks."""

import gc
import io
import json
import re
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cabochon import LLM, SamplingParams, evaluate
from cabochon.chat.messages import Media, Message, Text
from cabochon.errors import InputError
from cabochon.hub import BUNDLED
from cabochon.llm.loading import load
from cabochon.llm.prepare import prepare
from cabochon.model.batch import whole_sequences
from cabochon.quant import QuantTensor
from cabochon.weights import convert, safetensors
from cabochon.weights.checkpoint import open_checkpoint
from support.media_files import wav
from support.speaking import save_seeing

COST = {"int8": 5e-3, "int4": 0.5, "gguf:q8_0": 5e-3, "gguf:q4_0": 0.5, "ct:w4a16": 0.5, "ct:fp8": 0.05}


def cabochon(*words):
    command = [sys.executable, "-m", "cabochon", *map(str, words)]
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


def test_calibrating_moves_predictions_less_and_writes_the_same_bytes_again(tmp_path):
    """Conversations of the package, answered by the model; the file differs from a plain one in numbers only."""
    words = ("--calibrate", "pebble", "--calibrate-tokens", "16000")
    for name, more in (("plain", ()), ("first", words), ("again", words)):
        done = cabochon("quantize", "pebble", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    plain, first, again = (tmp_path / name / "model.safetensors" for name in ("plain", "first", "again"))
    assert first.read_bytes() == again.read_bytes() != plain.read_bytes()
    assert first.stat().st_size == plain.stat().st_size
    assert (tmp_path / "first/config.json").read_bytes() == (tmp_path / "plain/config.json").read_bytes()
    # What is read are 1 in 60 of the exercises: these are nearly all others.
    exercises = evaluate.read_tasks(evaluate.BUNDLED_TASKS)[::100]
    template = LLM().front.template
    batch = whole_sequences([torch.tensor(template.render(e.messages).token_ids[:300]) for e in exercises])
    with torch.inference_mode():
        exact, alone, together = (
            load(path, dtype="float32").model(batch).log_softmax(-1)
            for path in (BUNDLED, tmp_path / "plain", tmp_path / "first")
        )
    assert float((exact.exp() * (exact - together)).sum()) < 0.7 * float((exact.exp() * (exact - alone)).sum())


def test_a_drafter_is_not_calibrated(tmp_path):
    done = cabochon("quantize", BUNDLED / "drafter", tmp_path / "out", "--calibrate", "pebble")
    assert done.returncode == 2
    assert "a drafter reads its model's state" in done.stderr


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_drafter_is_written_and_loaded_as_it_lies(tmp_path, format):
    done = cabochon("quantize", BUNDLED / "drafter", tmp_path / "d", "--format", format)
    assert done.returncode == 0 and "no guess changes a reply" in done.stdout, done.stderr
    stored = load(BUNDLED, dtype="bfloat16", drafter=tmp_path / "d").drafter
    direct = load(BUNDLED, dtype="bfloat16", drafter="auto", quantization=format).drafter
    for module in ("layers.0.mlp.up_proj", "layers.3.self_attn.q_proj", "pre_projection"):
        mine, its = (drafter.get_submodule(module).weight for drafter in (stored, direct))
        assert mine.format == its.format == format
        assert torch.equal(mine.codes, its.codes) and torch.equal(mine.scales, its.scales)
    llm, greedy = LLM(BUNDLED, drafter=tmp_path / "d"), SamplingParams(temperature=0, max_tokens=60)
    ask = [{"role": "user", "content": "What is 347 + 285?"}]
    llm.front.engine.speculator.count = lambda tracks: 3
    assert llm.chat(ask, thinking=True, params=greedy) == LLM(BUNDLED).chat(ask, thinking=True, params=greedy)
    assert llm.front.engine.stats.accepted > 5


def test_a_drafter_is_not_written_for_vllm(tmp_path):
    with pytest.raises(InputError, match="ct:fp8 is for models; a drafter can be written as int8, int4 or gguf"):
        convert.write(open_checkpoint(BUNDLED / "drafter"), tmp_path / "d", "ct:fp8", "d")


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


@pytest.mark.parametrize("format", ["int4", "gguf:q8_0", "ct:fp8"])
def test_what_could_not_be_written_whole_leaves_nothing_behind(tmp_path, format):
    """A file may grow to 1 MB here, as on a disk that fills up."""
    out = tmp_path / "there" / "m"
    found = open_checkpoint(BUNDLED)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(InputError, match=r"m can't be written \(.*File too large"):
            convert.write(found, out, format, "pebble")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(out.parent.iterdir()) == []


def test_towers_of_another_file_are_not_written_over(tmp_path):
    (tmp_path / "mmproj-m.gguf").write_text("precious")
    with pytest.raises(InputError, match=r"mmproj-m\.gguf exists already"):
        convert.write(open_checkpoint(BUNDLED), tmp_path / "m.gguf", "gguf:bf16", "pebble")
    assert (tmp_path / "mmproj-m.gguf").read_text() == "precious"


def test_shards_are_written_while_tensors_come(tmp_path):
    """Of a model that is larger than memory, no more than one shard may be there at a time."""
    alive = []

    def tensors():
        for i in range(8):
            gc.collect()
            alive.append(sum(ref() is not None for ref in refs))
            tensor = torch.full((1000,), float(i))
            refs.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    refs = []
    safetensors.save(tmp_path, tensors(), shard_bytes=8000)
    assert max(alive) <= 3
    read = safetensors.SafetensorsSource(tmp_path)
    assert [read.read(f"t{i}")[0].item() for i in range(8)] == list(range(8))
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)
    ]


def test_our_own_folder_is_sized_as_it_is_stored(tmp_path):
    convert.write(open_checkpoint(BUNDLED), tmp_path / "m", "int4", "pebble")
    found = {
        line["topic"]: line for line in json.loads(cabochon("doctor", tmp_path / "m", "--offline", "--json").stdout)
    }
    assert found["format"] == {
        "status": "ok", "topic": "format", "text": "int4, written by cabochon quantize; matrices stay in it"
    }  # fmt: skip
    sized = json.loads(cabochon("plan", tmp_path / "m", "--json").stdout)
    whole = json.loads(cabochon("plan", "pebble", "--quantization", "int4", "--json").stdout)
    assert sized["memory"]["weights"] == whole["memory"]["weights"]
    assert prepare(str(tmp_path / "m"), "cpu", quantization="int8").quantization == "int4"


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(InputError, match="int8, int4, gguf:bf16"):
        convert.write(open_checkpoint(BUNDLED), tmp_path / "m", "nf4", "pebble")


def test_the_page_says_what_every_format_costs():
    """`benchmarks/quantised_quality.py --write` was run since a format was added."""
    page = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `([\w:]+)` \| [\d.]+ \| \d", page, re.MULTILINE))
    assert told == {"bfloat16", "float32", "calibrated:int8", "calibrated:int4", *convert.FORMATS, "nf4"}
