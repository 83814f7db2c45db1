"""The parameter table accounts for every published tensor, and the network is built from the same names."""

import json

import pytest
import torch

from cabochon.config import read_config
from cabochon.model.gemma4 import Gemma4
from cabochon.variants import VARIANTS, find
from cabochon.weights.header import file_bytes
from cabochon.weights.params import parameters
from support.published import needs_facts
from support.published import path as published

RELEASED = [variant for variant in VARIANTS if variant.role != "base"]
FILE_BYTES = {
    "gemma-4-E2B-it": 10_246_621_918,
    "gemma-4-E4B-it": 15_992_595_884,
    "gemma-4-12B-it": 23_919_549_408,
    "gemma-4-E2B-it-assistant": 157_565_344,
}


@needs_facts
@pytest.mark.parametrize("variant", RELEASED, ids=lambda variant: variant.name)
def test_every_published_tensor_is_in_the_table_and_nothing_else(variant):
    stored = json.loads(published(f"weights/{variant.name}.safetensors_names_shapes.json").read_text())
    table = {param.hf: param for param in parameters(read_config(variant.config()), unused=True)}
    table.pop("lm_head.weight", None)  # tied in every published file, but other writers store it
    assert {name: (list(p.shape), "I64" if p.integer else "BF16") for name, p in table.items()} == {
        name: (shape, dtype) for name, (shape, dtype) in stored.items()
    }


@pytest.mark.parametrize("name", FILE_BYTES)
def test_published_file_sizes_to_the_byte(name):
    rows = [p for p in parameters(read_config(find(name).config()), unused=True) if p.part != "head"]
    assert file_bytes((p.hf, "I64" if p.integer else "BF16", p.shape) for p in rows) == FILE_BYTES[name]


@pytest.mark.parametrize("size", ["E2B", "E4B", "12B", "26B-A4B", "31B"])
def test_the_network_at_full_size_has_the_tables_names_and_shapes(size):
    config = read_config(find(size).config())
    with torch.device("meta"):
        model = Gemma4(config)
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert built == {param.name: param.shape for param in parameters(config)}


@pytest.mark.parametrize("size", ["E2B", "E4B"])
def test_what_is_stored_for_nothing_are_the_sharing_layers_projections(size):
    config = read_config(find(size).config())
    unused = {param.name for param in parameters(config, unused=True) if not param.used}
    sharing = [spec.index for spec in config.text.layers if not spec.owns_kv]
    leaves = ("k_proj", "v_proj", "k_norm")
    expected = {f"language_model.layers.{i}.self_attn.{leaf}.weight" for i in sharing for leaf in leaves}
    assert unused == {*expected, "language_model.lm_head.weight"}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_names_are_unique_in_every_naming(variant):
    rows = parameters(read_config(variant.config()), unused=True)
    gguf = [param.gguf for param in rows if param.gguf is not None]
    theirs = [name for param in rows for name in (param.hf, *param.also)]
    assert len({param.name for param in rows}) == len(rows)
    assert len(set(gguf)) == len(gguf) and len(set(theirs)) == len(theirs)


@pytest.mark.parametrize("size", ["E2B", "12B", "26B-A4B", "31B"])
def test_what_ranks_split_divides_evenly_by_two(size):
    rows = parameters(read_config(find(size).config()))
    split = [
        param for param in rows if param.shard is not None and "k_proj" not in param.name and "v_proj" not in param.name
    ]
    assert split and all(param.shape[param.shard] % 2 == 0 for param in split)


def test_only_matrices_of_the_text_network_may_be_quantised():
    rows = parameters(read_config(find("E4B").config()))
    assert all(len(p.shape) > 1 and p.part not in ("vision", "audio") for p in rows if p.quantize)
    assert sum(p.count for p in rows if p.quantize) > 0.9 * sum(p.count for p in rows)


@needs_facts
@pytest.mark.parametrize("size", ["E2B", "E4B", "12B", "26B-A4B", "31B"])
def test_a_drafters_file_is_as_large_as_its_published_list_makes_it(size):
    """Only E2B's file was ever weighed; for the others the published names, shapes and types say what it must weigh."""
    variant = find(f"{size}-assistant")
    listed = json.loads(published(f"weights/{variant.name}.safetensors_names_shapes.json").read_text())
    rows = [p for p in parameters(read_config(variant.config()), unused=True) if p.part != "head"]
    ours = file_bytes((p.hf, "I64" if p.integer else "BF16", p.shape) for p in rows)
    assert ours == file_bytes((name, dtype, tuple(shape)) for name, (shape, dtype) in listed.items())
    assert sum(p.count for p in rows) == find(size).size.drafter
