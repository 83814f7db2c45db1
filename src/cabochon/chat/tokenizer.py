"""Text to token ids and back, byte for byte.

Two things are unusual. First, text is always encoded with control tokens off: `<|turn>` typed by a user becomes the
letters `<`, `|`, `turn`, `>`, never id 105; only code that names a control token by attribute (`tokenizer.turn_open`)
can put one into a prompt. Second, decoding goes through bytes: every id is a fixed byte string, so that a stream of
tokens joins into UTF-8 without looking back, where the library's own decoder needs the whole run of byte tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend

from ..errors import CheckpointError

CONTROL = {
    "pad": "<pad>",
    "eos": "<eos>",
    "bos": "<bos>",
    "tool_open": "<|tool>",
    "tool_close": "<tool|>",
    "tool_call_open": "<|tool_call>",
    "tool_call_close": "<tool_call|>",
    "tool_response_open": "<|tool_response>",
    "tool_response_close": "<tool_response|>",
    "quote": '<|"|>',
    "think": "<|think|>",
    "channel_open": "<|channel>",
    "channel_close": "<channel|>",
    "turn_open": "<|turn>",
    "turn_close": "<turn|>",
}
"""Attribute of `Tokenizer` -> the token's spelling in tokenizer.json. Every Gemma 4 checkpoint has these."""

MEDIA_CONTROL = {
    "image": "<|image|>",
    "image_begin": "<|image>",
    "image_end": "<image|>",
    "audio": "<|audio|>",
    "audio_begin": "<|audio>",
    "audio_end": "<audio|>",
    "video": "<|video|>",
}
"""The same for media; an attribute is None where the checkpoint lacks the token (drafters have no video)."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A checkpoint's tokenizer.json. Safe to share between threads."""

    pad: int
    eos: int
    bos: int
    tool_open: int
    tool_close: int
    tool_call_open: int
    tool_call_close: int
    tool_response_open: int
    tool_response_close: int
    quote: int
    think: int
    channel_open: int
    channel_close: int
    turn_open: int
    turn_close: int
    image: int | None
    image_begin: int | None
    image_end: int | None
    audio: int | None
    audio_begin: int | None
    audio_end: int | None
    video: int | None

    def __init__(self, backend: Backend, name: str = "tokenizer.json") -> None:
        self.backend = backend
        # From here on the library takes special tokens in text for ordinary text; `encode_raw` splits them off itself.
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self.control: dict[int, str] = {i: token.content for i, token in added.items() if token.special}
        """Every control token: id -> spelling."""
        ids = {spelling: i for i, spelling in self.control.items()}
        missing = [spelling for spelling in CONTROL.values() if spelling not in ids]
        if missing:
            raise CheckpointError(
                f"{name} has no {', '.join(missing)}, so it isn't a Gemma 4 tokenizer (one of Gemma 3 doesn't fit)."
            )
        for attribute, spelling in (CONTROL | MEDIA_CONTROL).items():
            setattr(self, attribute, ids.get(spelling))
        self._ids = ids
        self._split = re.compile("|".join(re.escape(s) for s in sorted(ids, key=len, reverse=True)))
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder.

        Raises:
            CheckpointError: the file is missing, damaged or not of Gemma 4's kind.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"{path} doesn't exist; a checkpoint needs a tokenizer.json to read and write text.")
        return cls._read(lambda: Backend.from_file(str(path)), str(path))  # a Python string would cost a quarter more

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer.json") -> Tokenizer:
        """Read the content of a tokenizer.json; `name` is for messages. Raises `CheckpointError` as `from_file`."""
        return cls._read(lambda: Backend.from_str(text), name)

    @classmethod
    def _read(cls, backend: Callable[[], Backend], name: str) -> Tokenizer:
        try:
            return cls(backend(), name)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{name} isn't a readable tokenizer.json ({error}).") from None

    def __len__(self) -> int:
        """Ids from 0 up to this are known (V may be larger)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Nothing in it becomes a control token, and no BOS is added."""
        # Lone surrogates (JSON's "\ud800") have no UTF-8; they become the replacement character.
        ids: list[int] = self.backend.encode(_SURROGATE.sub("\ufffd", text), add_special_tokens=False).ids
        return ids

    def encode_raw(self, text: str, special_tokens: bool = False) -> list[int]:
        """Ids of a raw prompt; with `special_tokens` the spellings of control tokens count as the tokens."""
        if not special_tokens:
            return self.encode(text)
        ids, start = [], 0
        for found in self._split.finditer(text):
            ids += self.encode(text[start : found.start()])
            ids.append(self._ids[found.group()])
            start = found.end()
        return ids + self.encode(text[start:])

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of token ids; control tokens are spelt out with `special`, else dropped."""
        stream = self.stream(special)
        return stream.push(ids) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for: a control token's spelling, a byte token's byte, else UTF-8 text.

        Ids beyond the vocabulary (models pad their embedding) stand for nothing.
        """
        known = self._bytes.get(token_id)
        if known is None:
            piece = self.backend.id_to_token(token_id) if token_id >= 0 else None
            known = self._bytes[token_id] = b"" if piece is None else self._piece_bytes(token_id, piece)
        return known

    def _piece_bytes(self, token_id: int, piece: str) -> bytes:
        if token_id in self.control:
            return piece.encode()
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    def stream(self, special: bool = False) -> Detokenizer:
        """A detokeniser for one reply."""
        return Detokenizer(self, special)


class Detokenizer:
    """Ids in, text out, as early as the bytes allow.

    Bytes that are no UTF-8 become U+FFFD the way Python's decoder does it; the joined pieces are the same however the
    ids were cut.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids."""
        tokenizer = self._tokenizer
        shown = (i for i in ids if self._special or i not in tokenizer.control)
        return self._decoder.decode(b"".join(map(tokenizer.token_bytes, shown)))

    def flush(self) -> str:
        """What was held back: bytes of a character that never became whole."""
        held = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return held
