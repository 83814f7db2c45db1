"""Files that no honest camera wrote, one per way in which strangers' uploads go wrong."""

import io
import struct
import zlib
from fractions import Fraction

import numpy as np
from PIL import Image

from support.media_files import movie, wav

PLAYLIST = (
    b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n"
    b"#EXTINF:10,\nhttp://127.0.0.1:9/inside\n#EXT-X-ENDLIST\n"
)
SDP = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/hostname\n"
DASH = b'<?xml version="1.0"?><MPD><Period><BaseURL>http://127.0.0.1:9/</BaseURL></Period></MPD>'
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:9/x.png"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/hostname) (r) file\n"


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)).save(
        out, kind, **options
    )
    return out.getvalue()


def tone(count: int) -> np.ndarray:
    return (np.sin(np.arange(count) / 7) / 3).astype(np.float32)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bare_png(width: int, height: int, data: bytes) -> bytes:
    """A header that claims a size, with whatever for its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flipped(data: bytes, step: int) -> bytes:
    """Every `step`th byte after the header inverted."""
    body = bytearray(data)
    for at in range(64, len(body), step):
        body[at] ^= 0xFF
    return bytes(body)


def hostile_files() -> dict[str, tuple[str, bytes]]:
    """Name -> (kind of media it is sent as, bytes). Each must be refused."""
    png, jpeg, sound, film = picture(), picture("JPEG"), wav(tone(16_000)), movie(10)
    gif = picture("GIF")
    bomb = zlib.compress(bytes(1000))
    return {
        "zero bytes": ("image", b""),
        "one byte": ("image", b"\x89"),
        "text": ("image", b"hello, I am a picture"),
        "html": ("image", b"<!doctype html><html><body>404</body></html>"),
        "png signature only": ("image", png[:8]),
        "png cut in the header": ("image", png[:20]),
        "png cut in the pixels": ("image", png[: len(png) // 2]),
        "png with flipped bytes": ("image", flipped(png, 7)),
        "png of no width": ("image", bare_png(0, 10, b"")),
        "png without pixels": ("image", bare_png(10, 10, b"")),
        "png bomb by header": ("image", bare_png(60_000, 60_000, bomb)),
        "png of 2^31 pixels": ("image", bare_png(2**31 - 1, 2**31 - 1, bomb)),
        "png over the pixel limit": ("image", bare_png(9_000, 9_000, bomb)),
        "png with bad zlib": ("image", bare_png(10, 10, b"not zlib")),
        "jpeg cut": ("image", jpeg[: len(jpeg) // 2]),
        "jpeg signature only": ("image", jpeg[:4]),
        "gif cut": ("image", gif[:20]),
        "gif of no size": ("image", b"GIF89a" + bytes(20)),
        "bmp with huge size": (
            "image",
            b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 2**30, 2**30, 1, 24, 0) + bytes(20),
        ),
        "tiff with a loop of directories": ("image", b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00"),
        "webp header only": ("image", b"RIFF\x24\x00\x00\x00WEBPVP8 "),
        "ico without entries": ("image", b"\x00\x00\x01\x00\x00\x00"),
        "svg that links": ("image", SVG),
        "eps that reads files": ("image", EPS),
        "sound as image": ("image", sound),
        "video as image": ("image", film),
        "zip": ("image", b"PK\x03\x04" + bytes(60)),
        "pdf": ("image", b"%PDF-1.7\n%%EOF"),
        "audio of zero bytes": ("audio", b""),
        "audio text": ("audio", b"la la la"),
        "audio html": ("audio", b"<html>not found</html>"),
        "image as audio": ("audio", png),
        "wav of no samples": ("audio", wav(tone(0))),
        "wav header only": ("audio", sound[:44]),
        "wav header cut": ("audio", sound[:20]),
        "wav shorter than a frame": ("audio", wav(tone(100))),
        "wav at rate 1": ("audio", wav(tone(3), rate=1)),
        "wav of zero channels": ("audio", sound[:22] + b"\x00\x00" + sound[24:]),
        "wav of rate zero": ("audio", sound[:24] + bytes(4) + sound[28:]),
        "ten minutes": ("audio", wav(np.zeros(16_000 * 600, np.float32))),
        "31 seconds": ("audio", wav(np.zeros(16_000 * 31, np.float32))),
        "video without sound as audio": ("audio", film),
        "hls playlist as audio": ("audio", PLAYLIST),
        "sdp as audio": ("audio", SDP),
        "concat script as audio": ("audio", CONCAT),
        "mp3 signature only": ("audio", b"ID3\x04\x00\x00\x00\x00\x00\x00"),
        "ogg cut": ("audio", b"OggS" + bytes(30)),
        "flac signature only": ("audio", b"fLaC" + bytes(4)),
        "video of zero bytes": ("video", b""),
        "video text": ("video", b"moving pictures"),
        "image as video": ("video", png),
        "mp4 header only": ("video", film[:32]),
        "mp4 cut": ("video", film[: len(film) // 3]),
        "mp4 without frames": ("video", movie(0)),
        "video over the pixel limit": ("video", movie(1, height=2000, width=2000)),
        "video over the time limit": ("video", movie(40, rate=1, height=16, width=16)),
        "video of a frame in a thousand seconds": ("video", movie(2, Fraction(1, 1000), 16, 16, codec="libx264")),
        "video of more frames than its time holds": ("video", movie(7_300, 60_000, 16, 16)),
        "sound as video": ("video", sound),
        "hls playlist as video": ("video", PLAYLIST),
        "dash manifest as video": ("video", DASH),
        "concat script as video": ("video", CONCAT),
        "matroska signature only": ("video", b"\x1aE\xdf\xa3" + bytes(40)),
        "avi header only": ("video", b"RIFF\xff\xff\xff\x7fAVI LIST"),
    }
