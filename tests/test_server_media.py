"""Images, videos and sounds over HTTP, by every protocol, honest and hostile."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from cabochon.llm import AsyncLLM
from cabochon.media.image import soft_tokens
from cabochon.media.source import Policy
from support.hostile_media import hostile_files, picture
from support.hostile_server import hostile_server
from support.media_files import movie, wav
from support.speaking import save_seeing
from support.stand import NAME, post, running

CAP = 560
SOUND = wav((np.sin(np.arange(16_000) / 9) / 3).astype(np.float32))
HOSTILE = hostile_files()


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Iterator[AsyncLLM]:
    folder = tmp_path_factory.mktemp("media")
    (folder / "picture.png").write_bytes(picture())
    policy = Policy(folder=folder, max_image_tokens=CAP, max_pixels=3_000_000, max_video_seconds=30, seconds=1)
    llm = AsyncLLM(save_seeing(folder / NAME), policy=policy, max_num_seqs=8, max_model_len=4096)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def base(llm: AsyncLLM) -> Iterator[str]:
    with running(llm, max_body_bytes=64 << 20, max_output_tokens=4, media_limits={"image": 3}) as base:
        yield base


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chat(base: str, *parts: dict[str, Any], **more: Any) -> httpx.Response:
    message = {"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}
    return post(base, "/v1/chat/completions", {"messages": [message], "max_tokens": 2, "seed": 1, **more})


def prompt_tokens(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return int(usage.get("prompt_tokens", usage.get("input_tokens", -1)))


def image_part(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(data), **more}}


def test_the_same_picture_at_every_budget_shows_in_usage(base):
    data = picture(size=(640, 480))
    bare = prompt_tokens(chat(base))
    for budget in (70, 140, 280, 560):
        count = soft_tokens(480, 640, budget)
        for answer in (
            chat(base, {**image_part(data), "max_soft_tokens": budget}),
            chat(base, image_part(data), mm_processor_kwargs={"max_soft_tokens": budget}),
        ):
            assert prompt_tokens(answer) == bare + count + 2
    for detail, budget in (("low", 70), ("high", CAP), ("auto", 280)):
        assert prompt_tokens(chat(base, image_part(data, detail=detail))) == bare + soft_tokens(480, 640, budget) + 2


def test_the_smallest_and_the_largest_budget(tmp_path):
    """The same picture at 70 and at 1120 tokens, on a server whose cap is the model's own."""
    data = picture(size=(2000, 1500))
    llm = AsyncLLM(save_seeing(tmp_path / NAME), max_model_len=4096)
    with running(llm) as base:
        bare = prompt_tokens(chat(base))
        parts = {budget: {**image_part(data), "max_soft_tokens": budget} for budget in (70, 1120)}
        seen = {budget: prompt_tokens(chat(base, part)) - bare - 2 for budget, part in parts.items()}
    llm.close()
    assert seen == {70: soft_tokens(1500, 2000, 70), 1120: soft_tokens(1500, 2000, 1120)}
    assert seen == {70: 9 * 7, 1120: 38 * 28}  # cells of 48 pixels: 70 and 1120 of them allow 464 x 348 and 1855 x 1391


def test_a_budget_above_the_cap_is_refused_with_its_number(base):
    answer = chat(base, {**image_part(picture()), "max_soft_tokens": 1120})
    assert answer.status_code == 400
    assert "max_soft_tokens is 1120, but this server allows at most 560" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        ({"type": "input_audio", "input_audio": {"data": base64.b64encode(SOUND).decode(), "format": "wav"}}, 25 + 2),
        ({"type": "audio_url", "audio_url": {"url": url(SOUND, "audio/wav")}}, 25 + 2),
        ({"type": "video_url", "video_url": {"url": url(movie(2, 1, height=48, width=48))}}, 2 * (64 + 2 + 6) + 1),
        (
            {"type": "image_url", "image_url": {"url": "picture.png"}, "max_soft_tokens": 70},
            soft_tokens(30, 40, 70) + 2,
        ),
    ],
)
def test_every_kind_of_part(base, part, tokens):
    assert prompt_tokens(chat(base, part)) == prompt_tokens(chat(base)) + tokens


