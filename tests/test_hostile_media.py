"""Strangers' files and URLs: each refused with one sentence, quickly, and nothing forbidden is ever connected to."""

import base64
import os
import socket
import time

import pytest

from cabochon.chat.messages import Media
from cabochon.errors import MediaError
from cabochon.media import source
from cabochon.media.source import Policy, fetch
from cabochon.senses import Senses
from support.hostile_media import hostile_files, picture
from support.hostile_server import hostile_server
from support.toys import toy_config

FILES = hostile_files()
STRICT = Policy(max_pixels=3_000_000, max_video_seconds=30)
LOOPBACK = Policy(private_addresses=True, seconds=0.6, max_bytes=2_000_000)

FORBIDDEN = [
    "http://127.0.0.1/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://localhost/",
    "http://0.0.0.0/",
    "http://10.0.0.1/x.png",
    "http://172.16.3.4/",
    "http://192.168.1.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[fe80::1]/",
    "http://[fd00:ec2::254]/",
    "http://[ff02::1]/",
]
MALFORMED = [
    "http://",
    "http:///x.png",
    "http://user:word@example.com/",
    "http://example.com:99999/",
    "http://exa mple.com/",
    "http://example.com/\r\nHost: inside",
    "http://[::1",
    "http://" + "a" * 9000,
    "ftp://example.com/x.png",
    "gopher://example.com/",
    "data:image/png;base64",
    "data:image/png;base64,@@@@",
    "data:image/png;base64,",
    "file:///etc/hostname",
    "/etc/hostname",
    "../../etc/hostname",
    "https://name.invalid/x.png",
]


def one_sentence(error: Exception) -> str:
    text = str(error)
    assert 15 < len(text) < 300 and text.endswith(".") and "\n" not in text and "Traceback" not in text, text
    return text


@pytest.fixture
def connections(monkeypatch):
    """Every address that a connection was opened to; none succeeds."""
    opened = []

    def refuse(address, *args, **kwargs):
        opened.append(address[0])
        raise OSError("refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return opened


@pytest.mark.parametrize("name", FILES)
def test_files(name):
    kind, data = FILES[name]
    begin = time.perf_counter()
    with pytest.raises(MediaError) as caught:
        Senses(toy_config("E2B", media=True), None, STRICT).perceive(Media(kind, data), {})
    one_sentence(caught.value)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("url", FORBIDDEN)
def test_forbidden_addresses_are_never_connected_to(url, connections):
    with pytest.raises(MediaError, match="not a public address") as caught:
        fetch(url, Policy())
    one_sentence(caught.value)
    assert connections == []


@pytest.mark.parametrize("url", MALFORMED)
def test_malformed_sources(url, connections):
    with pytest.raises(MediaError) as caught:
        fetch(url, Policy())
    one_sentence(caught.value)
    assert connections == []


def test_a_name_with_one_private_address_is_refused(monkeypatch, connections):
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answers)
    with pytest.raises(MediaError, match="not a public address"):
        fetch("http://both.example/", Policy())
    assert connections == []


def test_dns_that_changes_gains_nothing(monkeypatch, connections):
    """The first answer is public, every later one is loopback: only the checked address is connected to."""
    asked = []

    def rebinding(host, port, *args, **kwargs):
        asked.append(host)
        ip = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with pytest.raises(MediaError, match="could not be fetched"):
        fetch("http://rebind.example/x.png", Policy())
    assert connections == ["93.184.216.34"] and len(asked) == 1


def test_redirects_pass_the_same_gate(monkeypatch):
    """A public host (played by loopback) that redirects inside: the second address is refused before connecting."""
    with hostile_server() as (base, asked):
        port = int(base.rsplit(":", 1)[1])
        real, opened = socket.create_connection, []

        def connect(address, *args, **kwargs):
            opened.append(address[0])
            return real(("127.0.0.1", port), *args, **kwargs)

        monkeypatch.setattr(socket, "create_connection", connect)
        for target in ("http://127.0.0.1/inside", "http://169.254.169.254/", "file:///etc/hostname", "ftp://x/"):
            with pytest.raises(MediaError, match=r"not a public address|only http and https"):
                fetch(f"http://93.184.216.34/to?{target}", Policy())
        assert opened == ["93.184.216.34"] * 4
        assert all(path.startswith("/to?") for path in asked)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("html", "web page, not a media file"),
        ("404", "answered 404"),
        ("loop", "redirects more than 5 times"),
        ("nowhere", "redirects to nowhere"),
        ("empty", "is empty"),
        ("short", "too early|could not be fetched"),
        ("gzip", "compressed data"),
        ("big", "larger than the 2,000,000 bytes"),
        ("endless", "larger than the 2,000,000 bytes"),
        ("drip", "did not deliver within 0.6 seconds"),
        ("slow", "did not deliver within 0.6 seconds"),
        ("garbage", "could not be fetched"),
    ],
)
def test_misbehaving_servers(path, message):
    with hostile_server(picture()) as (base, _):
        begin = time.perf_counter()
        with pytest.raises(MediaError, match=message) as caught:
            fetch(f"{base}/{path}", LOOPBACK)
        assert "secret" not in one_sentence(caught.value)
        assert time.perf_counter() - begin < 2.5


def test_honest_sources_are_read():
    data = picture()
    with hostile_server(data) as (base, asked):
        assert fetch(f"{base}/file", LOOPBACK) == data
        assert fetch(f"{base}/to?/file", LOOPBACK) == data
        assert asked == ["/file", "/to?/file", "/file"]
    encoded = base64.b64encode(data).decode()
    assert fetch(f"data:image/png;base64,{encoded}", Policy()) == data
    assert fetch("data:,a%20b", Policy()) == b"a b"
    assert source.decode_base64(base64.urlsafe_b64encode(data).decode().rstrip("="), Policy()) == data


def test_files_only_below_the_allowed_folder(tmp_path):
    inside, outside = tmp_path / "media", tmp_path / "secret.png"
    inside.mkdir()
    (inside / "a b.png").write_bytes(b"picture")
    outside.write_bytes(b"secret")
    (inside / "link.png").symlink_to(outside)
    (inside / "folder").mkdir()
    os.mkfifo(inside / "pipe")
    policy = Policy(folder=inside, max_bytes=100)
    assert fetch("a b.png", policy) == fetch(f"file://{inside}/a%20b.png", policy) == b"picture"
    for path in (str(outside), "../secret.png", "link.png", f"file://{outside}"):
        with pytest.raises(MediaError, match="outside the folder"):
            fetch(path, policy)
    for path in ("missing.png", "folder", "pipe", "a\0b"):
        with pytest.raises(MediaError) as caught:
            fetch(path, policy)
        one_sentence(caught.value)
    (inside / "large").write_bytes(bytes(101))
    with pytest.raises(MediaError, match="at most 100"):
        fetch("large", policy)
    assert fetch(str(outside), Policy.for_owner()) == b"secret"
