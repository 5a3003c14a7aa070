"""gunicorn's worker: uvicorn's server, with our protocol class, and a stop that loses nothing.

uvicorn closes its listening sockets with whatever waits in them, and knows nothing of a gunicorn that died. Must not
hold a rule about requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, ClassVar, Final, cast

import uvicorn
import uvloop
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]  # gunicorn ships no types
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]  # it ships no types

from receiver.server import process_tuning
from receiver.server.connections import Pool
from receiver.server.protocol import HttpProtocol, protocol_class

# How often a worker says that it lives, and looks whether its gunicorn does, in seconds.
_WATCH_INTERVAL: Final = 0.25
# Seconds that a client which has just connected is given to say something, when the worker stops.
_FIRST_WORDS: Final = 0.5
_POLL_INTERVAL: Final = 0.02
# Seconds until another worker is started in the place of one that could not start.
_RESPAWN_DELAY: Final = 2.0
# Seconds that clients wait for a worker that starts without a database, before they are answered 503.
_READY_TIMEOUT: Final = 3.0
# Of gunicorn's graceful_timeout, for what is written when the last request has its reply.
_LAST_WRITES: Final = 5


class Worker(UvicornWorker):  # type: ignore[misc]  # uvicorn-worker ships no types
    """A worker process. `replaces`: another serves until this one can (receiver.server.reload)."""

    replaces = False

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {  # uvicorn.Config
        "loop": "uvloop",
        "ws": "none",
        "lifespan": "on",
        "interface": "asgi3",
        "access_log": False,
        # Nothing that a peer says of itself is believed by the server: receiver.web.client_address judges it.
        "proxy_headers": False,
        "server_header": False,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config.http = protocol_class(self.cfg.worker_connections)
        self.config.timeout_graceful_shutdown = max(1, self.cfg.graceful_timeout - _LAST_WRITES)
        logger = logging.getLogger("uvicorn.error")
        # Its lines of level warning tell of requests, and quote nothing; ours say more.
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.ERROR)

    def init_signals(self) -> None:
        """A signal that comes before uvicorn takes over, and those that it raises again at its end, end nothing."""
        super().init_signals()
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(each, self.handle_exit)

    def run(self) -> None:
        """Serve until told to stop. gunicorn ends, with all its workers, when one does not boot: of use at the start
        alone, when all would fail alike. One that takes the place of a worker that died ends by itself, and gunicorn
        starts another.
        """
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._run())
        except SystemExit as exc:
            if exc.code != Arbiter.WORKER_BOOT_ERROR or self.replaces or self.age <= self.cfg.workers:
                raise
            time.sleep(_RESPAWN_DELAY)
            sys.exit(1)

    async def _run(self) -> None:
        self.config.app = self.wsgi
        server = _DrainingServer(self.config, getattr(self.wsgi, "ready", lambda: True), replaces=self.replaces)

        def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's
            server.should_exit = True

        signal.signal(signal.SIGQUIT, stop)  # uvicorn takes the two others
        watching = asyncio.create_task(self._watch(server))
        if self.alive:
            await server.serve(sockets=self.sockets)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    async def callback_notify(self) -> None:
        """Nothing: `_watch` says that the process lives."""

    async def _watch(self, server: _DrainingServer) -> None:
        """End when gunicorn has ended. Say that the process lives as soon as it serves: receiver.server.reload waits
        for that before it ends the old workers.
        """
        while self.ppid == os.getppid():
            if server.listens:
                self.notify()
            await asyncio.sleep(_WATCH_INTERVAL)
        server.should_exit = True


class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which listens when the application is ready if it `replaces` another, and whose shutdown takes
    in the connections that wait to be accepted.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[], bool], *, replaces: bool) -> None:
        super().__init__(config)
        self._ready, self._replaces = ready, replaces
        self.listens = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and listen when the application is ready. What replaces nothing answers 503 after a while."""
        await super().startup([])
        process_tuning.freeze_heap()
        loop = asyncio.get_running_loop()
        by = math.inf if self._replaces else loop.time() + _READY_TIMEOUT
        while not self._ready() and not self.should_exit and loop.time() < by:  # noqa: ASYNC110 - nobody sends an event
            await asyncio.sleep(_POLL_INTERVAL)
        if not self.should_exit:
            self.servers += [
                await loop.create_server(self._protocol, sock=each, ssl=self.config.ssl, backlog=self.config.backlog)
                for each in sockets or []
            ]
            self.listens = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: listen no longer, but serve those who have connected; the kernel would hang up on them."""
        loop = asyncio.get_running_loop()
        waiting = []
        for listener in sockets or []:
            with suppress(BlockingIOError):
                while True:
                    waiting.append(listener.accept()[0])
            listener.close()
        for server in self.servers:
            server.close()
        for client in waiting:
            await loop.connect_accepted_socket(self._protocol, client)
        by = loop.time() + _FIRST_WORDS
        while self._serve_last() and loop.time() < by:  # noqa: ASYNC110 - nobody sends an event
            await asyncio.sleep(_POLL_INTERVAL)
        await super().shutdown(sockets)

    def _serve_last(self) -> bool:
        """Have the replies to all requests at work say that they are the last; whether a client may still begin one."""
        connections = cast("set[HttpProtocol]", self.server_state.connections)
        for each in connections:
            if each.tracked.pool >= Pool.BODY:
                each.shutdown()
        return any(each.tracked.pool is Pool.WAITING for each in connections)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn calls it
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
