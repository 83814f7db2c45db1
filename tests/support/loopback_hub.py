"""A Hugging Face Hub on loopback, as much of one as a download needs: repositories, revisions, gates, broken pipes."""

import hashlib
import json
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each a folder of files, and how the next requests go wrong."""

    def __init__(self):
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.token = "hf_good"
        self.cuts: list[int] = []
        """After how many bytes the next answers with weights break off."""
        self.damaged = False
        """Send every file with its last byte changed."""
        self.status: int | None = None
        """Answer everything with this status."""
        self.requests = Counter()
        self.sent = 0
        self.url = ""


@contextmanager
def loopback_hub():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests[self.command] += 1
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if hub.status is not None:
            return self._refuse(hub.status, None)
        if repo not in hub.repos:
            return self._refuse(404, "RepoNotFound")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo in hub.gated and token != hub.token:
            return self._refuse(403 if token else 401, "GatedRepo")
        revision = (parts[5] if len(parts) > 5 else "main") if parts[0] == "api" else parts[3]
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if parts[0] == "api":
            return self._describe(repo)
        return self._file(hub.repos[repo] / "/".join(parts[4:]), body)

    def _describe(self, repo):
        files = sorted(path for path in self.hub.repos[repo].iterdir() if path.is_file())
        siblings = [{"rfilename": path.name, "size": path.stat().st_size, "blobId": path.name} for path in files]
        raw = json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": len(raw)})
        self.wfile.write(raw)

    def _file(self, path, body):
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        raw, status = path.read_bytes(), 200
        headers = {"ETag": f'"{hashlib.sha256(raw).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.hub.damaged:
            raw = raw[:-1] + bytes([raw[-1] ^ 1])
        asked = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        if asked:
            headers["Content-Range"] = f"bytes {asked}-{len(raw) - 1}/{len(raw)}"
            raw, status = raw[int(asked) :], 206
        self._head(status, headers | {"Content-Length": len(raw), "Content-Type": "application/octet-stream"})
        if not body:
            return None
        if self.hub.cuts and path.suffix == ".safetensors":
            raw, self.close_connection = raw[: self.hub.cuts.pop(0)], True
        self.hub.sent += len(raw)
        self.wfile.write(raw)
        return None

    def _refuse(self, status, code):
        headers = {"Content-Length": 0} | ({"X-Error-Code": code} if code else {})
        self._head(status, headers)

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
