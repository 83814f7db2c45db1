"""What an exercise shows: a picture, a clip or a sound, as arrays for training and as a small file for scoring."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cabochon.media.audio import RATE


@dataclass(frozen=True)
class Shown:
    """`data`: pixels [H, W, 3] uint8; frames [n, H, W, 3] uint8, one a second; samples [N] float32 at 16 kHz
    (or, in training, log-mel frames [n, 128])."""

    kind: Literal["image", "video", "audio"]
    data: NDArray[Any]

    def data_url(self) -> str:
        """PNG, lossless H.264 or Opus."""
        mime, data = {"image": _png, "video": _mp4, "audio": _opus}[self.kind](self.data)
        return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _png(pixels: NDArray[np.uint8]) -> tuple[str, bytes]:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return "image/png", out.getvalue()


def _mp4(frames: NDArray[np.uint8]) -> tuple[str, bytes]:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=1, options={"crf": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.time_base = "rgb24", Fraction(1)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return "video/mp4", out.getvalue()


def _opus(samples: NDArray[np.float32]) -> tuple[str, bytes]:
    whole = (samples.clip(-1, 1) * 32767).round().astype("<i2")
    out = io.BytesIO()
    with av.open(out, "w", format="ogg", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libopus", rate=RATE, layout="mono", options={"b": "24k"})
        frame = av.AudioFrame.from_ndarray(whole[None], "s16", "mono")
        frame.rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return "audio/ogg", out.getvalue()
