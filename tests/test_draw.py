"""Media on the command line: boxes out of answers into pictures, media options and chat commands."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from cabochon.chat.messages import Media, Text
from cabochon.cli import inputs, main
from cabochon.cli.draw import Box, boxes, draw, draw_answer
from cabochon.cli.session import Session
from cabochon.errors import InputError, MediaError
from support.speaking import save_seeing

ANSWER = """Here they are:
```json
[{"box_2d": [100, 200, 300, 600], "label": "cat"}, {"box_2d": [900, 1100, 500, -5]}]
```
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ANSWER, [Box(100, 200, 300, 600, "cat"), Box(500, 0, 900, 1000)]),
        ('{"objects": {"a": {"box_2d": [1, 2, 3.5, 4], "name": "x"}}}', [Box(1, 2, 3.5, 4, "x")]),
        ('one {"box_2d": [1, 2, 3, 4]} and [1, {"box_2d": [5, 6, 7, 8]}]', [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]),
        ('{"box_2d": [1, 2, 3]} {"box_2d": [true, 1, 2, 3]} {"box_2d": "no"} [cut {"box', []),
        ("no boxes at all", []),
    ],
)
def test_boxes_are_found_in_any_answer(text, expected):
    assert boxes(text) == expected


def test_boxes_lie_where_the_grid_says():
    """y first, 1000 to each side: on a picture of 400 x 200 the box spans columns 80..240 and rows 20..60."""
    drawn = np.asarray(draw(Image.new("RGB", (400, 200), "white"), [Box(100, 200, 300, 600)]))
    rows, columns = np.nonzero((drawn != 255).any(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 60, 80, 240)
    assert (drawn[40, 160] == 255).all(), "only the outline is drawn"


def test_an_answer_is_drawn_into_a_file(tmp_path):
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", (100, 100), "white").save(source)
    assert draw_answer(str(source), ANSWER, out) == 2
    assert np.asarray(Image.open(out)).min() < 200
    with pytest.raises(InputError, match=r"try a name that ends in \.png"):
        draw_answer(str(source), ANSWER, tmp_path / "out.nothing")


def test_media_options_take_paths_and_urls(tmp_path):
    source = tmp_path / "in.png"
    source.write_bytes(b"x")
    assert inputs.media("image", [str(source), "https://example.com/a.png"]) == [
        Media("image", str(source)),
        Media("image", "https://example.com/a.png"),
    ]
    assert inputs.media("audio", None) == []
    with pytest.raises(MediaError, match=r"no file missing\.wav"):
        inputs.media("audio", ["missing.wav"])
    with pytest.raises(InputError, match="exactly one image to draw into, but there are 2"):
        inputs.picture([Media("image", "a"), Text("?"), Media("image", "b")])


def test_chat_commands_attach_media(tmp_path):
    source = tmp_path / "in.png"
    source.write_bytes(b"x")
    session = Session()
    for kind in ("image", "audio", "video"):
        told, speak = session.command(f"/{kind} {source}")
        assert "goes with the next message" in told and not speak
    session.ask("What are these?")
    assert [getattr(part, "kind", "text") for part in session.messages[0].content] == [
        "image",
        "audio",
        "video",
        "text",
    ]
    with pytest.raises(InputError, match="needs a path or a URL"):
        session.command("/image")


def test_boxes_from_a_models_answer(tmp_path, monkeypatch, capsys):
    """`cabochon run --image --draw` from end to end; a schema makes noise answer in boxes."""
    number = {"type": "integer", "minimum": 0, "maximum": 1000}
    box = {"box_2d": {"type": "array", "items": number, "minItems": 4, "maxItems": 4}, "label": {"enum": ["cat"]}}
    item = {"type": "object", "properties": box, "required": [*box], "additionalProperties": False}
    schema, source, out = tmp_path / "boxes.json", tmp_path / "in.png", tmp_path / "out.png"
    schema.write_text(json.dumps({"type": "array", "items": item, "minItems": 2, "maxItems": 2}))
    Image.new("RGB", (400, 200), "white").save(source)
    model = save_seeing(tmp_path / "noise")
    words = ["run", model, "Where are the cats?", "--image", source, "--draw", out, "--schema", schema]
    monkeypatch.setattr(sys, "argv", ["cabochon", *map(str, words), "--seed", "1", "--max-tokens", "400"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    assert not left.value.code, told.err
    assert f"2 boxes are drawn into {out}." in told.err.replace("\n", " ")
    drawn = np.asarray(Image.open(out))
    wanted = np.asarray(draw(Image.new("RGB", (400, 200), "white"), boxes(told.out)))
    assert drawn.shape == (200, 400, 3) and (drawn == wanted).all() and (drawn != 255).any()
