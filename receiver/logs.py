"""Log lines of every library as JSON, one object a line: ours, gunicorn's, SQLAlchemy's, Alembic's, Procrastinate's.

Must not print anything else. Event names are fixed words; fields come from an allow-list, and a field that is
not on it is counted, not printed. A plugin's fields are judged by their value instead (`printable`). An
exception is its class and our own frames, never its text: PostgreSQL quotes the row, and a parser the patient. A
library's line is where it was written and, for the few that speak of processes alone, its text.

What requests cause, anybody can cause as fast as they like: of lines that are alike the first of a minute are written,
and then one that says how many `more` there were.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from hashlib import blake2s
from types import TracebackType
from typing import Any, Final, TextIO
from uuid import UUID

import structlog

# What a line may hold in addition to time, level, logger and event: words and ids of ours, numbers, and our own frames.
FIELDS: Final = frozenset(
    {
        "action",
        "again_in",
        "ahead",
        "attempt",
        "bind",
        "bound",
        "child",
        "count",
        "credential",
        "delivery",
        "destination",
        "error",
        "error_class",
        "frames",
        "handler",
        "handlers",
        "id",
        "in_force",
        "kind",
        "lane",
        "lanes",
        "method",
        "ms",
        "outcome",
        "part",
        "path",
        "peer",
        "pid",
        "reason",
        "responder",
        "row",
        "seconds",
        "sqlstate",
        "status",
        "subject",
        "table",
        "uuid",
        "version",
        "worker",
    }
)

# subject.what_happened, as in the code: whatever else is given as an event was put together from data.
EVENT: Final = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
UNNAMED: Final = "log.unnamed"
# The logger of plugins' lines. A name of theirs, and a text that may be printed as a value of theirs: a word.
PLUGIN: Final = "receiver.plugin"
FIELD_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,39}")
_BITS: Final = 64
_WORD: Final = re.compile(r"[a-z][a-z0-9_.-]{0,39}")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# A lane in which the order is a patient's ends with a code derived from their identifier.
_PATIENT_LANE: Final = re.compile(r"([a-z0-9_-]+/[a-z0-9-]+/patient:)(.+)")
# With it such a code becomes one that means nothing in any other process.
_LANE_KEY: Final = os.urandom(16)

# An error of ours names settings and commands in a sentence or two; longer is somebody's data.
_LONGEST: Final = 500
_LIST: Final = 50

# Loggers and modules of libraries whose lines tell of processes and revisions alone, from level info up. Anything else
# may quote a request line, a job's arguments or a row: of that only the place is printed.
_SPEAK_OF_PROCESSES: Final = frozenset({("gunicorn.error", "arbiter"), ("alembic.runtime.migration", "migration")})


# Lines of one event and reason within a minute, of loggers that tell of requests, and of deliveries by their handler.
# Plugins' own are not among them.
LINES: Final = 60
WINDOW: Final = 60.0
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
    """Write every line of level `level` and above to standard error, from now on, in this process.

    Takes over the handlers that libraries have made for themselves, and what Python prints of exceptions that nobody
    catches.
    """
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.raiseExceptions = False  # else a line that cannot be made is printed with all that was to go into it
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


def _frames(traceback: TracebackType | None) -> list[str]:
    """Our own frames of a traceback, outermost first, as module:line:function."""
    found = []
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in ("receiver", "wsgi"):
            found.append(f"{module}:{traceback.tb_lineno}:{traceback.tb_frame.f_code.co_name}")
        traceback = traceback.tb_next
    return found[-_LIST:]


def _uncaught(kind: type[BaseException], exc: BaseException | None, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    structlog.get_logger(__name__).error("process.uncaught", exc_info=(kind, exc, traceback))


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines, and counts what comes too often. `logging` calls `emit` under the handler's lock."""

    _began = 0.0
    _timer: threading.Timer | None = None

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._alike: Counter[tuple[str, str, str]] = Counter()
        self._last: dict[tuple[str, str, str], logging.LogRecord] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, or count it."""
        if record.levelno > logging.DEBUG and record.name.startswith(_OF_REQUESTS):
            if time.monotonic() - self._began >= WINDOW:
                self.tell()
            alike = record.name, *_what(record)
            self._alike[alike] += 1
            if self._alike[alike] > LINES:
                self._last[alike] = _bare(record)
                self._tell_in_time()
                return
        super().emit(record)

    def tell(self) -> None:
        """Write how many more there were of each; begin another minute."""
        self.acquire()
        try:
            for alike, record in self._last.items():
                record.more = self._alike[alike] - LINES
                super().emit(record)
            self._alike, self._last, self._began = Counter(), {}, time.monotonic()
        finally:
            self.release()

    def close(self) -> None:
        """At the end of the process, tell what was counted."""
        self.tell()
        super().close()

    def _tell_in_time(self) -> None:
        if self._timer is None or not self._timer.is_alive():  # it has run, or a fork has left it behind
            self._timer = threading.Timer(WINDOW, self.tell)
            self._timer.daemon = True
            self._timer.start()


def _what(record: logging.LogRecord) -> tuple[str, str]:
    """What makes lines alike: event and reason, which are fixed words, or the place in a library."""
    if isinstance(record.msg, dict):
        return str(record.msg.get("event")), f"{record.msg.get('reason')} {record.msg.get('handler')}"
    return f"{record.module}:{record.lineno}", ""


def _bare(record: logging.LogRecord) -> logging.LogRecord:
    """The record without its exception, which holds on to frames and what is in them."""
    record = copy.copy(record)
    record.exc_info = None
    if isinstance(record.msg, dict):
        record.msg = {name: value for name, value in record.msg.items() if name != "exc_info"}
    return record


class _Formatter(logging.Formatter):
    """A record, ours (through structlog) or a library's, as one line of ASCII.

    Nothing but ASCII: control characters, line separators and direction marks cannot reach a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(record.msg, dict) and hasattr(record, "_logger"):
            line |= _plugins(record.msg) if record.name == PLUGIN else _ours(record.msg)
            raised = record.msg.get("exc_info")
        else:
            line |= _theirs(record)
            raised = record.exc_info
        if more := getattr(record, "more", None):
            line["more"] = more
        return json.dumps(line | _exception(raised, line.get("error"))).replace("\x7f", "\\u007f")


