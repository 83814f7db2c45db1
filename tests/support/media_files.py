"""Small sound and video files, written as a test needs them."""

import io
import wave
from fractions import Fraction

import av
import numpy as np


def wav(samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> bytes:
    """A 16-bit PCM file; every channel gets the same sound."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(np.round(samples * 32767).astype("<i2"), channels).tobytes())
    return out.getvalue()


def movie(
    frames: int,
    rate: int | Fraction = 24,
    height: int = 48,
    width: int = 64,
    sound: np.ndarray | None = None,
    codec: str = "mpeg4",
    container: str = "mp4",
) -> bytes:
    """A video of plain grey frames that brighten from 20 towards 220; `sound` is 16 kHz mono."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        track = file.add_stream("aac", rate=16_000, layout="mono") if sound is not None else None
        for i in range(frames):
            level = int(20 + 200 * i / frames)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((height, width, 3), level, np.uint8), "rgb24")))
        file.mux(stream.encode())
        if track is not None:
            frame = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), "fltp", "mono")
            frame.sample_rate = 16_000
            file.mux(track.encode(frame))
            file.mux(track.encode())
    return out.getvalue()
