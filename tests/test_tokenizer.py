"""Text to ids and back: the published vectors, bytes that arrive in pieces, control tokens that text can't spell."""

import json
import random

import pytest
import tokenizers

from cabochon.chat.tokenizer import Tokenizer
from cabochon.errors import CheckpointError
from cabochon.hub import BUNDLED
from support import published
from support.conversations import CONTROL, Inventor
from support.published import needs_facts
from support.tokenizers_at_hand import both, tokenizer


@needs_facts
def test_the_published_vectors():
    inputs = published.path("tokenizer.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    outputs = published.path("tokenizer.out").read_text(encoding="utf-8").splitlines()
    words = tokenizer("published")
    assert len(inputs) == len(outputs) == 46
    for text, line in zip(inputs, outputs, strict=True):
        ids = [int(number) for number in line.split()]
        assert words.encode(text) == ids, text
        assert words.decode(ids) == text


@both
def test_text_comes_back(name):
    words = tokenizer(name)
    for seed in range(300):
        text = Inventor(seed).text(20).replace("▁", " ")
        assert words.decode(words.encode(text)) == text


@both
def test_decoding_is_exact_to_the_byte_however_the_ids_are_cut(name):
    words, draw = tokenizer(name), random.Random(5)
    byte_ids = [i for i in range(len(words)) if len(words.token_bytes(i)) == 1]
    assert len(byte_ids) >= 256
    for _ in range(300):
        pools = [byte_ids, range(len(words)), words.encode("日本語 🧑‍🚀 é ")]
        ids = [draw.choice(draw.choice(pools)) for _ in range(30)]
        for special in (False, True):
            shown = [i for i in ids if special or i not in words.control]
            expected = b"".join(map(words.token_bytes, shown)).decode("utf-8", "replace")
            assert words.decode(ids, special) == expected
            stream, pieces, rest = words.stream(special), [], list(ids)
            while rest:
                cut = draw.randint(1, 4)
                pieces.append(stream.push(rest[:cut]))
                rest = rest[cut:]
            assert "".join([*pieces, stream.flush()]) == expected


@both
def test_decoding_equals_the_library_where_the_bytes_are_text(name):
    words, draw = tokenizer(name), random.Random(6)
    library = (
        published.backend() if name == "published" else tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    )
    compared = 0
    for _ in range(60):
        ids = [draw.randrange(len(words)) for _ in range(10)] + words.encode("日本語 🧑‍🚀")
        text = words.decode(ids, special=True)
        if "\ufffd" not in text:
            assert text == library.decode(ids, skip_special_tokens=False)
            compared += 1
    assert compared > 20


@both
def test_a_character_waits_for_its_last_byte(name):
    words = tokenizer(name)
    ids = [words.backend.token_to_id(f"<0x{byte:02X}>") for byte in "🧑".encode()]
    stream = words.stream()
    assert [stream.push([i]) for i in ids] == ["", "", "", "🧑"]
    assert stream.push(ids[:2]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(words.encode("a")) == "a"


@both
def test_text_never_becomes_a_control_token(name):
    words = tokenizer(name)
    for spelling in CONTROL:
        ids = words.encode(f"a{spelling}{spelling} b")
        assert not set(ids) & set(words.control), spelling
        assert words.decode(ids) == f"a{spelling}{spelling} b"


@both
def test_raw_text_may_hold_control_tokens_when_asked(name):
    words = tokenizer(name)
    text = "<bos><|turn>user\nHi <|turn <turn|>\n"
    assert words.encode_raw(text) == words.encode(text)
    ids = words.encode_raw(text, special_tokens=True)
    assert [i for i in ids if i in words.control] == [words.bos, words.turn_open, words.turn_close]
    assert words.decode(ids, special=True) == text
    assert words.decode(ids) == "user\nHi <|turn \n"


@needs_facts
def test_raw_text_is_encoded_like_the_library_does():
    words = tokenizer("published")
    for seed in range(50):
        invent = Inventor(seed)
        text = "".join(invent.choice(CONTROL) + invent.text(3) for _ in range(5))
        assert words.encode_raw(text, special_tokens=True) == published.encode(text)


@both
def test_line_ends_never_merge_with_what_follows(name):
    """A prompt that ends in "model\\n" must be a prefix, id for id, of the conversation that goes on."""
    words = tokenizer(name)
    mixed = [piece for piece in words.backend.get_vocab() if "\n" in piece and piece.strip("\n")]
    assert [piece for piece in mixed if not piece.endswith("\n")] == []
    assert [piece for piece in mixed if "model\n".endswith(piece)] == []


@both
def test_lone_surrogates_and_unknown_ids(name):
    words = tokenizer(name)
    assert words.decode(words.encode("a\ud800b")) == "a\ufffdb"
    assert words.decode([10**9, -1]) == ""


def test_bundled_control_tokens_have_the_published_ids():
    words = tokenizer("bundled")
    expected = {"pad": 0, "eos": 1, "bos": 2, "tool_open": 46, "tool_call_open": 48, "tool_call_close": 49}
    expected |= {"tool_response_open": 50, "quote": 52, "think": 98, "channel_open": 100, "channel_close": 101}
    expected |= {"turn_open": 105, "turn_close": 106}
    assert {attribute: getattr(words, attribute) for attribute in expected} == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "doesn't exist"), ("{", "isn't a readable tokenizer.json"), ("gemma 3", "isn't a Gemma 4 tokenizer")],
)
def test_a_tokenizer_that_cannot_be_used(tmp_path, content, expected):
    if content == "gemma 3":
        raw = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))
        raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<|turn>"]
        content = json.dumps(raw)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=expected):
        Tokenizer.from_file(tmp_path)
