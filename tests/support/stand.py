"""A server on loopback around a toy network with random weights, for tests that speak HTTP."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from cabochon.chat.template import Template
from cabochon.config import GenerationConfig
from cabochon.llm import AsyncLLM
from cabochon.llm.loading import Loaded
from cabochon.media.source import Policy
from cabochon.server.app import create_app
from cabochon.server.guard import Traffic
from cabochon.server.options import ServerOptions
from support.toys import toy_model
from support.words import small_tokenizer

NAME = "toy"
PICK = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "unit": {"enum": ["km", "mile"]}},
    "required": ["n", "unit"],
    "additionalProperties": False,
}
"""The schema of a small answer."""
WIDTH = 640


def toy_llm(**engine: Any) -> AsyncLLM:
    """An engine around calm random weights, one layer of each kind, with a small tokenizer."""
    tokenizer = small_tokenizer()
    network = toy_model(
        "E2B",
        vocab_size=WIDTH,
        vocab_size_per_layer_input=WIDTH,
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    loaded = Loaded(NAME, network, tokenizer, Template(tokenizer), GenerationConfig(eos=(1, 106, 50)))
    return AsyncLLM.of(loaded, policy=Policy(remote=False), max_num_seqs=16, **engine)


def bundled_llm(**engine: Any) -> AsyncLLM:
    """An engine around the bundled checkpoint."""
    return AsyncLLM(policy=Policy(remote=False), **engine)


@contextmanager
def running(llm: AsyncLLM, **options: Any) -> Iterator[str]:
    """A server in a thread of this process; its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    traffic = Traffic()
    app = create_app(llm, ServerOptions(names=(llm.name, "toy-alias"), port=port, **options), traffic)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    base = f"http://127.0.0.1:{port}"
    for _ in range(200):
        if server.started:
            break
        time.sleep(0.02)
    try:
        yield base
    finally:
        server.should_exit = True
        thread.join(10)


def post(base: str, path: str, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(base + path, json=body, timeout=60, **more)


def settled(llm: AsyncLLM, seconds: float = 5.0) -> bool:
    """Nothing runs and nothing waits, within `seconds`."""
    for _ in range(int(seconds * 50)):
        gauges = llm.gauges()
        if gauges.running == gauges.waiting == 0:
            return True
        time.sleep(0.02)
    return False


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """What a stream of events carries, save for the mark of its end."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
