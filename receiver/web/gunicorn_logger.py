"""gunicorn's lines, written as ours are (receiver.logs).

May not print a query string: it holds the token of a handshake by GET. Nor a path that is none of ours.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Final

import structlog
from gunicorn.glogging import Logger  # type: ignore[import-untyped]  # gunicorn ships no types

from receiver import logs

log: Final = structlog.get_logger("receiver.access")
_access: Final = logging.getLogger("receiver.access")

_NAME: Final = "[a-z0-9-]{1,64}"
_PATHS: Final = re.compile(rf"/(?:redox/{_NAME}|oauth/{_NAME}/token|livez|readyz|\.well-known/jwks\.json)/?")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class JsonLogger(Logger):  # type: ignore[misc]  # gunicorn ships no types
    """gunicorn's logger. Requests are told at level debug alone: what they did is in the audit, and faults are told."""

    def setup(self, cfg: Any) -> None:
        """Take over, at gunicorn's `loglevel`."""
        self.cfg = cfg
        logs.configure(cfg.loglevel)
        for name in ("critical", "error", "warning", "info", "debug", "exception"):
            # Called directly, for a line tells where it was written.
            setattr(self, name, getattr(self.error_log, name))

    @property
    def access_log_enabled(self) -> bool:
        """Whether `access` says anything."""
        return _access.isEnabledFor(logging.DEBUG)

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: Any) -> None:
        """Tell a request that was served. The signature is gunicorn's; its ASGI worker has a time of its own kind."""
        if self.access_log_enabled:
            path, method = req.path or "", req.method
            log.debug("request.served", method=method if method in _METHODS else "other",
                      path=path if _PATHS.fullmatch(path) else "other", status=int(str(resp.status).split()[0]),
                      ms=round(request_time.seconds * 1000 + request_time.microseconds / 1000, 1),
                      peer=environ.get("REMOTE_ADDR"))

    def reopen_files(self) -> None:
        """There are none: lines go to standard error."""

    def close_on_exec(self) -> None:
        """There is nothing to close."""
