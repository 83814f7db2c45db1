"""The one door for foreign bytes: data URLs, http(s) URLs and files, under a policy, for library, CLI and server alike.

A URL is resolved once, every address of the answer is checked, and the connection goes to a checked address, so a name
that answers differently the second time gains nothing; redirects pass the same gate. Proxies from the environment are
not used: they would resolve the name themselves. Messages never tell what a forbidden address answered.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import os
import socket
import ssl
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urljoin, urlsplit

from ..errors import InputError, MediaError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

ALSO_FORBIDDEN = (ipaddress.ip_network("168.63.129.16/32"), ipaddress.ip_network("192.0.0.0/24"))
"""Public to Python's tables, but metadata services of clouds (Azure, Oracle)."""
NAT64 = ipaddress.ip_network("64:ff9b::/96")
REDIRECTS = 5
CHUNK = 1 << 16
LONGEST_URL = 8192


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be fetched and how much of it. The defaults are for strangers; `for_owner` is for one's own machine."""

    folder: Path | None = None
    """Files below it may be read; None: no files."""
    remote: bool = True
    """http and https URLs are allowed."""
    private_addresses: bool = False
    """Loopback, private, link-local and metadata addresses are allowed."""
    max_bytes: int = 64 << 20
    seconds: float = 20.0
    """For one download, redirects included."""
    max_pixels: int = 64_000_000
    max_image_tokens: int = 1120
    max_frames: int = 128
    max_video_seconds: float = 600.0
    max_audio_seconds: float = 600.0
    """Of a sound that is split; in one piece the model's 30 seconds hold."""

    def __post_init__(self) -> None:
        for name, least in (("max_image_tokens", 70), ("max_frames", 1), ("max_bytes", 1), ("max_pixels", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least {least}.")

    @classmethod
    def for_owner(cls) -> Policy:
        """For the library and the command line: whoever runs them may read their own files."""
        return cls(folder=Path(Path.cwd().anchor), max_bytes=1 << 30, seconds=120.0)


def fetch(source: str | bytes, policy: Policy) -> bytes:
    """The bytes that `source` names: bytes as they are, `data:`, `http(s):` and `file:` URLs, or a path.

    Raises `MediaError` with one sentence: forbidden, missing, too large, too slow, not media.
    """
    if isinstance(source, bytes):
        return _within(source, policy)
    scheme = source.split(":", 1)[0].lower() if ":" in source else ""
    if scheme == "data":
        return _data_url(source, policy)
    if scheme in ("http", "https"):
        return _download(source, policy)
    if scheme == "file":
        return _file(unquote(urlsplit(source).path), policy)
    if "://" in source[:32]:
        raise MediaError(f"The scheme {scheme!r} can't be fetched; use https, http, data or file.")
    return _file(source, policy)


def _within(data: bytes, policy: Policy) -> bytes:
    if not data:
        raise MediaError("The media data is empty.")
    if len(data) > policy.max_bytes:
        raise MediaError(f"The media data is {len(data):,} bytes, but at most {policy.max_bytes:,} are allowed.")
    return data


def decode_base64(text: str, policy: Policy) -> bytes:
    """The bytes of a base64 text, standard or URL alphabet, line breaks and missing padding forgiven."""
    if len(text) > policy.max_bytes * 4 // 3 + 1024:
        raise MediaError(
            f"The base64 data is {len(text):,} characters; at most {policy.max_bytes:,} bytes are allowed."
        )
    plain = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return _within(base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True), policy)
    except (binascii.Error, ValueError) as error:
        raise MediaError("The media data is not valid base64.") from error


def _data_url(source: str, policy: Policy) -> bytes:
    head, comma, body = source.partition(",")
    if not comma:
        raise MediaError("The data URL has no comma; it should look like data:image/png;base64,....")
    if head.lower().endswith(";base64"):
        return decode_base64(unquote(body) if "%" in body else body, policy)
    return _within(unquote_to_bytes(body[: policy.max_bytes * 3 + 3]), policy)


def _file(path: str, policy: Policy) -> bytes:
    if policy.folder is None:
        raise MediaError("Files can't be read here; send the data itself, or start with --allowed-media-dir.")
    folder = policy.folder.resolve()
    try:
        place = (
            folder / Path(path).expanduser() if folder != Path(folder.anchor) else Path(path).expanduser()
        ).resolve()
        if not place.is_relative_to(folder):
            raise MediaError("The file lies outside the folder that media may be read from.")
        # Opened without waiting, so that a pipe can't hang us; the type is read from what was opened.
        with os.fdopen(os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise MediaError(f"{path} is not a file.")
            return _within(file.read(policy.max_bytes + 1), policy)
    except IsADirectoryError as error:
        raise MediaError(f"{path} is a folder, not a file.") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise MediaError(f"The file {path} can't be opened; check the path.") from error


# http(s) ------------------------------------------------------------------------------------------------------------


def _download(url: str, policy: Policy) -> bytes:
    if not policy.remote:
        raise MediaError("URLs can't be fetched here; send the data itself.")
    deadline = time.monotonic() + policy.seconds
    for _ in range(REDIRECTS + 1):
        parts = _checked(url)
        try:
            data, onward = _get(parts, policy, deadline)
        except MediaError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise _late(parts.hostname, policy) from error
            raise MediaError(f"The URL at {parts.hostname} could not be fetched.") from error
        if time.monotonic() >= deadline:
            raise _late(parts.hostname, policy)
        if data is not None:
            return _within(data, policy)
        url = urljoin(url, onward)
    raise MediaError(f"The URL redirects more than {REDIRECTS} times.")


def _late(host: str | None, policy: Policy) -> MediaError:
    return MediaError(f"{host} did not deliver within {policy.seconds:g} seconds; send the data itself.")


def _checked(url: str) -> SplitResult:
    if len(url) > LONGEST_URL:
        raise MediaError(f"The URL is {len(url):,} characters long, but at most {LONGEST_URL:,} are allowed.")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise MediaError("The URL is malformed.") from error
    if parts.scheme not in ("http", "https"):
        raise MediaError(f"The URL leads to the scheme {parts.scheme!r}, but only http and https are followed.")
    if not parts.hostname or parts.username is not None or any(c <= " " or c == "\x7f" for c in url):
        raise MediaError("The URL is malformed: it needs a host and may hold no user name and no blanks.")
    return parts


def is_public(address: Address) -> bool:
    """True for addresses that any stranger may ask us to connect to; looks through IPv4 hidden in IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None and not is_public(inner):
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in ALSO_FORBIDDEN)


def _addresses(host: str, port: int, policy: Policy) -> list[str]:
    """Every address of the name, all of them checked: one bad one spoils the name."""
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MediaError(f"The host {host} can't be found.") from error
    found = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
    if not policy.private_addresses and not all(is_public(ipaddress.ip_address(a.split("%")[0])) for a in found):
        raise MediaError(f"The host {host} is not a public address, and only public ones are fetched.")
    return found


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    for address in addresses[:-1]:
        try:
            return socket.create_connection((address, port), max(0.1, (deadline - time.monotonic()) / 2))
        except OSError:
            continue
    return socket.create_connection((addresses[-1], port), max(0.1, deadline - time.monotonic()))


def _get(parts: SplitResult, policy: Policy, deadline: float) -> tuple[bytes | None, str]:
    """The body, or None and where the answer redirects to."""
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    link = _connect(_addresses(host, port, policy), port, deadline)
    # A server that drips single bytes resets the socket's own timeout each time; the timer ends it for good.
    timer = threading.Timer(max(0.1, deadline - time.monotonic()), _cut, [link])
    timer.daemon = True
    timer.start()
    connection = http.client.HTTPConnection(host, port)
    try:
        if secure:
            link = ssl.create_default_context().wrap_socket(link, server_hostname=host)
        connection.sock = link
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "cabochon", "Accept-Encoding": "identity"})
        with connection.getresponse() as response:  # an unread answer would keep the socket open
            return _answer(response, host, policy, deadline)
    finally:
        timer.cancel()
        connection.close()
        link.close()


def _cut(link: socket.socket) -> None:
    try:
        link.shutdown(socket.SHUT_RDWR)
    except OSError:
        link.close()


def _answer(response: http.client.HTTPResponse, host: str, policy: Policy, deadline: float) -> tuple[bytes | None, str]:
    if response.status in (301, 302, 303, 307, 308):
        onward = response.getheader("Location")
        if not onward:
            raise MediaError(f"{host} redirects to nowhere.")
        return None, onward
    if response.status != 200:
        raise MediaError(f"{host} answered {response.status} instead of the file.")
    kind = (response.getheader("Content-Type") or "").split(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        raise MediaError(f"The URL at {host} is a web page, not a media file; link the file itself.")
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise MediaError(f"{host} sent compressed data although plain data was asked for.")
    body = bytearray()
    while chunk := response.read1(CHUNK):
        body += chunk
        if len(body) > policy.max_bytes:
            raise MediaError(f"The file at {host} is larger than the {policy.max_bytes:,} bytes allowed.")
        if time.monotonic() > deadline:
            raise _late(host, policy)
    if response.length and time.monotonic() < deadline:
        raise MediaError(f"The file at {host} ended {response.length:,} bytes too early.")
    return bytes(body), ""
