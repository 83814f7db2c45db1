"""Opens video and sound containers from memory, and only those that hold their data themselves.

FFmpeg also reads playlists and scripts (HLS, DASH, concat, SDP, image sequences) that name other files and addresses;
a stranger's upload could use them to read ours. So the demuxer must be one of a list, and no protocol is allowed.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,flac,flv,gif,h264,hevc,ivf,m4v,matroska,webm,mjpeg,mov,mp4,m4a,3gp,3g2,"
    "mp3,mpeg,mpegts,mpegvideo,mxf,ogg,opus,rm,tta,voc,w64,wav,wv"
)


def open_container(data: bytes) -> av.container.InputContainer:
    """An opened container; raises whatever FFmpeg raises for data that is not one."""
    import av  # with all of FFmpeg: who sends no sound and no video should not wait for it

    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    return av.open(io.BytesIO(data), mode="r", metadata_errors="ignore", options=options)