def test_many_parts_and_their_limit(base):
    small = {**image_part(picture()), "max_soft_tokens": 70}
    assert chat(base, small, small, small).status_code == 200
    answer = chat(base, *[small] * 4)
    assert answer.status_code == 400 and "4 image parts, but 3 is the most" in answer.text


def test_anthropic_and_responses_take_images(base):
    data = base64.b64encode(picture()).decode()
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    body = {
        "model": NAME,
        "max_tokens": 2,
        "messages": [{"role": "user", "content": [block, {"type": "text", "text": "?"}]}],
    }
    count = soft_tokens(30, 40, 280)
    assert prompt_tokens(post(base, "/v1/messages", body)) > count
    ask = [{"role": "user", "content": [{"type": "input_image", "image_url": url(picture())}]}]
    assert prompt_tokens(post(base, "/v1/responses", {"model": NAME, "input": ask, "max_output_tokens": 2})) > count


def test_images_inside_tool_results(base):
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [image_part(picture()), {"type": "text", "text": "seen"}]},
    ]
    answer = post(base, "/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    assert prompt_tokens(answer) > soft_tokens(30, 40, 280)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_a_400_and_the_server_lives(base, name):
    kind, data = HOSTILE[name]
    answer = chat(base, {"type": f"{kind}_url", f"{kind}_url": {"url": url(data)}})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400, (name, answer.text)
    assert message.endswith(".") and "\n" not in message and len(message) < 400
    assert httpx.get(f"{base}/health").status_code == 200


def test_forbidden_and_misbehaving_addresses_are_a_400(base):
    with hostile_server(picture()) as (inside, asked):
        for where in (f"{inside}/file", "http://169.254.169.254/latest", "file:///etc/hostname", "/etc/hostname"):
            answer = chat(base, {"type": "image_url", "image_url": {"url": where}})
            assert answer.status_code == 400, answer.text
            assert "hostname" not in answer.json()["error"]["message"].replace("file /etc/hostname", "")
        assert asked == []
    assert chat(base).status_code == 200


def speech(base: str, task: str, data: bytes = SOUND, **fields: Any) -> httpx.Response:
    files = {"file": ("speech.wav", data, "audio/wav")}
    return httpx.post(f"{base}/v1/audio/{task}", files=files, data={"model": NAME, **fields}, timeout=60)


def test_transcriptions_whole_streamed_and_long(base):
    whole = speech(base, "transcriptions", language="en")
    assert whole.status_code == 200, whole.text
    answer = whole.json()
    assert set(answer) == {"text", "usage"} and answer["usage"]["input_tokens"] > 25
    streamed = speech(base, "transcriptions", language="en", stream="true")
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "transcript.text.done" and events[-1]["text"] == answer["text"]
    assert "".join(e["delta"] for e in events[:-1]).strip() == answer["text"]
    assert speech(base, "transcriptions", response_format="text").text.strip() is not None
    verbose = speech(base, "transcriptions", response_format="verbose_json", language="de").json()
    assert (verbose["duration"], verbose["language"], verbose["task"]) == (1.0, "german", "transcribe")
    long = wav((np.random.default_rng(0).standard_normal(16_000 * 40) / 9).clip(-1, 1).astype(np.float32))
    many = speech(base, "transcriptions", data=long).json()
    assert many["usage"]["input_tokens"] > 1000


def test_translations(base):
    answer = speech(base, "translations")
    assert answer.status_code == 200 and isinstance(answer.json()["text"], str)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language": "klingon"}, "ISO 639-1"),
        ({"response_format": "srt"}, "gives no times"),
        ({"model": "whisper-1"}, "is not served here"),
        ({"temperature": "9"}, "temperature"),
    ],
)
def test_wrong_speech_requests(base, fields, message):
    answer = speech(base, "transcriptions", **fields)
    assert answer.status_code in (400, 404) and message in answer.json()["error"]["message"]


def test_speech_that_is_none(base):
    answer = speech(base, "transcriptions", data=b"not a sound")
    assert answer.status_code == 400 and "can't be read as sound" in answer.json()["error"]["message"]
    assert httpx.post(f"{base}/v1/audio/transcriptions", data={"model": NAME}).status_code == 400
