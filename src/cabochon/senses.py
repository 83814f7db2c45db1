"""Where text and media meet: the media parts of a rendered prompt become runs of soft tokens.

The renderer leaves one placeholder per part. Here each part is fetched, decoded and cut, the placeholder grows into the
tokens that the published processor writes (markers, one soft token per feature, time stamps before video frames), and
the engine gets a `SoftSpan` for every run with the arrays that its features will be made of. All counts are known here,
before any network runs. Fetching and decoding block; a server calls `expand` in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from .chat.messages import Media, MediaSlot, Prompt
from .chat.tokenizer import Tokenizer
from .config import AudioConfig, ModelConfig, UnifiedVisionConfig
from .engine.request import SoftSpan
from .errors import MediaError
from .media import audio, image, video
from .media.source import Policy, fetch

VERBS = {"image": "see images", "video": "see videos", "audio": "hear sound"}
"""Kind of media -> what a model without it can't do."""
OPTIONS = {
    "image": {"max_soft_tokens", "detail"},
    "video": {"max_soft_tokens", "detail", "fps", "max_frames", "num_frames", "sound"},
    "audio": {"split"},
}
"""What a content part of each kind may ask for; `format` and `mime_type` are passed over, files tell it themselves."""
TEXT_FIRST = "An image or video follows text in a message; the models were trained with media first. The order is kept."
PASSED_OVER = {"format", "mime_type", "media_type"}


@dataclass(frozen=True, slots=True)
class Piece:
    """One run of soft tokens: `stamp`, a begin marker, `length` times the kind's soft token, an end marker."""

    kind: str
    length: int
    item: Any
    """What `model.encode` takes."""
    stamp: str = ""
    """Text before the marker: a video frame's time."""

    @property
    def key(self) -> bytes:
        """Hash of exactly what is encoded, so the budget is part of it."""
        patches = isinstance(self.item, image.Patches)
        values = self.item.values if patches else self.item
        head = f"{self.kind} {self.item.rows if patches else 0} {values.shape} {values.dtype} ".encode()
        return blake2b(head + memoryview(values).cast("B").tobytes(), digest_size=16).digest()


