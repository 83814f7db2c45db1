"""Toy checkpoints made by llmcompressor, for `tests/test_public_tools.py`. Run by the Python of an environment that has
llmcompressor (its pins differ from ours), on plain toys that `tests/support/plain_toys.py` wrote:

    python tests/support/make_with_llmcompressor.py PLAIN OUT

Beside every checkpoint lies `expected.safetensors`: token ids, and the logits of the tool's own decompressed network.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationScheme, disable_quantization, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from transformers.models.gemma4 import Gemma4ForConditionalGeneration

SCHEMES = (
    "W4A16",
    "W4A16-group32",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4A16",
    "MXFP4A16",
    "MXFP8A16",
)
KEPT = ["lm_head", "re:.*(vision|audio)_.*", "re:.*embed_.*", "re:.*router.*", "re:.*per_layer_.*"]
IDS = [2, *range(20, 280, 7)]


def recipe(name: str) -> QuantizationModifier:
    preset, _, group = name.partition("-group")
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    if group:
        scheme.weights.group_size = int(group)
    return QuantizationModifier(config_groups={"group_0": scheme}, ignore=KEPT)


def make(plain: Path, out: Path, scheme: str) -> None:
    with load_quantizable_moe(Gemma4ForConditionalGeneration):
        model = Gemma4ForConditionalGeneration.from_pretrained(plain, dtype=torch.float32).eval()
    oneshot(model=model, recipe=recipe(scheme))
    model.save_pretrained(out, save_compressed=True)
    ModelCompressor.from_pretrained_model(model).decompress_model(model)
    model.apply(disable_quantization).float()  # 4-bit floats come back in bfloat16
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    save_file({"ids": torch.tensor(IDS), "logits": logits.contiguous()}, out / "expected.safetensors")


if __name__ == "__main__":
    for toy in sorted(Path(sys.argv[1]).iterdir()):
        for scheme in SCHEMES:
            make(toy, Path(sys.argv[2]) / f"{toy.name}-{scheme}", scheme)
