"""The admin listener in Flask, in its own process: `/livez` and `/readyz`.

`/livez` shows that the process runs, `/readyz` whether this host can do its work, and how to fix what it cannot. Must
not be reachable from outside: it binds RECEIVER_ADMIN_BIND, by default on loopback.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Final

import msgspec
import structlog
from flask import Flask, Response
from werkzeug.exceptions import HTTPException

from receiver.protocol.message import Reply
from receiver.web.wsgi import respond

log: Final = structlog.get_logger(__name__)

# Seconds until a probe gets its reply, whatever the database does: a frozen server triggers none of its own timeouts.
PROBE_TIMEOUT: Final = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check of readiness. `detail`: a sentence; if `ok` is False, it says how to fix the problem."""

    name: str
    ok: bool
    detail: str


def admin_app(checks: Callable[[], Sequence[Check]]) -> Flask:
    """The application. `checks` runs all checks and may block; the host is ready when all of them are ok."""
    app = Flask(__name__, static_folder=None)
    probe = _Probe(checks)

    @app.get("/livez", provide_automatic_options=False)
    def livez() -> Response:
        return respond(Reply(status=200, body=b"ok\n"))

    @app.get("/readyz", provide_automatic_options=False)
    def readyz() -> Response:
        found = probe()
        ready = all(check.ok for check in found)
        return respond(
            Reply(
                status=200 if ready else 503,
                media="application/json",
                body=msgspec.json.encode({"ready": ready, "checks": [asdict(check) for check in found]}),
            )
        )

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


class _Probe:
    """Runs the checks, once at a time, and waits for PROBE_TIMEOUT at most. Safe in threads."""

    def __init__(self, checks: Callable[[], Sequence[Check]]) -> None:
        self._checks = checks
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="readiness")
        self._asked: Future[Sequence[Check]] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> Sequence[Check]:
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = self._asking.submit(self._checks)
            asked = self._asked
        try:
            return asked.result(PROBE_TIMEOUT)
        except TimeoutError:
            return [
                Check(
                    name="database",
                    ok=False,
                    detail=f"no answer within {PROBE_TIMEOUT:g} seconds: see DATABASE_URL, and whether the server is "
                    "frozen",
                )
            ]
