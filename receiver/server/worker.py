"""gunicorn's worker: uvicorn's server with our protocol class, and a shutdown that loses no request.

uvicorn closes its listening sockets with the connections that wait in them, and does not notice that gunicorn has died.
Must not hold a rule about requests.
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

# Seconds between two heartbeats, each with a check that gunicorn still runs.
_WATCH_INTERVAL: Final = 0.25
# Seconds that a client which has just connected has to begin a request, when the worker stops.
_FIRST_WORDS: Final = 0.5
_POLL_INTERVAL: Final = 0.02
# Seconds until gunicorn starts another worker after one that could not start.
_RESPAWN_DELAY: Final = 2.0
# Seconds that a worker without a database waits for it, before it listens and answers 503.
_READY_TIMEOUT: Final = 3.0
# Seconds of gunicorn's graceful_timeout that are kept for writes after the last reply.
_LAST_WRITES: Final = 5


class Worker(UvicornWorker):  # type: ignore[misc]  # uvicorn-worker ships no types
    """A worker process. `replaces`: another serves until this one is ready (receiver.server.reload)."""

    replaces = False

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {  # uvicorn.Config
        "loop": "uvloop",
        "ws": "none",
        "lifespan": "on",
        "interface": "asgi3",
        "access_log": False,
        # The server must not trust forwarding headers: receiver.web.client_address decides.
        "proxy_headers": False,
        "server_header": False,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config.http = protocol_class(self.cfg.worker_connections)
        self.config.timeout_graceful_shutdown = max(1, self.cfg.graceful_timeout - _LAST_WRITES)
        logger = logging.getLogger("uvicorn.error")
        # Its warnings are about requests; our own lines say more.
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.ERROR)

    def init_signals(self) -> None:
        """Ignore a signal that arrives before uvicorn handles signals, or that uvicorn raises again after its end."""
        super().init_signals()
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(each, self.handle_exit)

    def run(self) -> None:
        """Serve until a signal to stop.

        When a worker does not boot, gunicorn ends with all its workers. That helps only at the start, when all fail
        alike. A worker that replaces one that died exits with another status instead, and gunicorn starts another.
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
        """Do nothing: `_watch` sends the heartbeats."""

    async def _watch(self, server: _DrainingServer) -> None:
        """Send heartbeats once the process serves, and stop when gunicorn has ended. receiver.server.reload waits for
        the first heartbeat before it stops the old workers.
        """
        while self.ppid == os.getppid():
            if server.listens:
                self.notify()
            await asyncio.sleep(_WATCH_INTERVAL)
        server.should_exit = True


class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which listens when the application is ready, and whose shutdown serves the connections that
    wait to be accepted.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[], bool], *, replaces: bool) -> None:
        super().__init__(config)
        self._ready, self._replaces = ready, replaces
        self.listens = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and listen when the application is ready. A server that `replaces` none listens after _READY_TIMEOUT
        in any case, and answers 503.
        """
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
        """Stop listening, and serve the clients that have connected: the kernel would reset their connections."""
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
        """Mark the replies to all requests at work as the last of their connections. Return whether a client may still
        begin a request.
        """
        connections = cast("set[HttpProtocol]", self.server_state.connections)
        for each in connections:
            if each.tracked.pool >= Pool.BODY:
                each.shutdown()
        return any(each.tracked.pool is Pool.WAITING for each in connections)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn calls it
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
