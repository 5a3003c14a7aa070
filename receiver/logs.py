"""Logging: one JSON object a line, for our lines and for those of gunicorn, SQLAlchemy, Alembic and Procrastinate.

receiver.log_redaction decides what a line may hold. Must not print anything else.

Anyone can cause lines about requests at any rate. Of lines that are alike, only the first of a minute are written, and
then one with the number of the others in `more`.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
import time
from types import TracebackType
from typing import Final, TextIO

import structlog

from receiver.log_redaction import line_formatter
from receiver.window_counter import MINUTE, WindowCounter

# Lines of one event and reason that are written within a minute. It applies to loggers of requests, and of deliveries
# by handler, but not to plugins' own lines.
LINES: Final = 60
_OF_REQUESTS: Final = (
    "receiver.web.",
    "receiver.server.",
    "receiver.storage.",
    "receiver.database.",
    "receiver.delivery",
    "gunicorn.",
    "uvicorn.",
)


def configure(level: str) -> None:
    """Configure this process to write every line of this level and above to standard error.

    Replaces the handlers of libraries, and Python's hooks for uncaught exceptions.
    """
    handler = _Handler(sys.stderr)
    handler.setFormatter(line_formatter())
    logging.raiseExceptions = False  # else logging prints the arguments of a line that fails
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("gunicorn.error", "gunicorn.access"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    access = logging.getLogger("uvicorn.access")  # its lines hold query strings
    access.handlers.clear()
    access.propagate = False
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)  # seven lines at each import
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    sys.excepthook = _uncaught
    sys.unraisablehook = lambda hint: _uncaught(hint.exc_type, hint.exc_value, hint.exc_traceback)
    threading.excepthook = lambda hint: _uncaught(hint.exc_type, hint.exc_value, hint.exc_traceback)


def _uncaught(kind: type[BaseException], exc: BaseException | None, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    structlog.get_logger(__name__).error("process.uncaught", exc_info=(kind, exc, traceback))


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines, and counts those beyond the limit. `logging` calls `emit` under the handler's lock."""

    _timer: threading.Timer | None = None

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._counter: WindowCounter[tuple[str, str, str]] = WindowCounter(MINUTE)
        self._last: dict[tuple[str, str, str], logging.LogRecord] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or count it."""
        if record.levelno > logging.DEBUG and record.name.startswith(_OF_REQUESTS):
            if self._counter.ended(time.monotonic()):
                self.tell()
            alike = record.name, *_what(record)
            if self._counter.add(alike) > LINES:
                self._last[alike] = _bare(record)
                self._tell_in_time()
                return
        super().emit(record)

    def tell(self) -> None:
        """Write the counts of this minute, and begin another."""
        self.acquire()
        try:
            for alike, record in self._last.items():
                record.more = self._counter[alike] - LINES
                super().emit(record)
            self._last = {}
            self._counter.begin(time.monotonic())
        finally:
            self.release()

    def close(self) -> None:
        """Write the counts at the end of the process."""
        self.tell()
        super().close()

    def _tell_in_time(self) -> None:
        if self._timer is None or not self._timer.is_alive():  # it has run, or belongs to the parent of a fork
            self._timer = threading.Timer(self._counter.seconds, self.tell)
            self._timer.daemon = True
            self._timer.start()


def _what(record: logging.LogRecord) -> tuple[str, str]:
    """The key of lines that are alike: event and reason, which are fixed words, or the place in a library."""
    if isinstance(record.msg, dict):
        return str(record.msg.get("event")), f"{record.msg.get('reason')} {record.msg.get('handler')}"
    return f"{record.module}:{record.lineno}", ""


def _bare(record: logging.LogRecord) -> logging.LogRecord:
    """The record without its exception, which would keep frames and their values in memory."""
    record = copy.copy(record)
    record.exc_info = None
    if isinstance(record.msg, dict):
        record.msg = {name: value for name, value in record.msg.items() if name != "exc_info"}
    return record
