"""Toy checkpoints in AutoAWQ's "gemm" form, for `tests/test_public_tools.py`. Its search for scales does not know this
family, so the numbers are rounded to nearest here; its own layers pack and its own unpacking is the oracle. Run by the
Python of an environment that has autoawq and transformers, on plain toys that `tests/support/plain_toys.py` wrote:

    python tests/support/make_with_autoawq.py PLAIN OUT

Beside every checkpoint lies `expected.safetensors`: token ids, and the logits of the reference network with the
matrices that the tool restores.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file
from torch import nn
from transformers.models.gemma4 import Gemma4ForConditionalGeneration

GROUPS = (32, 128)
PACKED = re.compile(r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
IDS = [2, *range(20, 280, 7)]


def pack(linear: nn.Linear, group: int) -> tuple[WQLinear_GEMM, torch.Tensor]:
    """The tool's layer, and the matrix [O, I] that it stands for."""
    groups = linear.weight.data.view(linear.out_features, -1, group)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    rounded = ((groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15) - zeros[..., None]) * scales[
        ..., None
    ]
    linear.weight.data = rounded.view_as(linear.weight)  # the tool does not clamp
    layer = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    return layer, dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, group).T.contiguous()


def make(plain: Path, out: Path, group: int) -> None:
    model = Gemma4ForConditionalGeneration.from_pretrained(plain, dtype=torch.float32).eval()
    stored = {}
    for name, module in model.named_modules():
        if PACKED.fullmatch(name):
            layer, module.weight.data = pack(module, group)
            stored |= {f"{name}.{part}": tensor.contiguous() for part, tensor in layer.state_dict().items()}
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }
    (out / "config.json").write_text(json.dumps(config))
    kept = {name: t.contiguous() for name, t in model.state_dict().items() if f"{name[:-7]}.qweight" not in stored}
    kept.pop("lm_head.weight", None)
    save_file(kept | stored, out / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    save_file({"ids": torch.tensor(IDS), "logits": logits.contiguous()}, out / "expected.safetensors")


if __name__ == "__main__":
    for toy in sorted(Path(sys.argv[1]).iterdir()):
        for group in GROUPS:
            make(toy, Path(sys.argv[2]) / f"{toy.name}-awq-g{group}", group)
