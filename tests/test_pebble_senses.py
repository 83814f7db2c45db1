"""The bundled checkpoint's eyes and ears: the exercises, their files, and that training and serving see the same."""

from __future__ import annotations

import base64
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cabochon.chat.messages import Media
from cabochon.chat.template import Template
from cabochon.chat.tokenizer import Tokenizer
from cabochon.config import read_config
from cabochon.hub import BUNDLED
from cabochon.llm.loading import load
from cabochon.media.source import Policy
from cabochon.senses import Senses

SCRIPTS = Path(__file__).parents[1] / "scripts" / "pebble"
sys.path.insert(0, str(SCRIPTS))

import mixture  # noqa: E402  (after its folder is on the path)
import pictures  # noqa: E402
import senses  # noqa: E402
import train  # noqa: E402
import writing  # noqa: E402
from case import draw  # noqa: E402

DRAWN = (*pictures.PICTURES, pictures.unseen_pair, writing.chart)
"""Generators that need no package beside Pillow."""


@pytest.fixture(scope="module")
def model():
    """The bundled text network with fresh towers."""
    return senses.new_model(BUNDLED, 0).eval()


@pytest.fixture(scope="module")
def template():
    return Template(Tokenizer.from_file(BUNDLED))


def test_training_never_shows_an_unseen_pair():
    rng = random.Random(3)
    for generator in pictures.PICTURES:
        for _ in range(200):
            case = draw(generator, rng, test=False)
            assert not {(colour, shape) for _, _, (colour, shape) in case.spots} & pictures.UNSEEN
    shown = {pair for _ in range(300) for *_, pair in pictures.unseen_pair(rng).spots}
    assert shown == pictures.UNSEEN
    colours, shapes = {c for c, _ in pictures.PAIRS}, {s for _, s in pictures.PAIRS}
    assert (colours, shapes) == (set(pictures.COLOURS), set(pictures.SHAPES))


@pytest.mark.parametrize("generator", DRAWN, ids=lambda generator: generator.__name__)
def test_pictures_show_what_the_answer_says(generator):
    rng = random.Random(5)
    for _ in range(30):
        case = generator(rng)
        data = case.shown[0].data
        assert data.dtype == np.uint8
        assert data.shape[-3:] == (pictures.SIDE, pictures.SIDE, 3)
        for x, y, names in case.spots:
            assert 0 <= x <= 1
            assert 0 <= y <= 1
            assert set(names) <= {*pictures.COLOURS, *pictures.SHAPES}
        if case.task == "box":
            top, left, bottom, right = json.loads(case.reply["content"])[0]["box_2d"]
            assert 0 <= top < bottom <= 1000
            assert 0 <= left < right <= 1000


def test_a_box_holds_its_shape():
    """Outside the box of a lone thing there is only background."""
    rng = random.Random(6)
    for _ in range(50):
        thing = pictures._place(rng, *rng.choice(pictures.PAIRS))
        pixels = np.asarray(pictures.draw_things(rng, [thing], (255, 255, 255)))
        top, left, bottom, right = (round(v * pictures.SIDE / 1000) for v in thing.box)
        inked = np.argwhere((pixels != 255).any(-1))
        assert np.abs(inked.min(0) - (top, left)).max() <= 2
        assert np.abs(inked.max(0) - (bottom, right)).max() <= 2


@pytest.mark.parametrize("generator", DRAWN, ids=lambda generator: generator.__name__)
def test_files_are_seen_as_training_sees_arrays(generator, model, template):
    case = generator(random.Random(8))
    direct = mixture.Exhibits(model.config, template)
    direct.shown = case.shown
    record = case.record()
    assert record["score"] != "box" or record["expect"][0]["label"] in case.messages[0]["content"][1]["text"]
    shown = record["messages"][0]["content"][0]
    media = Media(shown["type"], shown["url"])
    through_a_file = Senses(model.config, template.tokenizer, Policy()).perceive(media, {})
    at_once = direct.perceive(Media(shown["type"], b"0"), {})
    assert [piece.stamp for piece in through_a_file] == [piece.stamp for piece in at_once]
    for file, array in zip(through_a_file, at_once, strict=True):
        assert (file.length, file.kind) == (array.length, array.kind)
        assert np.array_equal(file.item.values, array.item.values)


