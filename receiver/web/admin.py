"""The admin listener in Flask, a process of its own: `/livez` and `/readyz`.

`/livez` says that the process runs; `/readyz` whether this host can do its work, and how to fix what does not hold.
Must not be reached from outside: it binds RECEIVER_ADMIN_BIND, loopback unless told otherwise.
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

# A probe that asks is answered in time, whatever the database does: a frozen one fires no time-out of its own.
PROBE_TIMEOUT: Final = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at. `detail`: a sentence of ours; where `ok` is False, how to fix it."""

    name: str
    ok: bool
    detail: str


def admin_app(checks: Callable[[], Sequence[Check]]) -> Flask:
    """The application. `checks` looks at everything, and may take its time; ready is who passes all."""
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
    """Asks for the checks, one at a time, and waits no longer than PROBE_TIMEOUT. Safe in threads."""

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
