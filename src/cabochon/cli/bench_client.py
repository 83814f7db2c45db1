"""The client of `cabochon bench serve`: a program of its own, of the standard library only.

It shares cores with the server that it measures, so it computes next to nothing: no HTTP library, a read per piece.
A line on stdin is a list of chat requests, sent at once over a connection each; the line on stdout that answers it
counts the events that came back.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
from typing import Any


def ask(port: int, bodies: list[Any]) -> list[dict[str, int]]:
    """POST all bodies and read the answers to their ends: status, and events of a stream that carry a choice."""
    watch = selectors.DefaultSelector()
    answers = [{"status": 0, "events": 0} for _ in bodies]
    for answer, body in zip(answers, bodies, strict=True):
        data = json.dumps(body).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        lines += ["Connection: close", f"Content-Length: {len(data)}", "", ""]
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall("\r\n".join(lines).encode() + data)
        watch.register(connection, selectors.EVENT_READ, answer)
    while watch.get_map():
        for key, _ in watch.select():
            assert isinstance(key.fileobj, socket.socket)
            piece = key.fileobj.recv(1 << 16)
            key.data["status"] = key.data["status"] or int(piece[9:12] or 0)
            key.data["events"] += piece.count(b'data: {"')
            if not piece:
                watch.unregister(key.fileobj)
                key.fileobj.close()
    return answers


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(ask(int(sys.argv[1]), json.loads(line))), flush=True)