class Senses:
    """Eyes and ears of one model under one policy. Safe to share between threads."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, policy: Policy) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.policy = policy
        self.tile = image.TILE if isinstance(config.vision, UnifiedVisionConfig) else image.TILE // 3
        self.budget = config.vision.soft_tokens if config.vision else image.DEFAULT_BUDGET
        """Soft tokens of a picture that doesn't say."""
        self.tower = isinstance(config.audio, AudioConfig)
        self.kinds = {kind for kind in VERBS if (config.audio if kind == "audio" else config.vision) is not None}

    def expand(self, prompt: Prompt, defaults: Mapping[str, Any] | None = None) -> tuple[Prompt, tuple[SoftSpan, ...]]:
        """The prompt with every placeholder grown to its full length, and the spans of its soft tokens.

        `defaults` are options for parts that don't say themselves (vLLM's `mm_processor_kwargs`); a budget among them
        is meant for images, the frames of a video keep theirs. Boundaries and slots move along. Raises `MediaError`
        naming the part for anything that can't be used.
        """
        ids: list[int] = []
        spans: list[SoftSpan] = []
        slots: list[MediaSlot] = []
        grown: list[tuple[int, int]] = []  # (old end of the placeholder, how much longer the prompt is after it)
        done = 0
        for number, slot in enumerate(prompt.media, 1):
            ids += prompt.token_ids[done : slot.start]
            start, done = len(ids), slot.start + slot.length
            try:
                pieces = self.perceive(slot.media, defaults or {})
            except MediaError as error:
                raise MediaError(f"Media part {number} ({slot.media.kind}): {error}") from error
            for place, piece in enumerate(pieces):
                self._write(piece, place, ids, spans)
            slots.append(MediaSlot(slot.media, start, len(ids) - start))
            grown.append((done, len(ids) - done))
        ids += prompt.token_ids[done:]

        def moved(at: int) -> int:
            return at + next((more for end, more in reversed(grown) if end <= at), 0)

        expanded = replace(
            prompt,
            token_ids=tuple(ids),
            boundaries=tuple(map(moved, prompt.boundaries)),
            media=tuple(slots),
            notices=(*prompt.notices, *([TEXT_FIRST] if self._text_comes_first(prompt) else ())),
            written=tuple((moved(start), moved(end)) for start, end in prompt.written),
        )
        return expanded, tuple(spans)

    def _text_comes_first(self, prompt: Prompt) -> bool:
        """Does a user's turn show a picture or video after text? (Sound comes after it in the published prompts.)"""
        opening = [self.tokenizer.turn_open, *self.tokenizer.encode("user\n")]
        placeholders = {slot.start for slot in prompt.media}
        for slot in prompt.media:
            before = [i for i in range(slot.start) if i not in placeholders]
            begin = next((at for at in reversed(before) if prompt.token_ids[at] == self.tokenizer.turn_open), 0)
            turn = [prompt.token_ids[at] for at in before if at >= begin]
            if slot.media.kind != "audio" and turn[: len(opening)] == opening and len(turn) > len(opening):
                return True
        return False

    def _write(self, piece: Piece, place: int, ids: list[int], spans: list[SoftSpan]) -> None:
        """Append a piece's tokens to `ids`; video frames are separated by one space."""
        tokenizer = self.tokenizer
        if piece.stamp:
            ids += tokenizer.encode(f"{' ' if place else ''}{piece.stamp} ")
        names = ("audio_begin", "audio_end") if piece.kind == "audio" else ("image_begin", "image_end")
        begin, soft, end = (getattr(tokenizer, name) for name in (names[0], piece.kind, names[1]))
        if begin is None or soft is None or end is None:
            raise MediaError(f"This checkpoint's tokenizer has no tokens for {piece.kind} input.")
        two_way = self.config.text.two_way_spans and piece.kind != "audio"
        spans.append(SoftSpan(len(ids) + 1, piece.length, piece.key, piece.item, two_way))
        ids += [begin, *[soft] * piece.length, end]

    def perceive(self, media: Media, defaults: Mapping[str, Any]) -> list[Piece]:
        """Fetch, decode and cut one part."""
        if media.kind not in self.kinds:
            able = " and ".join(["text", *sorted(self.kinds)]) if self.kinds else "text only"
            raise MediaError(f"This model can't {VERBS[media.kind]}; it takes {able}.")
        known = OPTIONS[media.kind]
        strange = sorted(set(media.options) - known - PASSED_OVER)
        if strange:
            raise MediaError(f"The option {strange[0]!r} is unknown; it may have {', '.join(sorted(known))}.")
        general = known if media.kind != "video" else known - {"max_soft_tokens", "detail"}
        options = {name: value for name, value in defaults.items() if name in general} | dict(media.options)
        data = fetch(media.source, self.policy)
        if media.kind == "image":
            return [self._image(data, options)]
        return list(self._video(data, options) if media.kind == "video" else self._audio(data, options))

    def _image(self, data: bytes, options: dict[str, Any]) -> Piece:
        pixels = image.open_image(data, self.policy.max_pixels)
        height, width = pixels.shape[:2]
        budget = image.choose_budget(height, width, options, self.policy.max_image_tokens, self.budget)
        return self._picture("image", image.resize(pixels, budget))

    def _picture(self, kind: str, resized: image.Pixels, stamp: str = "") -> Piece:
        count = resized.shape[0] * resized.shape[1] // image.TILE**2
        return Piece(kind, count, image.cut(resized, self.tile), stamp)

    def _video(self, data: bytes, options: dict[str, Any]) -> Iterator[Piece]:
        policy = self.policy
        budget = min(video.DEFAULT_BUDGET, self.budget)
        if "max_soft_tokens" in options or "detail" in options:
            budget = image.choose_budget(10**5, 10**5, options, policy.max_image_tokens, self.budget)
        frames = options.get("max_frames", options.get("num_frames"))
        sampling = video.Sampling(
            _number(options, "max_frames", frames, 1, policy.max_frames, whole=True) or video.DEFAULT_FRAMES,
            _number(options, "fps", options.get("fps"), 1e-3, 1000.0),
            budget,
        )
        seconds = policy.max_video_seconds
        for frame in video.read_video(data, sampling, max_pixels=policy.max_pixels, max_seconds=seconds):
            yield self._picture("video", frame.pixels, frame.stamp)
        if options.get("sound"):
            if "audio" not in self.kinds:
                raise MediaError("The video's sound was asked for, but this model can't hear sound.")
            yield from self._audio(data, options)

    def _audio(self, data: bytes, options: dict[str, Any]) -> Iterator[Piece]:
        longest = self.policy.max_audio_seconds if options.get("split") else audio.CLIP_SECONDS
        for part in audio.windows(audio.read_audio(data, longest)):
            count = audio.soft_tokens(len(part), tower=self.tower)
            if not count:
                raise MediaError(f"The sound has only {len(part)} samples at 16 kHz, less than one frame of 10 ms.")
            yield Piece("audio", count, audio.log_mel(part) if self.tower else audio.raw_frames(part))


def _number(options: Mapping[str, Any], name: str, value: Any, least: float, most: float, whole: bool = False) -> Any:
    """A number from a part's options, None if absent."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise MediaError(f"{name} is {value!r}, but must be {kind} from {least:g} to {most:g}.")
    return value