def test_a_sound_survives_its_file(template, model):
    time = np.arange(24_000) / 16_000
    sound = (0.4 * np.sin(2 * np.pi * 330 * time)).astype(np.float32)
    url = train_shown("audio", sound).data_url()
    assert url == train_shown("audio", sound).data_url()
    assert len(base64.b64decode(url.split(",")[1])) < 8000
    (piece,) = Senses(model.config, template.tokenizer, Policy()).perceive(Media("audio", url), {})
    assert piece.item.mean(0).argmax() == pytest.approx(mixture.audio.log_mel(sound).mean(0).argmax(), abs=1)


def train_shown(kind, data):
    from shown import Shown

    return Shown(kind, data)


def test_training_and_serving_encode_alike(model):
    rng = random.Random(9)
    cases = [pictures.name_it(rng), pictures.count(rng), writing.chart(rng)]
    items = [senses.cut(case.shown[0].data, 16) for case in cases]
    items.insert(1, np.random.default_rng(0).standard_normal((61, 128)).astype(np.float32))
    with torch.no_grad():
        for ours, served in zip(train.perceive(model, items), model.encode(items), strict=True):
            torch.testing.assert_close(ours, served, rtol=1e-4, atol=1e-4)


def test_the_whole_model_learns_from_a_picture(model, template):
    """Gradients reach the tower through the text network, and a step lowers the loss."""
    case = pictures.name_it(random.Random(2))
    exhibits = mixture.Exhibits(model.config, template)
    doc = mixture.document(case, template, exhibits=exhibits)
    assert sum(span.length for span in doc.spans) == 16
    assert doc.ids.count(template.tokenizer.image) == 16

    def lost():
        step = train.pack([doc])
        return torch.nn.functional.cross_entropy(train.logits(model, step), step.targets)

    before = lost()
    tower = [p for name, p in model.named_parameters() if "vision_tower" in name]
    grads = torch.autograd.grad(before, tower)
    assert all(bool(grad.abs().sum() > 0) for grad in grads)
    with torch.no_grad():
        pace = 0.05 * before / sum(grad.square().sum() for grad in grads)
        for p, grad in zip(tower, grads, strict=True):
            p -= pace * grad
        assert lost() < before
        for p, grad in zip(tower, grads, strict=True):
            p += pace * grad


def test_transformers_sees_and_hears_the_same(model, tmp_path):
    """A saved checkpoint with ranges that do cut."""
    from transformers import Gemma4ForConditionalGeneration

    wide = {name: value for name, value in model.state_dict().items() if name.endswith(("_min", "_max"))}
    for name, value in wide.items():
        value.fill_(-3.0 if name.endswith("_min") else 3.0)
    train.save(model, tmp_path)
    for name, value in wide.items():
        value.fill_(-torch.inf if name.endswith("_min") else torch.inf)
    oracle = Gemma4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval().model
    ours = load(tmp_path, "cpu", "float32").model
    patches = senses.cut(pictures.count(random.Random(4)).shown[0].data, 16)
    at = torch.arange(patches.rows * patches.columns)
    place = torch.stack([at % patches.columns, at // patches.columns], -1)
    mel = np.random.default_rng(0).standard_normal((61, 128)).astype(np.float32) - 3
    with torch.no_grad():
        picture, sound = ours.encode([patches, mel])
        seen = oracle.get_image_features(torch.from_numpy(patches.values)[None] / 255, place[None]).pooler_output
        heard = oracle.get_audio_features(
            torch.from_numpy(mel)[None], torch.ones(1, 61, dtype=torch.bool)
        ).pooler_output
    assert (torch.cat(list(seen)) - picture).abs().max() < 1e-4 * picture.abs().max()
    assert (heard[0] - sound).abs().max() < 1e-4 * sound.abs().max()


def test_the_towers_have_published_keys():
    raw = json.loads((SCRIPTS / "towers.json").read_text())
    config = read_config(json.loads((BUNDLED / "config.json").read_text()) | raw)
    assert config.vision is not None
    assert config.vision.use_clipped_linears
    assert config.audio is not None
    assert config.vision.soft_tokens == 16
