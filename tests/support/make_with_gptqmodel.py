"""Toy checkpoints made by gptqmodel, for `tests/test_public_tools.py`. Run by the Python of an
environment that has gptqmodel, with GPTQMODEL_CPU_WORKERS=2 where there is no GPU, on plain toys that
`tests/support/plain_toys.py` wrote and the folder of any tokenizer (the tool wants one and doesn't use it):

    python tests/support/make_with_gptqmodel.py PLAIN OUT TOKENIZER

Beside every checkpoint lies `expected.safetensors`: token ids, and the logits of the reference network with the
matrices that the tool's own layers restore.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import load_file, save_file
from transformers.models.gemma4 import Gemma4ForConditionalGeneration

FORMS: dict[str, dict[str, Any]] = {
    "gptq-g32": {"group_size": 32, "desc_act": False},
    "gptq-g128-order": {"group_size": 128, "desc_act": True},
    "gptq-row-asymmetric": {"group_size": -1, "desc_act": False, "sym": False, "act_group_aware": False},
    "gptq-v2": {"group_size": 32, "desc_act": False, "sym": False, "format": "gptq_v2"},
    "gptq-8bit": {"group_size": 32, "desc_act": False, "bits": 8},
}
IDS = [2, *range(20, 280, 7)]


def calibration() -> list[dict[str, torch.Tensor]]:
    rows = [[random.Random(i).randrange(4, 300) for _ in range(64)] for i in range(8)]
    return [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, 64, dtype=torch.long)} for row in rows]


def make(plain: Path, out: Path, form: dict[str, Any]) -> None:
    model = GPTQModel.load(str(plain), QuantizeConfig(**{"bits": 4, "device": "cpu", **form}))
    model.quantize(calibration(), batch_size=1)
    model.save(str(out))
    made = GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH).model
    whole = Gemma4ForConditionalGeneration.from_pretrained(plain, dtype=torch.float32).eval()
    stored = load_file(out / "model.safetensors")
    whole.load_state_dict(stored, strict=False)  # what stays as it is was rounded to bfloat16
    for name, layer in made.named_modules():
        if isinstance(layer, BaseQuantLinear):
            layer.scales = stored[f"{name}.scales"].float()  # which loading rounded from float16 to bfloat16
            whole.get_submodule(name).weight.data = layer.dequantize_weight().T.float().contiguous()
    with torch.no_grad():
        logits = whole(torch.tensor([IDS])).logits[0]
    save_file({"ids": torch.tensor(IDS), "logits": logits.contiguous()}, out / "expected.safetensors")


if __name__ == "__main__":
    plain, out, words = map(Path, sys.argv[1:4])
    for toy in sorted(plain.iterdir()):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(words / name, toy / name)
        for name, form in FORMS.items():
            make(toy, out / f"{toy.name}-{name}", form)
