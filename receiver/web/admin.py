"""The admin listener in Flask, in its own process: `/livez`, `/readyz` and `/metrics`.

`/livez` shows that the process runs, `/readyz` whether this host can do its work, and how to fix what it cannot, and
`/metrics` serves Prometheus. Must not be reachable from outside: it binds RECEIVER_ADMIN_BIND, by default on loopback.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Final, Generic, TypeVar

import msgspec
import structlog
from flask import Flask, Response
from prometheus_client import Metric
from werkzeug.exceptions import HTTPException

from receiver.metrics import exposition
from receiver.protocol.message import Reply
from receiver.web.wsgi import respond

T = TypeVar("T")
log: Final = structlog.get_logger(__name__)

# Seconds until a probe gets its reply, whatever the database does: a frozen server triggers none of its own timeouts.
PROBE_TIMEOUT: Final = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check of readiness. `detail`: a sentence; if `ok` is False, it says how to fix the problem."""

    name: str
    ok: bool
    detail: str


def admin_app(checks: Callable[[], Sequence[Check]], gauges: Callable[[], Sequence[Metric] | None]) -> Flask:
    """Return the application. `checks` and `gauges` query the database, and may take their time.

    A host is ready when every check is ok.
    """
    app = Flask(__name__, static_folder=None)
    probe, measure = _SingleFlight(checks), _SingleFlight(gauges)

    @app.get("/livez", provide_automatic_options=False)
    def livez() -> Response:
        return respond(Reply(status=200, body=b"ok\n"))

    @app.get("/readyz", provide_automatic_options=False)
    def readyz() -> Response:
        found = probe() or [_NO_ANSWER]
        ready = all(check.ok for check in found)
        return respond(
            Reply(
                status=200 if ready else 503,
                media="application/json",
                body=msgspec.json.encode({"ready": ready, "checks": [asdict(check) for check in found]}),
            )
        )

    @app.get("/metrics", provide_automatic_options=False)
    def metrics() -> Response:
        return respond(Reply(status=200, media=exposition.MEDIA_TYPE, body=exposition.exposition(measure)))

    @app.errorhandler(Exception)
    def fault(exc: Exception) -> Response:
        status = exc.code or 400 if isinstance(exc, HTTPException) else 500
        if status >= 500:
            log.error("request.failed", exc_info=exc)
        return respond(
            Reply(
                status=status,
                body=b'{"error":"not here"}' if status < 500 else b'{"error":"failed"}',
                media="application/json",
            ),
            close=True,
        )

    return app


_NO_ANSWER: Final = Check(
    name="database",
    ok=False,
    detail=f"no answer within {PROBE_TIMEOUT:g} seconds: see DATABASE_URL, and whether the server is frozen",
)


class _SingleFlight(Generic[T]):
    """Makes a call in a thread, one at a time, and waits no longer than PROBE_TIMEOUT for its result. Thread-safe."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._calling = ThreadPoolExecutor(1, thread_name_prefix="admin-query")
        self._called: Future[T] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> T | None:
        """Return the result, or None when there is none in time. Raises what the call raises."""
        with self._lock:
            if self._called is None or self._called.done():
                self._called = self._calling.submit(self._call)
            called = self._called
        try:
            return called.result(PROBE_TIMEOUT)
        except TimeoutError:
            return None
