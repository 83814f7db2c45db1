"""Loading and saving: exact, lean, and one sentence for whatever is wrong."""

import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch

from cabochon import ops
from cabochon.config import read_config
from cabochon.errors import CheckpointError, InputError, UnknownModelError
from cabochon.llm import loading
from cabochon.model.gemma4 import Gemma4
from cabochon.quant import QuantTensor, dequantize, quantize
from cabochon.weights.header import read_folder
from cabochon.weights.load import fill, fold, quantizer, save
from cabochon.weights.own import OwnSource, save_own
from cabochon.weights.params import as_kept, parameters
from cabochon.weights.random import RandomSource, calm_tensor, open_random
from cabochon.weights.safetensors import SafetensorsSource
from cabochon.weights.safetensors import save as save_tensors
from support.toys import save_toy, toy_config, toy_model


def load(folder, dtype=torch.float32, **options):
    config = read_config(folder)
    model = empty(config)
    fill(model, SafetensorsSource(folder), config, dtype=dtype, **options)
    return model


def empty(config):
    with torch.device("meta"):
        return Gemma4(config)


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy", "E2B", dtype=torch.bfloat16)


@pytest.fixture
def sharded(toy):
    config = read_config(toy)
    save(toy.parent / "sharded", load(toy, torch.bfloat16), config, shard_bytes=100_000)
    return toy.parent / "sharded"


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_single_and_sharded_files_hold_the_same(toy, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert equal(load(toy, torch.bfloat16).state_dict(), load(sharded, torch.bfloat16).state_dict())


def test_the_type_is_converted(toy):
    loaded = load(toy, torch.float32).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert equal(loaded, toy_model("E2B", dtype=torch.bfloat16).float().state_dict())


def test_progress_ends_at_the_total(toy):
    seen = []
    load(toy, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(entry.nbytes for entry in read_folder(toy).values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_what_comes_next_is_on_its_way_and_no_more(monkeypatch, toy):
    """Every tensor is announced before it is read, in the same order, but for those that are too large."""
    limit, source = 20_000, SafetensorsSource(toy)
    monkeypatch.setattr("cabochon.weights.load.EXPECTED", limit)
    told, done = [], []

    def expect(name):
        told.append(name)
        assert sum(source.nbytes(each) for each in told[len(done) : -1]) < limit

    def read(name):
        assert (name in told) == (source.nbytes(name) < limit)
        done.append(name)
        return SafetensorsSource.read(source, name)

    source.expect, source.read = expect, read
    config = read_config(toy)
    fill(empty(config), source, config, dtype=torch.bfloat16)
    assert told == [name for name in done if source.nbytes(name) < limit]
    assert 0 < len(told) < len(done)


def test_the_peak_is_the_model_and_one_tensor(monkeypatch, toy):
    """No tensor is read before the one before it is in place and its stored form is gone."""
    alive = []
    read = SafetensorsSource.read

    def counted(self, name):
        assert all(storage() is None for storage in alive)
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(SafetensorsSource, "read", counted)
    load(toy, torch.float32)
    assert len(alive) == len(toy_model("E2B").state_dict())


def test_weights_are_quantised_on_the_way_in(toy):
    def convert(param, tensor):
        return quantize(tensor, "int8") if param.quantize and "mlp" in param.name else tensor

    model = load(toy, torch.bfloat16, convert=convert)
    weight = model.language_model.layers[0].mlp.gate_proj.weight
    assert isinstance(weight, QuantTensor)
    exact = toy_model("E2B", dtype=torch.bfloat16).language_model.layers[0].mlp.gate_proj.weight
    assert (dequantize(weight) - exact).abs().max() < exact.abs().max() / 100
    with pytest.raises(InputError, match=r"mlp.gate_proj.weight is quantised"):
        save(toy.parent / "no", model, read_config(toy))


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("panels", [False, True])
def test_a_quantised_network_holds_what_the_table_says(toy, format, panels):
    config = read_config(toy)
    model = load(toy, torch.bfloat16, convert=quantizer(format, panels=panels))
    for param in parameters(config):
        value = model.get_submodule(param.name.rpartition(".")[0])
        value = getattr(value, param.name.rpartition(".")[2])
        assert isinstance(value, QuantTensor) == param.quantize
        if not panels:
            assert value.nbytes == param.nbytes("bfloat16", format)


def test_leftovers_of_sharing_layers_and_a_stored_head_are_passed_over(toy):
    tensors = load(toy, torch.bfloat16).state_dict()
    stored = {f"model.{name}": tensor for name, tensor in tensors.items()}
    stored["model.language_model.layers.7.self_attn.k_proj.weight"] = torch.zeros(16, 64)
    stored["lm_head.weight"] = torch.zeros(320, 64)
    save_tensors(toy, stored.items())
    assert equal(load(toy, torch.bfloat16).state_dict(), tensors)


def test_a_text_only_network_takes_its_part_of_a_larger_file(tmp_path):
    folder = save_toy(tmp_path, "31B", media=True)
    config = toy_config("31B")
    model = empty(config)
    fill(model, SafetensorsSource(folder), read_config(folder), dtype=torch.float32)
    assert equal(model.state_dict(), toy_model("31B").state_dict())


def test_everything_that_does_not_fit_is_named_at_once(toy):
    stored = {f"model.{name}": tensor for name, tensor in load(toy).state_dict().items()}
    for i in (0, 1, 2, 5):
        del stored[f"model.language_model.layers.{i}.mlp.up_proj.weight"]
    stored["model.language_model.norm.weight"] = torch.zeros(7)
    stored["model.language_model.layers.0.self_attn.sinks"] = torch.zeros(7)
    save_tensors(toy, stored.items())
    with pytest.raises(CheckpointError) as caught:
        load(toy)
    message = str(caught.value)
    assert "4 missing: model.language_model.layers.{0-2,5}.mlp.up_proj.weight" in message
    assert "1 unexpected: model.language_model.layers.0.self_attn.sinks" in message
    assert "model.language_model.norm.weight is [7] instead of [64]" in message
    assert "\n" not in message


def test_folded_names():
    assert fold(["a.0.b", "a.1.b", "a.3.b", "c", "d.4.e"]) == ["a.{0-1,3}.b", "c", "d.4.e"]


def cut(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [0, 5, 100, 20_000, 200_000])
def test_truncated_files(toy, keep):
    cut(toy, keep)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors (is cut off|has a damaged header).*download it again"
    ):
        load(toy)


def header(content):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{nonsense", "damaged header"),
        (b"[1, 2]", "damaged header"),
        (b"\xff\xfe", "damaged header"),
        ({"a": 3}, "describes a wrongly"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, "F32 .4. in 8 bytes"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, "describes a wrongly"),
        ({"a": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}, "is cut off"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "describes a wrongly"),
    ],
)
def test_hostile_headers(toy, content, message):
    (toy / "model.safetensors").write_bytes(header(content))
    with pytest.raises(CheckpointError, match=message):
        load(toy)


def test_missing_files(toy, sharded):
    victim = sorted(sharded.glob("model-*"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {victim.name}, which model.safetensors.index.json lists"):
        load(sharded)
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        load(sharded)
    shutil.rmtree(sharded)
    (toy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        load(toy)


def test_random_weights_depend_on_seed_and_name_only():
    config, source = open_random("random:E2B?layers=5&media=no&seed=3")
    again = RandomSource(config, seed=3)
    name = "model.language_model.layers.4.self_attn.q_proj.weight"
    assert torch.equal(source.read(name), again.read(name))
    assert not torch.equal(source.read(name), RandomSource(config, seed=4).read(name))
    assert source.read(name).shape == (4096, 1536) and source.read(name).dtype == torch.bfloat16
    assert set(source.shapes()) == {param.hf for param in parameters(config)}


def test_random_weights_are_calm():
    weight = calm_tensor("x.mlp.up_proj.weight", (1000, 300))
    assert weight.mean().abs() < 1e-3 and weight.std() == pytest.approx(300**-0.5, rel=0.01)
    assert torch.equal(weight.bfloat16(), calm_tensor("x.mlp.up_proj.weight", (1000, 300), dtype=torch.bfloat16))
    assert calm_tensor("a.q_norm.weight", (256,)).mean() == pytest.approx(0.25, rel=0.05)
    assert calm_tensor("a.post_attention_layernorm.weight", (512,)).mean() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    ("name", "layers", "sharing"),
    [("random:26B-A4B?layers=6", 6, 0), ("random:E2B?layers=10", 10, 5), ("random:E4B?layers=12&seed=1", 12, 6)],
)
def test_random_models_keep_whole_patterns(name, layers, sharing):
    config, _ = open_random(name)
    assert len(config.text.layers) == layers and config.text.layers[-1].kind == "global"
    assert sum(not spec.owns_kv for spec in config.text.layers) == sharing
    assert config.text.hidden_size > 1000


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("random:E9B", UnknownModelError, "no model 'E9B'; did you mean"),
        ("random:E2B?layers=11", InputError, "take one of 5, 10, 15, 20, 25, 30, 35"),
        ("random:E2B?seed=x", InputError, "seed='x'; it must be a whole number"),
        ("random:E2B?color=red", InputError, "unknown option color; known are layers=N"),
        ("random:E2B?media=yes", InputError, "the only choice is media=no"),
    ],
)
def test_wrong_random_names(name, error, message):
    with pytest.raises(error, match=message):
        open_random(name)


HEAD, TABLE = "language_model.lm_head.weight", "language_model.embed_tokens.weight"


def own_int4(folder):
    """A folder of our own with the table apart from the head, its config as kept, and the weights before."""
    config, tensors = as_kept(toy_config("E2B"), "int4"), toy_model("E2B", dtype=torch.bfloat16).state_dict()
    tensors[HEAD] = tensors[TABLE]
    save_own(folder, config, ((param, tensors[param.name]) for param in parameters(config)), "int4")
    return config, tensors


def mapped(folder):
    """Where files of `folder` lie in memory: (begin, end) of each piece."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in maps if line[-1].startswith(str(folder))]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system what is mapped where")
@pytest.mark.parametrize("panels", [False, True])
@pytest.mark.parametrize(("name", "format"), [("embed_tokens", "int8"), ("embed_tokens_per_layer", "int4")])
def test_looked_up_tables_of_our_own_folder_stay_in_the_file(tmp_path, panels, name, format):
    """They are addressed where the file is mapped; the same rows come out of them."""
    config, tensors = own_int4(tmp_path / "own")
    model = empty(config)
    stored = OwnSource(SafetensorsSource(tmp_path / "own"), read_config(tmp_path / "own"))
    fill(model, stored, config, dtype=torch.bfloat16, convert=quantizer("int4", panels=panels))
    table = model.get_submodule(f"language_model.{name}").weight
    assert (table.format, table.layout) == (format, "rows")
    assert torch.equal(dequantize(table), dequantize(quantize(tensors[f"language_model.{name}.weight"], format)))
    assert any(begin <= table.codes.data_ptr() < end for begin, end in mapped(tmp_path))


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_the_head_has_its_own_four_bits_however_it_comes_in(tmp_path, toy, quantization):
    """From a plain checkpoint, and from a folder of our own: rows come out of eight bits, logits out of four."""
    own_int4(tmp_path / "own")
    network = loading.load(
        toy if quantization else tmp_path / "own", "cpu", "bfloat16", quantization=quantization
    ).model
    exact = toy_model("E2B", dtype=torch.bfloat16).language_model
    text, ids = network.language_model, torch.arange(320)
    assert torch.equal(dequantize(text.lm_head.weight), dequantize(quantize(exact.embed_tokens.weight, "int4")))
    assert torch.equal(
        text.embed_tokens(ids, 1.0), dequantize(quantize(exact.embed_tokens.weight, "int8"), torch.bfloat16)
    )
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    softcap = text.config.final_logit_softcapping
    assert torch.equal(text.logits(x), ops.head(x, text.lm_head.weight, softcap))


def test_a_folder_of_our_own_with_one_table_serves_both(tmp_path):
    """As folders were written before the head was kept apart."""
    config, tensors = toy_config("E2B"), toy_model("E2B", dtype=torch.bfloat16).state_dict()
    one = quantize(tensors[TABLE], "int4")
    pairs = ((param, one if param.name == TABLE else tensors[param.name]) for param in parameters(config))
    save_own(tmp_path / "own", config, pairs, "int4")
    text = loading.load(tmp_path / "own", "cpu", "bfloat16").model.language_model
    for weight in (text.embed_tokens.weight, text.lm_head.weight):
        assert weight.format == "int4" and torch.equal(dequantize(weight), dequantize(one))


def test_codes_that_are_no_known_format_are_told(tmp_path):
    own_int4(tmp_path / "own")
    wrong = {name: SafetensorsSource(tmp_path / "own").read(name) for name in read_folder(tmp_path / "own")}
    wrong["lm_head.weight.scales"] = wrong["lm_head.weight.scales"].float()
    save_tensors(tmp_path / "own", wrong.items())
    with pytest.raises(CheckpointError, match=r"codes and scales of lm_head.weight are no int8 or int4 of \[320, 64\]"):
        OwnSource(SafetensorsSource(tmp_path / "own"), read_config(tmp_path / "own"))


def test_progress_runs_through_the_model_and_then_its_drafter():
    told: list[tuple[int, int]] = []
    loading.load(None, drafter="auto", progress=lambda done, total: told.append((done, total)))
    totals = list(dict.fromkeys(total for _, total in told))
    assert len(totals) == 2 and totals[1] < totals[0]
    for total in totals:
        mine = [done for done, its in told if its == total]
        assert mine == sorted(mine) and mine[-1] == total