def _ours(given: dict[str, Any]) -> dict[str, Any]:
    event = given["event"]
    fields = given.keys() - {"event", "exc_info"}
    line = {"event": event if isinstance(event, str) and EVENT.fullmatch(event) else UNNAMED}
    line |= {field: _field(field, given[field]) for field in given if field in fields & FIELDS}
    return line | ({"dropped": len(fields - FIELDS)} if fields - FIELDS else {})


# What the handler process adds to a plugin's line.
_OF_RUNS: Final = frozenset(
    {"handler", "destination", "uuid", "delivery", "attempt", "error_class", "frames", "dropped", "dropped_fields"}
)


def printable(name: str, value: object) -> bool:
    """Whether a plugin's field may be printed: a number, a boolean, None, a UUID, or a word.

    A word is a-z, 0-9, _ . and -, at most 40, and begins with a letter. A sentence, a name, a date or the text of an
    error is not one.
    """
    return FIELD_NAME.fullmatch(name) is not None and (
        value is None
        or isinstance(value, bool | float | UUID)
        or (isinstance(value, int) and value.bit_length() < _BITS)
        or (isinstance(value, str) and (_WORD.fullmatch(value) or _UUID.fullmatch(value)) is not None)
    )


def _plugins(given: dict[str, Any]) -> dict[str, Any]:
    """A plugin's line, which receiver.worker.handler_process.plugin_log has judged. It comes from another process: judged again."""
    event = given["event"]
    line = {"event": event if isinstance(event, str) and EVENT.fullmatch(event) else UNNAMED}
    return line | {
        field: _value(value)
        for field, value in given.items()
        if field in _OF_RUNS or (field not in ("event", "exc_info") and printable(field, value))
    }


def _field(name: str, value: object) -> Any:
    if name == "lane" and isinstance(value, str):
        return _PATIENT_LANE.sub(lambda found: found[1] + _short(found[2]), value)
    return _value(value)


def _short(code: str) -> str:
    """A short form of a code, the same throughout this process and of no use outside of it."""
    return "~" + blake2s(code.encode(), key=_LANE_KEY, digest_size=4).hexdigest()


def _theirs(record: logging.LogRecord) -> dict[str, Any]:
    line: dict[str, Any] = {"event": "library.line", "place": f"{record.module}:{record.lineno}:{record.funcName}"}
    if record.levelno >= logging.INFO and (record.name, record.module) in _SPEAK_OF_PROCESSES:
        line["message"] = _value(record.getMessage())
    return line


def _exception(raised: Any, given: object) -> dict[str, Any]:
    """Class, causes and our frames; `given` is what the line says already of the error."""
    if raised is True:
        raised = sys.exc_info()
    elif isinstance(raised, BaseException):
        raised = (type(raised), raised, raised.__traceback__)
    if not isinstance(raised, tuple) or raised[0] is None:
        return {}
    kind, exc, traceback = raised
    causes: list[str] = []
    while exc is not None and len(causes) < _LIST and (exc := exc.__cause__ or exc.__context__) is not None:
        causes.append(type(exc).__qualname__)
    return {"error": given or kind.__qualname__, "frames": _frames(traceback)} | ({"cause": causes} if causes else {})


def _value(value: object) -> Any:
    """A value as it may be printed: plain, short, or the name of its type."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
    if isinstance(value, list | tuple | set | frozenset):
        return [_value(each) for each in list(value)[:_LIST]]
    return type(value).__name__
