"""A web server on loopback whose every path misbehaves in its own way; it records what was asked of it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hostile(BaseHTTPRequestHandler):
    """`/html`, `/404`, `/loop`, `/to?URL`, `/nowhere`, `/drip`, `/slow`, `/big`, `/endless`, `/short`, `/gzip`,
    `/empty`, `/garbage`, `/file`."""

    protocol_version = "HTTP/1.1"
    file = b""
    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name, _, rest = self.path[1:].partition("?")
        try:
            getattr(self, f"say_{name}")(rest)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for header, value in {"Content_Type": "image/png", **headers}.items():
            self.send_header(header.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def say_file(self, _: str) -> None:
        self.answer(self.server.file)

    def say_html(self, _: str) -> None:
        self.answer(b"<html>secret page</html>", Content_Type="text/html; charset=utf-8")

    def say_404(self, _: str) -> None:
        self.answer(b"secret", 404)

    def say_to(self, url: str) -> None:
        self.answer(b"", 302, Location=url)

    def say_loop(self, _: str) -> None:
        self.answer(b"", 301, Location="/loop")

    def say_nowhere(self, _: str) -> None:
        self.answer(b"", 302)

    def say_empty(self, _: str) -> None:
        self.answer(b"")

    def say_short(self, _: str) -> None:
        self.answer(self.server.file[:20], length=len(self.server.file))
        self.close_connection = True

    def say_gzip(self, _: str) -> None:
        self.answer(b"x" * 50, Content_Encoding="gzip")

    def say_big(self, _: str) -> None:
        self.answer(bytes(3_000_000))

    def say_endless(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(100_000))

    def say_drip(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def say_slow(self, _: str) -> None:
        """The header itself drips."""
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.05)

    def say_garbage(self, _: str) -> None:
        self.wfile.write(b"\x00\x01\x02 not http at all\r\n\r\n")
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextmanager
def hostile_server(file: bytes = b"") -> Iterator[tuple[str, list[str]]]:
    """Its base URL and the list of paths asked so far."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    server.daemon_threads = False  # closing waits for the handlers, so that none outlives its test
    server.asked, server.file = [], file
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
