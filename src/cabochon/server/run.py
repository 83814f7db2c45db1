"""Serving until told to stop, then finishing what runs.

uvicorn closes its door as soon as it is told to stop, so a new request would meet a refused connection instead of a
503 that says when to come back; it cuts what still runs then in the midst of a line; and it raises the signal again,
so that a drained server would die of SIGTERM instead of leaving with 0. All three are settled here: the door stays
open until the last reply is out, or until the time for that is over.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import socket

import uvicorn

from ..llm import AsyncLLM
from .app import create_app
from .door import refused
from .guard import Traffic
from .options import ServerOptions
from .service import Service

log = logging.getLogger("cabochon.server")


class _Server(uvicorn.Server):
    """uvicorn without its signal handling; ours drains and returns."""

    def __init__(
        self, config: uvicorn.Config, service: Service, traffic: Traffic, on_ready: Callable[[], None] | None
    ) -> None:
        super().__init__(config)
        self._service = service
        self._traffic = traffic
        self._on_ready = on_ready
        self._deadline: float | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave, signal.Signals(number).name)
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # somebody else took the address while the model was loading
            raise refused(error, (self.config.host, self.config.port)) from None
        if self._on_ready is not None and not self.should_exit:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to go."""
        if self._deadline is not None:
            late = time.monotonic() >= self._deadline
            if late and self._service.replies:
                log.warning("The time to drain is over: %d replies are cut short.", self._service.replies)
                self._service.cut()
            self.should_exit |= late or not (self._traffic.inside or self._service.replies)
        return await super().on_tick(counter)

    def _leave(self, name: str) -> None:
        if self._deadline is not None:
            log.warning("%s again: leaving at once.", name)
            self.should_exit = self.force_exit = True
            return
        log.info("%s: finishing %d replies, taking nothing new.", name, self._service.replies)
        self._traffic.draining = True
        self._deadline = time.monotonic() + self._service.options.drain


def serve(
    llm: AsyncLLM, options: ServerOptions, doors: list[socket], on_ready: Callable[[], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; running replies may then take `options.drain` seconds. Closes `llm`.

    `doors` are bound sockets (`door.take`).
    """
    traffic = Traffic()
    app = create_app(llm, options, traffic)
    service: Service = app.state.service
    service.constrainer.prepare()  # before the first request with tools has to wait for it
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,  # for last words: by then every reply is over or cut
    )
    try:
        asyncio.run(_Server(config, service, traffic, on_ready).serve(doors))
    finally:
        llm.close()
