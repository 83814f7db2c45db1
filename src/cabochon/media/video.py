"""Video: the bytes of any container and codec -> a few frames, each with the second it was shown at.

Frames are taken evenly over the whole clip, 32 of them unless asked otherwise; a clip with fewer gives all it has.
Packets are counted first, which costs no decoding and does not trust the header; then one pass decodes up to the last
wanted frame and keeps only those wanted, already scaled down to the budget, so that memory stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MediaError
from . import image
from .container import open_container
from .image import Pixels

if TYPE_CHECKING:
    import av

DEFAULT_FRAMES = 32
DEFAULT_BUDGET = 70
UNKNOWN_RATE = 24.0
"""Frames per second assumed where a container doesn't say."""
FASTEST_RATE = 240.0
"""Frames per second of the fastest clips that are taken at full length: a header's rate may lie, a count can't."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of a video, resized to its budget, and the time that stands before it in the prompt."""

    pixels: Pixels
    seconds: float

    @property
    def stamp(self) -> str:
        """mm:ss, rounded down; minutes may exceed 59."""
        return f"{int(self.seconds // 60):02d}:{int(self.seconds % 60):02d}"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames are taken: `fps` of them per second, or else `frames` evenly spread; never more than `frames`."""

    frames: int = DEFAULT_FRAMES
    fps: float | None = None
    budget: int = DEFAULT_BUDGET

    def pick(self, total: int, rate: float) -> list[int]:
        """The frames to take out of `total` shown at `rate` per second: i * total // count, as published."""
        count = self.frames if self.fps is None else min(self.frames, max(1, int(total / rate * self.fps)))
        count = min(count, total)
        return [i * total // count for i in range(count)]


def read_video(data: bytes, sampling: Sampling, *, max_pixels: int, max_seconds: float) -> list[Frame]:
    """The sampled frames of the first video track.

    Raises `MediaError` for data without a readable video track or without frames, for frames of more than `max_pixels`
    and for clips of more than `max_seconds`, or of more frames than those can hold.
    """
    try:
        with open_container(data) as container:
            if not container.streams.video:
                raise MediaError(f"The data ({len(data):,} bytes) has no video track.")
            stream = container.streams.video[0]
            pixels = stream.width * stream.height
            if pixels > max_pixels:
                raise MediaError(
                    f"The video's frames are {stream.width} x {stream.height} = {pixels:,} pixels, but at most "
                    f"{max_pixels:,} are allowed; scale it down."
                )
            rate = float(stream.average_rate or 0) or UNKNOWN_RATE
            most = int(max_seconds * FASTEST_RATE)
            total = sum(1 for _ in islice((packet for packet in container.demux(stream) if packet.size), most + 1))
        if total > most:
            raise MediaError(
                f"The video has more than {most:,} frames, the most that are allowed for {max_seconds:g} seconds, "
                f"whatever rate it states; cut it."
            )
        if total / rate > max_seconds:
            raise MediaError(
                f"The video is {total / rate:.0f} seconds long, but at most {max_seconds:g} are allowed; cut it."
            )
        wanted = sampling.pick(total, rate) if total else []
        shown = _decoded(data, wanted, max_pixels)
        frames = [Frame(image.resize(pixels, sampling.budget), index / rate) for index, pixels in shown]
    except MediaError:
        raise
    except Exception as error:  # foreign bytes: PyAV raises its own errors, OSError, ValueError and MemoryError
        raise MediaError(f"The data ({len(data):,} bytes) can't be read as video.") from error
    if not frames:
        raise MediaError("The video has no frames that can be decoded.")
    return frames


def _decoded(data: bytes, wanted: list[int], max_pixels: int) -> Iterator[tuple[int, Pixels]]:
    """(index, RGB [H, W, 3]) of the wanted frames; a damaged end gives fewer, and so do frames that grow too large."""
    import av

    missing = set(wanted)
    with open_container(data) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        # Later frames may be larger than the header says. (Codecs add edges, and count them.)
        whole = 2 * (stream.width + 128) * (stream.height + 128)
        stream.codec_context.options = {"max_pixels": str(max(max_pixels, whole))}
        try:
            for index, frame in enumerate(container.decode(stream)):
                if index in missing:
                    missing.discard(index)
                    yield index, _upright(frame)
                if not missing:
                    return
        except av.FFmpegError:
            if len(missing) == len(wanted):
                raise


def _upright(frame: av.VideoFrame) -> Pixels:
    """RGB [H, W, 3]; phones store the picture lying and note by how much to turn it (counter-clockwise degrees)."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))
