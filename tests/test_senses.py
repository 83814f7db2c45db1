"""Media parts of prompts: ids equal to the published processor's, options, boundaries, refusals."""

import base64
import io
import os
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cabochon.chat.messages import Media, MediaSlot, Prompt
from cabochon.chat.template import Template
from cabochon.chat.tokenizer import Tokenizer
from cabochon.errors import InputError, MediaError
from cabochon.media.image import BUDGETS, Patches, soft_tokens
from cabochon.media.source import Policy
from cabochon.senses import Senses
from support.media_files import movie, wav
from support.toys import toy_config

FACTS = Path(os.environ.get("CABOCHON_FACTS", "/nowhere"))
needs_facts = pytest.mark.skipif(not FACTS.is_dir(), reason="needs the published tokenizer (CABOCHON_FACTS)")
WORDS = ["What is this?", "Look: ", "12:30", "a cat\n", " 00:", "Vergleiche", "日本", "x ", "...and this"]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(FACTS / "tokenizer.json")


def senses(size: str = "E2B", **policy: object) -> Senses:
    return Senses(toy_config(size, media=True), tokenizer(), Policy(**policy))


def png(height: int, width: int, seed: int = 0) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def sound(count: int) -> bytes:
    return wav(np.sin(np.arange(count) / 9).astype(np.float32) / 3)


@cache
def clip(frames: int, rate: int) -> bytes:
    return movie(frames, rate, height=48, width=96)


class FramePicker:
    """The published video processor without torchvision: its own sampler and size rule on ready-made facts."""

    model_input_names = ()
    unused_input_names = ()

    def __call__(self, videos, **kwargs):
        from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size
        from transformers.video_utils import VideoMetadata, default_sample_indices_fn

        metadata, counts = [], []
        for (video,) in videos:
            facts = VideoMetadata(total_num_frames=len(video), fps=float(video[0, 0, 0, 0]))
            facts.frames_indices = default_sample_indices_fn(facts, num_frames=min(32, len(video)))
            height, width = get_aspect_ratio_preserving_size(48, 96, 16, 70 * 9, 3)
            counts.append(height * width // 2304)
            metadata.append(facts)
        return {"num_soft_tokens_per_video": counts, "video_metadata": metadata}


@cache
def published_processor():
    import json

    from transformers import PreTrainedTokenizerFast
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    class WithoutTorchvision(Gemma4Processor):
        def check_argument_for_proper_class(self, *args, **kwargs):
            """The picker above is no BaseVideoProcessor, which can't be imported here."""

    config = json.loads((FACTS / "configs/tokenizer_config.E4B-it_2095.json").read_text())
    names = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(FACTS / "tokenizer.json"), extra_special_tokens=config["extra_special_tokens"], **names
    )
    template = (FACTS / "templates/hf_official_2026-07-09_E2B-E4B.jinja").read_text()
    return WithoutTorchvision(
        Gemma4AudioFeatureExtractor(), Gemma4ImageProcessorPil(), fast, FramePicker(), chat_template=template
    )


def conversation(draw: random.Random) -> tuple[list[dict], dict[str, list]]:
    """Messages with media of all kinds, and the same media as arrays for the published processor."""
    messages, arrays = [], {"images": [], "audio": [], "videos": []}
    for turn in range(draw.choice([1, 1, 3])):
        if turn % 2:
            messages.append({"role": "assistant", "content": draw.choice(WORDS)})
            continue
        parts = []
        for _ in range(draw.randint(1, 4)):
            kind = draw.choice(["text", "text", "image", "audio", "video"])
            if kind == "text":
                parts.append({"type": "text", "text": draw.choice(WORDS)})
            elif kind == "image":
                data = png(draw.randint(1, 90), draw.randint(1, 90), draw.randint(0, 9))
                parts.append({"type": "image", "image": data})
                arrays["images"].append(Image.open(io.BytesIO(data)))
            elif kind == "audio":
                count = draw.choice([400, 8000, 16_001])
                parts.append({"type": "audio", "audio": sound(count)})
                arrays["audio"].append(np.zeros(count, np.float32))
            else:
                frames, rate = draw.choice([(3, 1), (40, 10), (33, 24)])
                parts.append({"type": "video", "video": clip(frames, rate)})
                arrays["videos"].append([np.full((frames, 1, 1, 1), rate)])
        messages.append({"role": "user", "content": parts})
    return messages, arrays


@needs_facts
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_prompt_ids_equal_the_published_processor(count):
    """Conversations with up to eight media parts, for two budgets."""
    draw, processor = random.Random(4), published_processor()
    eyes = senses()
    seen = 0
    for _ in range(count):
        messages, arrays = conversation(draw)
        budget = draw.choice([70, 140])
        prompt, spans = eyes.expand(Template(tokenizer()).render(messages), {"max_soft_tokens": budget})
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        media = {name: [items] if name == "images" else items for name, items in arrays.items() if items}
        expected = processor(text=[text], **media, images_kwargs={"max_soft_tokens": budget}, add_special_tokens=False)[
            "input_ids"
        ][0]
        soft = {span.start + i for span in spans for i in range(span.length)}
        assert list(prompt.token_ids) == list(expected), messages
        markers = {eyes.tokenizer.image, eyes.tokenizer.audio, eyes.tokenizer.video}
        assert soft == {at for at, i in enumerate(prompt.token_ids) if i in markers}
        seen += len(spans)
    assert seen > 3 * count


