"""Serving until told to stop, then finishing what runs.

uvicorn raises the signal again after its shutdown, so a drained server would die of SIGTERM instead of leaving with 0;
and it answers new requests on open connections while it drains. Both are settled here.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import socket

import uvicorn

from ..llm import AsyncLLM
from .app import create_app
from .guard import Traffic
from .options import ServerOptions

log = logging.getLogger("cabochon.server")


class _Server(uvicorn.Server):
    """uvicorn without its signal handling; ours drains and returns."""

    def __init__(self, config: uvicorn.Config, traffic: Traffic, on_ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._traffic = traffic
        self._on_ready = on_ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave, signal.Signals(number).name)
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None and not self.should_exit:
            self._on_ready()

    def _leave(self, name: str) -> None:
        if self._traffic.draining:
            log.warning("%s again: leaving at once.", name)
            self.force_exit = True
        else:
            log.info("%s: finishing what runs, taking nothing new.", name)
        self._traffic.draining = self.should_exit = True


def serve(llm: AsyncLLM, options: ServerOptions, on_ready: Callable[[], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; running replies may then take `options.drain` seconds. Closes `llm`."""
    traffic = Traffic()
    app = create_app(llm, options, traffic)
    app.state.service.constrainer.prepare()  # before the first request with tools has to wait for it
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(options.drain)),
    )
    try:
        asyncio.run(_Server(config, traffic, on_ready).serve())
    finally:
        llm.close()
