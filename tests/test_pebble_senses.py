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
import scenes  # noqa: E402
import senses  # noqa: E402
import train  # noqa: E402
import writing  # noqa: E402
from case import draw  # noqa: E402

ASKED = (pictures.name_it, pictures.count, pictures.box, pictures.motion, pictures.unseen_pair, writing.chart)
"""Generators of what is scored that need no package beside Pillow."""
DRAWN = (*ASKED, *scenes.SCENES)


@pytest.fixture(scope="module")
def model():
    """The bundled text network with fresh towers."""
    return senses.new_model(BUNDLED, 0).eval()


@pytest.fixture(scope="module")
def template():
    return Template(Tokenizer.from_file(BUNDLED))


def test_training_never_shows_an_unseen_pair(monkeypatch):
    """By what is drawn: every thing that the program fills, with the colour it is filled with."""
    filled: set[tuple[str, str]] = set()
    whole = pictures.fill

    def fill(rng, thing):
        tone = whole(rng, thing)
        filled.add((scenes.colour_of(tone), thing.shape))
        return tone

    monkeypatch.setattr(pictures, "fill", fill)
    rng = random.Random(3)
    for generator in {task.generator for task in mixture.SENSED} | {each for each, _ in senses.TILE_GENERATORS}:
        if generator.__module__ in ("pictures", "scenes"):
            for _ in range(300):
                draw(generator, rng, test=False)
    assert filled == set(pictures.PAIRS)
    filled.clear()
    for _ in range(300):
        pictures.unseen_pair(rng)
    assert filled == pictures.UNSEEN
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
        for x, y, names, (top, left, bottom, right) in case.spots:
            assert 0 <= left <= x <= right <= 1
            assert 0 <= top <= y <= bottom <= 1
            assert set(names) <= {*pictures.COLOURS, *pictures.SHAPES}
        if case.task == "box":
            top, left, bottom, right = json.loads(case.reply["content"])[0]["box_2d"]
            assert 0 <= top < bottom <= 1000
            assert 0 <= left < right <= 1000


def test_a_box_holds_its_shape():
    """Outside the box of a lone thing there is only background."""
    rng = random.Random(6)
    for _ in range(50):
        thing = pictures.place(rng, *rng.choice(pictures.PAIRS))
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
    if record["score"] == "box":
        assert record["expect"][0]["label"] in case.messages[0]["content"][1]["text"]
    shown = record["messages"][0]["content"][0]
    media = Media(shown["type"], shown["url"])
    through_a_file = Senses(model.config, template.tokenizer, Policy()).perceive(media, {})
    at_once = direct.perceive(Media(shown["type"], b"0"), {})
    assert [piece.stamp for piece in through_a_file] == [piece.stamp for piece in at_once]
    for file, array in zip(through_a_file, at_once, strict=True):
        assert (file.length, file.kind) == (array.length, array.kind)
        assert np.array_equal(file.item.values, array.item.values)


def replies(doc, template):
    """What is learned of a conversation, reply by reply."""
    said, text = [], ""
    for i, mark in zip([*doc.ids, 0], [*doc.marks, False], strict=True):
        if mark:
            text += template.tokenizer.decode([i], special=True)
        elif text:
            said, text = [*said, text], ""
    return said


@pytest.mark.parametrize("generator", [scenes.lone, scenes.several, scenes.moving, scenes.chart])
def test_every_answer_about_a_picture_is_learned(generator, model, template):
    exhibits, rng = mixture.Exhibits(model.config, template), random.Random(4)
    for _ in range(20):
        case = generator(rng)
        answers = [m["content"] for m in [*case.messages, case.reply] if m["role"] == "assistant"]
        doc = mixture.document(case, template, exhibits=exhibits)
        assert replies(doc, template) == [f"{a.removeprefix(case.given)}<turn|>" for a in answers]
        assert sum(span.length for span in doc.spans) == 16 * (1 if case.shown[0].kind == "image" else len(doc.spans))


def test_a_wrong_colour_is_given_and_the_shape_learned(model, template):
    exhibits, rng = mixture.Exhibits(model.config, template), random.Random(4)
    misled = [case for case in (scenes.lone(rng) for _ in range(60)) if case.given]
    assert misled
    for case in misled:
        (colour,), shape = case.spots[0].names, case.reply["content"].removeprefix(f"{case.given} ").removesuffix(".")
        assert colour not in case.given
        assert f"colour='{colour}', shape='{shape}'" in case.content
        doc = mixture.document(case, template, exhibits=exhibits)
        assert replies(doc, template) == [f" {shape}.<turn|>"]
        assert template.tokenizer.decode(doc.ids).endswith(f"{case.given} {shape}.")


def test_what_the_eye_is_told(model):
    """The colour of a thing that has one with a name, else the shape; what it calls the other counts for nothing."""
    spots = (
        pictures.Thing("red", "ring", 100, 30, 20).spot,
        scenes.tinted(random.Random(1), pictures.Thing("blue", "star", 20, 150, 18)).spot,
    )
    head = torch.nn.Linear(128, len(senses.SIGHTS) + 4 * senses.EDGE_BINS)
    features = torch.nn.functional.one_hot(torch.arange(16), 128).float()
    red, blue, ring, star = (senses.SIGHTS.index(name) for name in ("red", "blue", "ring", "star"))
    assert [spot.names for spot in spots] == [("red",), ("star",)]
    with torch.no_grad():
        head.weight.fill_(-9)
        head.bias.zero_()
        for tile, names, spot in ((2, (red, ring), spots[0]), (12, (blue, star), spots[1])):
            head.weight[list(names), tile] = 9
            for edge, value in enumerate(spot.box):
                head.weight[len(senses.SIGHTS) + edge * senses.EDGE_BINS + int(value * senses.EDGE_BINS), tile] = 9
        right = senses.sight_loss(head, features, 4, spots)
        assert 0 <= right < 1e-6
        head.weight[star, 12] = -9
        assert senses.sight_loss(head, features, 4, spots) > right + 1


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