@needs_facts
def test_same_picture_at_every_budget():
    data = png(300, 400)
    for budget in BUDGETS:
        messages = [{"role": "user", "content": [{"type": "image", "image": data, "max_soft_tokens": budget}]}]
        (span,) = senses().expand(Template(tokenizer()).render(messages))[1]
        assert span.length == soft_tokens(300, 400, budget)
        assert span.item.values.shape == (span.length * 9, 768)


@needs_facts
def test_boundaries_written_ranges_and_slots_move_along():
    tok = tokenizer()
    ids = (5, 6, tok.image, 7, 8, tok.audio, 9)
    slots = (MediaSlot(Media("image", png(48, 48)), 2, 1), MediaSlot(Media("audio", sound(8000)), 5, 1))
    before = Prompt(ids, boundaries=(2, 4, 7), media=slots, written=((3, 5),))
    prompt, spans = senses().expand(before, {"max_soft_tokens": 70})
    image, sounds = spans
    assert (image.length, sounds.length) == (64, 13)
    assert prompt.token_ids[:2] == (5, 6) and prompt.token_ids[67:70] == (tok.image_end, 7, 8)
    assert prompt.boundaries == (2, 2 + 66 + 1, 2 + 66 + 2 + 15 + 1)
    assert prompt.written == ((68, 70),)
    assert [(s.start, s.length) for s in prompt.media] == [(2, 66), (70, 15)]
    assert [prompt.token_ids[s.start] for s in spans] == [tok.image, tok.audio]


@needs_facts
def test_two_way_spans_are_the_large_models():
    messages = [{"role": "user", "content": [{"type": "image", "image": png(48, 48)}]}]
    prompt = Template(tokenizer()).render(messages)
    for size, two_way in (("E2B", False), ("12B", True), ("31B", True)):
        (span,) = senses(size).expand(prompt)[1]
        assert span.two_way is two_way
        assert isinstance(span.item, Patches)
        assert span.item.values.shape[1] == (6912 if size == "12B" else 768)


@needs_facts
def test_text_before_a_picture_is_kept_and_noticed():
    def notices(*parts: dict) -> tuple[str, ...]:
        return senses().expand(Template(tokenizer()).render([{"role": "user", "content": list(parts)}]))[0].notices

    text, picture = {"type": "text", "text": "What?"}, {"type": "image", "image": png(48, 48)}
    voice = {"type": "audio", "audio": sound(8000)}
    assert notices(picture, text) == notices(picture, picture, text) == notices(text, voice) == ()
    assert len(notices(text, picture)) == len(notices(picture, text, picture, picture)) == 1


@needs_facts
def test_keys_tell_content_and_budget_apart():
    def key(data: bytes, **options: object) -> bytes:
        (piece,) = senses().perceive(Media("image", data, options), {})
        return piece.key

    assert key(png(48, 48, 1)) == key(png(48, 48, 1))
    assert key(png(48, 48, 1)) != key(png(48, 48, 2))
    assert key(png(48, 48, 1)) != key(png(48, 48, 1), max_soft_tokens=70)


@needs_facts
def test_long_sound_is_split_on_request():
    pieces = senses().perceive(Media("audio", sound(16_000 * 40), {"split": True}), {})
    assert [p.length for p in pieces] == [750, 275]
    with pytest.raises(MediaError, match="longer than 30 seconds"):
        senses().perceive(Media("audio", sound(16_000 * 40)), {})


@needs_facts
def test_sound_of_a_video_on_request():
    data = movie(30, 30, sound=np.sin(np.arange(16_000)).astype(np.float32) / 4)
    assert {p.kind for p in senses().perceive(Media("video", data), {})} == {"video"}
    assert [p.kind for p in senses().perceive(Media("video", data, {"sound": True, "max_frames": 2}), {})] == [
        "video",
        "video",
        "audio",
    ]
    with pytest.raises(MediaError, match="can't hear sound"):
        senses("31B").perceive(Media("video", data, {"sound": True}), {})


@needs_facts
@pytest.mark.parametrize(
    ("size", "media", "message"),
    [
        (
            "31B",
            Media("audio", b"x"),
            r"part 1 \(audio\): This model can't hear sound; it takes text and image and video",
        ),
        (
            "E2B",
            Media("image", png(9, 9), {"zoom": 2}),
            "option 'zoom' is unknown; it may have detail, max_soft_tokens",
        ),
        ("E2B", Media("video", b"x", {"fps": -1}), "fps is -1, but must be a number from 0.001 to 1000"),
        (
            "E2B",
            Media("video", b"x", {"max_frames": 2.5}),
            "max_frames is 2.5, but must be a whole number from 1 to 128",
        ),
        ("E2B", Media("audio", sound(100)), "only 100 samples"),
        ("E2B", Media("image", "data:image/png;base64," + base64.b64encode(b"abc").decode()), "not an image"),
    ],
)
def test_refusals_name_the_part(size, media, message):
    tok = tokenizer()
    placeholder = {"image": tok.image, "audio": tok.audio, "video": tok.video}[media.kind]
    with pytest.raises(InputError, match=message):
        senses(size).expand(Prompt((5, placeholder), media=(MediaSlot(media, 1, 1),)))


def test_a_model_without_eyes_says_so():
    toy = toy_config("31B")
    with pytest.raises(MediaError, match="This model can't see images; it takes text only"):
        Senses(toy, None, Policy()).perceive(Media("image", b"x"), {})
