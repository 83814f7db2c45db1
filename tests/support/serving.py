"""`cabochon serve` in a process of its own, as people start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx


class Process:
    """`cabochon serve` with the given arguments, but on loopback and a port of its own."""

    def __init__(self, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{port}"
        self.began = time.perf_counter()
        command = [sys.executable, "-c", "from cabochon.cli import main; main()", "serve", *arguments]
        self.popen = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.log = ""
        self.ready_after = 0.0
        """Seconds from the start of the process to its first answer."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr
        for line in self.popen.stderr:
            self.log += line

    def wait_until_ready(self, seconds: float = 200) -> float:
        """Seconds until it answered."""
        while time.perf_counter() - self.began < seconds:
            try:
                if httpx.get(self.base + "/ready", timeout=1).status_code == 200:
                    return time.perf_counter() - self.began
            except httpx.TransportError:
                time.sleep(0.02)
            assert self.popen.poll() is None, self.log
        raise AssertionError(f"not ready after {seconds} s: {self.log}")

    def terminate(self) -> None:
        """SIGTERM; returns when the server has taken note of it."""
        self.popen.send_signal(signal.SIGTERM)
        while self.popen.poll() is None:
            try:
                if httpx.get(self.base + "/ready", timeout=5).status_code == 503:
                    return
            except httpx.TransportError:
                continue

    def code(self) -> int:
        """The exit code, once the process has left."""
        code = self.popen.wait(120)
        self._reader.join(5)
        assert self.popen.stderr
        self.popen.stderr.close()
        return code


@contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    """A process that answers, and that is gone afterwards whatever happened."""
    process = Process(*arguments)
    try:
        process.ready_after = process.wait_until_ready()
        yield process
    finally:
        process.popen.kill()
        process.code()
