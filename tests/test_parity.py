"""The text network against the reference implementation, for every architecture of the family, on calm toys."""

import pytest
import torch
import torch.nn.functional as F

from cabochon.config import read_config
from cabochon.model.batch import whole_sequences
from cabochon.model.gemma4 import Gemma4
from cabochon.weights.load import fill, save
from cabochon.weights.safetensors import SafetensorsSource
from support.reference import load_reference, reference, reference_logits
from support.toys import SIZES, WINDOW, random_ids, save_toy, toy_json, toy_model, with_dtype

LONG = 4 * WINDOW


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_the_reference_in_float64(size):
    model, truth = toy_model(size), reference(size)
    sequences = [random_ids(LONG, 1), random_ids(WINDOW // 2, 2), random_ids(LONG + 3, 3)]
    with torch.no_grad():
        ours = model(whole_sequences([torch.tensor(ids) for ids in sequences]))
    theirs = torch.cat([reference_logits(truth, ids) for ids in sequences])
    assert theirs.std() > 0.5  # not trivially equal
    assert (ours - theirs).abs().max() < 3e-5


@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_that_transformers_wrote_is_read(size, tmp_path):
    writer = reference(size, torch.float32, media=True)
    writer.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    with torch.device("meta"):
        model = Gemma4(config)
    fill(model, SafetensorsSource(tmp_path), config, dtype=torch.float32)
    ids = random_ids(LONG)
    with torch.no_grad():
        ours = model(whole_sequences([torch.tensor(ids)]))
    assert (ours - reference_logits(writer, ids)).abs().max() < 3e-5


@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_that_we_wrote_is_read_by_transformers(size, tmp_path):
    folder = save_toy(tmp_path / "toy", size, media=True)
    config = read_config(folder)
    model = toy_model(size, media=True)
    save(tmp_path / "again", model, config, shard_bytes=300_000)
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    ids = random_ids(LONG)
    with torch.no_grad():
        ours = model(whole_sequences([torch.tensor(ids)]))
    assert (ours - reference_logits(load_reference(tmp_path / "again"), ids)).abs().max() < 3e-5


@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_the_reference(size):
    ids = torch.tensor(random_ids(LONG))
    model, truth = toy_model(size).train(), reference(size).train()
    F.cross_entropy(model(whole_sequences([ids]))[:-1], ids[1:]).backward()
    F.cross_entropy(truth(ids[None]).logits[0, :-1], ids[1:]).backward()
    theirs = {name.removeprefix("model."): p.grad for name, p in truth.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    wrong = {name: _distance(ours[name], grad) for name, grad in theirs.items() if _distance(ours[name], grad) > 1e-3}
    assert not wrong


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_loses_no_more_than_the_reference_does(size):
    sequences = torch.tensor([random_ids(LONG, seed) for seed in range(32)])  # enough to average over flipped experts
    exact, theirs = _rounded_reference(size), reference(size, torch.bfloat16)
    ours = toy_model(size, dtype=torch.bfloat16)
    with torch.no_grad():
        packed = ours(whole_sequences(list(sequences)))
        truth, rounded = exact(sequences).logits.flatten(0, 1), theirs(sequences).logits.flatten(0, 1)
    assert _divergence(truth, packed) <= 1.2 * _divergence(truth, rounded)


def test_media_toys_have_every_part():
    assert all(toy_json(size, media=True)["vision_config"] for size in SIZES)
    assert with_dtype(toy_json("E2B", media=True), torch.bfloat16)["audio_config"]["dtype"] == "bfloat16"


def _rounded_reference(size):
    """float64 arithmetic on the bfloat16 weights."""
    exact, rounded = reference(size), reference(size, torch.bfloat16)
    exact.load_state_dict({name: tensor.double() for name, tensor in rounded.state_dict().items()})
    return exact


def _distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def _divergence(truth, other):
    p, q = truth.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
