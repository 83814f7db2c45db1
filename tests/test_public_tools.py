"""Whole checkpoints of the public tools give the logits here that the tools' own dequantisers give, and ours do there.

What runs with the development packages is made on the spot. Checkpoints of tools with pins of their own are read from
the folder that CABOCHON_MADE_CHECKPOINTS names; `tests/support/make_with_*.py` make them.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cabochon.llm.loading import build
from cabochon.model.batch import whole_sequences
from cabochon.weights.checkpoint import open_checkpoint
from cabochon.weights.compressed import save_compressed
from cabochon.weights.params import parameters
from support.plain_toys import SIZES, wide
from support.toys import random_ids, save_toy, toy_model

MADE = os.environ.get("CABOCHON_MADE_CHECKPOINTS")
CLOSE = 3e-5
"""Both sides compute in float32; on these toys it is within 5e-6 of float64."""
pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn of their own affairs


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """`transformers` shows a bar for every file."""
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", False)


def ours(folder):
    opened = open_checkpoint(folder)
    return build(opened.config, opened.source, torch.device("cpu"), torch.float32)


def same(folder, ids, expected, within=CLOSE):
    with torch.no_grad():
        got = ours(folder)(whole_sequences([torch.tensor(ids)]))
    far = float((got - expected).abs().max())
    assert far < within, f"{folder.name}: the logits differ by {far:.1e}"


def theirs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def network():
    from transformers.models.gemma4 import Gemma4ForConditionalGeneration

    return Gemma4ForConditionalGeneration


@pytest.mark.parametrize("form", ["nf4", "nf4-double", "fp4", "int8"])
@pytest.mark.parametrize("size", SIZES)
def test_bitsandbytes_as_transformers_saves_it(tmp_path, size, form):
    from transformers import BitsAndBytesConfig

    kind, _, double = form.partition("-")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(double)}
    wish = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else four))
    plain = save_toy(tmp_path / "plain", size, media=True, **wide(size))
    made = network().from_pretrained(plain, quantization_config=wish, dtype=torch.float32, device_map="cpu")
    made.save_pretrained(tmp_path / form)
    again = network().from_pretrained(tmp_path / form, dtype=torch.float32, device_map="cpu")
    again.dequantize()  # its CPU kernels round activations as well
    ids = random_ids(40)
    same(tmp_path / form, ids, theirs(again, ids))


@pytest.mark.parametrize("size", SIZES)
def test_fine_grained_fp8_as_transformers_packs_it(tmp_path, size):
    """`transformers` quantises on a GPU only, but its packing is plain torch. Its experts stay stacked."""
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    wish = FineGrainedFP8Config(weight_block_size=(32, 32))
    whole = network().from_pretrained(save_toy(tmp_path / "plain", size, **wide(size)), dtype=torch.float32)
    packer = Fp8Quantize(SimpleNamespace(quantization_config=wish))
    stored = {}
    for name, tensor in whole.state_dict().items():
        packed = (
            name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj")) and "per_layer" not in name
        )
        stored |= packer.convert({name: tensor}) if packed else {name: tensor.clone()}
    stored.pop("lm_head.weight", None)
    whole.config.quantization_config = wish
    whole.config.save_pretrained(tmp_path / "fp8")
    save_file(
        {name: t.contiguous() for name, t in stored.items()}, tmp_path / "fp8" / "model.safetensors", {"format": "pt"}
    )
    dense = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    again = network().from_pretrained(tmp_path / "fp8", quantization_config=dense, dtype=torch.float32)
    for name, weight in again.named_parameters():
        if ".experts." in name:  # its loader passes over their scales; its arithmetic is right
            scales = stored[f"{name}_scale_inv"]
            weight.data = Fp8Dequantize(packer)._dequantize_one(stored[name], scales, torch.float32)
    ids = random_ids(40)
    expected = theirs(again, ids)
    assert (expected - theirs(whole, ids)).abs().max() > 100 * CLOSE, "nothing was rounded"
    same(tmp_path / "fp8", ids, expected)


@pytest.mark.parametrize("format", ["w4a16", "fp8"])
@pytest.mark.parametrize("size", ["E2B", "31B"])
def test_ours_in_transformers(tmp_path, size, format):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import disable_quantization

    model = toy_model(size, **wide(size))
    weights = model.state_dict()
    save_compressed(tmp_path / format, model.config, ((p, weights[p.name]) for p in parameters(model.config)), format)
    there = network().from_pretrained(tmp_path / format, dtype=torch.float32)
    ModelCompressor.from_pretrained_model(there).decompress_model(there)
    there.apply(disable_quantization)  # of the activations, which fp8 rounds there as well
    ids = random_ids(40)
    same(tmp_path / format, ids, theirs(there, ids))


@pytest.mark.slow
@pytest.mark.skipif(not MADE, reason="CABOCHON_MADE_CHECKPOINTS is not set")
def test_checkpoints_made_elsewhere():
    """One tool restores NVFP4 in bfloat16, so that weights are off by 2**-9 of themselves and experts change places."""
    folders = sorted(file.parent for file in Path(MADE or "").glob("*/expected.safetensors"))
    assert folders, f"{MADE} holds no checkpoints"
    for folder in folders:
        expected = load_file(folder / "expected.safetensors")
        with torch.no_grad():
            far = (ours(folder)(whole_sequences([expected["ids"]])) - expected["logits"]).abs()
        print(f"{folder.name}: {far.max():.1e} at most, {far.mean():.1e} in the mean")
        assert far.mean() < 0.02 if "NVFP4" in folder.name else far.max() < CLOSE
