"""compressed-tensors folders as we write them; `test_public_tools` shows that `transformers` reads them alike."""

import pytest
import torch

from cabochon.errors import CheckpointError
from cabochon.llm.loading import build
from cabochon.model.batch import whole_sequences
from cabochon.weights.checkpoint import open_checkpoint
from cabochon.weights.compressed import save_compressed
from cabochon.weights.params import parameters
from support.toys import toy_model

WIDE = {"hidden_size": 64, "intermediate_size": 96}


def write(folder, size, format, **text):
    model = toy_model(size, **WIDE, **text)
    weights = model.state_dict()
    save_compressed(folder, model.config, ((p, weights[p.name]) for p in parameters(model.config)), format)
    return model


def ours(folder):
    opened = open_checkpoint(folder)
    return build(opened.config, opened.source, torch.device("cpu"), torch.float32)


def logits(model, ids):
    with torch.no_grad():
        return model(whole_sequences([torch.tensor(ids)]))


@pytest.mark.parametrize("format", ["w4a16", "fp8"])
@pytest.mark.parametrize("size", ["E2B", "31B", "26B-A4B"])
def test_what_is_written_comes_back_rounded(tmp_path, size, format):
    whole = write(tmp_path, size, format, **({"moe_intermediate_size": 32} if size == "26B-A4B" else {}))
    again = ours(tmp_path)
    for param in parameters(whole.config):
        before, after = whole.state_dict()[param.name], again.state_dict()[param.name]
        step = {"w4a16": 1 / 7, "fp8": 1 / 8}[format] if param.quantize and param.part != "embedding" else 1 / 128
        assert (after - before).abs().max() <= step * before.abs().max(), param.name


def test_a_missing_piece_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    write(tmp_path, "31B", "w4a16")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.language_model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 missing: \S+layers\.0\.mlp\.up_proj\.weight; 2 unexpected: .*weight_packed"
    ):
        ours(tmp_path)
