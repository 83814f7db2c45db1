"""Sound: the bytes of any container and codec -> 16 kHz mono samples -> what a model hears.

Models with an audio tower take the logarithm of mel magnitudes, 100 frames a second, four to a soft token; the
encoder-free one takes raw samples, 640 to a soft token. Both make 25 soft tokens a second.

Only frames that lie wholly within the sound are made. The published extractor pads to a multiple of 128 samples and
zeroes what the padding touched; its mask then drops exactly the frames that are missing here.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import MediaError
from .container import open_container

if TYPE_CHECKING:
    import av

Samples = NDArray[np.float32]

RATE = 16_000
CLIP_SECONDS = 30.0
"""The longest sound that the models take in one piece."""
FRAME, HOP, FFT, MELS = 320, 160, 512, 128
FLOOR = 1e-3
SAMPLES_PER_TOKEN = 640
"""Of the encoder-free model."""


def read_audio(data: bytes, max_seconds: float) -> Samples:
    """All channels of the first sound track mixed down to [N] in -1..1 at 16 kHz.

    Raises `MediaError` for data without a readable sound track, an empty one, and one of more than `max_seconds`;
    decoding stops there, whatever the header claims.
    """
    limit = int(max_seconds * RATE)
    parts: list[Samples] = []
    count = 0
    try:
        with open_container(data) as container:
            if not container.streams.audio:
                raise MediaError(f"The data ({len(data):,} bytes) has no sound track.")
            for part in _resampled(container):
                parts.append(part)
                count += len(part)
                if count > limit:
                    raise MediaError(
                        f"The sound is longer than {max_seconds:g} seconds, the most that is allowed; cut it, or ask "
                        "for it to be split."
                    )
    except MediaError:
        raise
    except Exception as error:  # foreign bytes: PyAV raises its own errors, OSError, ValueError and MemoryError
        raise MediaError(f"The data ({len(data):,} bytes) can't be read as sound.") from error
    if not count:
        raise MediaError("The sound is empty.")
    samples = np.concatenate(parts)
    return samples if np.isfinite(samples).all() else np.nan_to_num(samples, posinf=1.0, neginf=-1.0)


def _resampled(container: av.container.InputContainer) -> Iterator[Samples]:
    """Channels are averaged here: FFmpeg's own downmix of two equal channels comes out louder by the root of two."""
    import av

    resampler = av.AudioResampler(format="fltp", rate=RATE)
    for frame in chain(container.decode(audio=0), [None]):
        for piece in resampler.resample(frame):
            yield piece.to_ndarray().mean(0, dtype=np.float32)


def windows(samples: Samples, overlap_seconds: float = 1.0) -> list[Samples]:
    """The sound in pieces of at most 30 seconds; neighbours share `overlap_seconds`, so that no word is cut in both."""
    size = int(CLIP_SECONDS * RATE)
    if len(samples) <= size:
        return [samples]
    step = size - int(overlap_seconds * RATE)
    starts = range(0, len(samples) - int(overlap_seconds * RATE), step)
    return [samples[start : start + size] for start in starts]


def at_pauses(samples: Samples) -> list[Samples]:
    """The sound in pieces of at most 30 seconds, cut in the quietest tenth of a second of each one's last five."""
    size, blink = int(CLIP_SECONDS * RATE), RATE // 10
    pieces = []
    while len(samples) > size:
        loudness = np.square(samples[size - 5 * RATE : size].astype(np.float64)).reshape(-1, blink).sum(1)
        cut = size - 5 * RATE + int(loudness.argmin()) * blink + blink // 2
        pieces.append(samples[:cut])
        samples = samples[cut:]
    return [*pieces, samples]


def to_wav(samples: Samples) -> bytes:
    """A 16-bit file of [N] samples at 16 kHz."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return out.getvalue()


def mel_frames(samples: int) -> int:
    """How many mel frames a sound of that many samples has."""
    return max(0, samples - 1) // HOP


def soft_tokens(samples: int, *, tower: bool) -> int:
    """How many soft tokens a sound becomes: a quarter of its mel frames, or one for each 640 raw samples."""
    return -(-mel_frames(samples) // 4) if tower else -(-samples // SAMPLES_PER_TOKEN)


@cache
def mel_filters() -> NDArray[np.float64]:
    """[FFT / 2 + 1, MELS]: triangles with corners evenly spaced on the mel scale 2595 * log10(1 + f / 700), 0-8 kHz."""
    top = 2595.0 * np.log10(1.0 + RATE / 2 / 700.0)
    corner = 700.0 * (10.0 ** (np.linspace(0.0, top, MELS + 2) / 2595.0) - 1.0)
    distance = corner[None, :] - np.linspace(0.0, RATE / 2, FFT // 2 + 1)[:, None]
    width = np.diff(corner)
    rising, falling = -distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]
    return np.maximum(0.0, np.minimum(rising, falling))


def log_mel(samples: Samples) -> NDArray[np.float32]:
    """[N] -> [mel_frames(N), MELS]: log(mel of the magnitude spectrum + 0.001).

    Frames of 320 samples every 160, the first one half before the sound begins; periodic Hann window, FFT of 512.
    """
    count = mel_frames(len(samples))
    padded = np.concatenate([np.zeros(HOP, np.float32), samples])
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP][:count]
    window = (0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(FRAME) / FRAME)).astype(np.float32)
    magnitude = np.abs(np.fft.rfft(frames * window, n=FFT, axis=-1))
    return np.log(magnitude @ mel_filters() + FLOOR).astype(np.float32)


def raw_frames(samples: Samples) -> NDArray[np.float32]:
    """[N] -> [ceil(N / 640), 640], the last one filled up with silence."""
    missing = -len(samples) % SAMPLES_PER_TOKEN
    return np.pad(samples, (0, missing)).reshape(-1, SAMPLES_PER_TOKEN)
