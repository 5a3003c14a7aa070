"""Log redaction: which parts of a log record may be printed, and its rendering as one line of JSON.

Event names are fixed words. Fields come from an allow-list; other fields are counted, not printed. A plugin's fields
are judged by their value instead (`printable`). Of an exception only its class and our own frames are printed, never
its text: PostgreSQL quotes the row, and a parser the patient. Of a library's line its place is printed, and its text
only if the logger writes about processes alone.

Must not write lines: receiver.logs does.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from hashlib import blake2s
from types import TracebackType
from typing import Any, Final
from uuid import UUID

from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict

# The fields of a line in addition to time, level, logger and event: fixed words, ids, numbers, and our own frames.
FIELDS: Final = frozenset(
    {
        "action",
        "again_in",
        "ahead",
        "attempt",
        "bind",
        "bound",
        "checkpoint",
        "child",
        "code",
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
        "notice",
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
        "waiting",
        "worker",
    }
)

# subject.what_happened, a constant in the code. Any other event was built from data.
EVENT: Final = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
UNNAMED: Final = "log.unnamed"
# The logger of plugins' lines, the form of their field names, and the form of a printable text: a word.
PLUGIN: Final = "receiver.plugin"
FIELD_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,39}")
_BITS: Final = 64
_WORD: Final = re.compile(r"[a-z][a-z0-9_.-]{0,39}")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# A lane with ordering by patient ends with a code derived from the patient's identifier.
_PATIENT_LANE: Final = re.compile(r"([a-z0-9_-]+/[a-z0-9-]+/patient:)(.+)")
# The key that turns such a code into one that is meaningless in other processes.
_LANE_KEY: Final = os.urandom(16)

# Our own errors are a sentence or two; a longer text holds data.
_LONGEST: Final = 500
_LIST: Final = 50

# Loggers and modules of libraries whose lines, from level info up, are about processes and revisions alone. Lines of
# others may quote a request line, a job's arguments or a row, so only their place is printed.
_SPEAK_OF_PROCESSES: Final = frozenset({("gunicorn.error", "arbiter"), ("alembic.runtime.migration", "migration")})

# The fields that the handler process adds to a plugin's line.
_OF_RUNS: Final = frozenset(
    {"handler", "destination", "uuid", "delivery", "attempt", "error_class", "frames", "dropped", "dropped_fields"}
)
# Keys of an event dictionary that the processors need and no line shows.
_KEPT: Final = ("_record", "_from_structlog", "exc_info")


def line_formatter() -> ProcessorFormatter:
    """The formatter of every record, our own (through structlog) and a library's: one line of ASCII.

    Nothing but ASCII: control characters, line separators and direction marks cannot reach a terminal.
    """
    return ProcessorFormatter(
        foreign_pre_chain=[_redact_library],
        processors=[_redact, _add_origin, _add_exception, ProcessorFormatter.remove_processors_meta, _render],
        # The text of a library's line is formatted only if it may be printed.
        use_get_message=False,
        pass_foreign_args=True,
    )


def _redact_library(_logger: Any, _method: str, given: EventDict) -> EventDict:
    """Reduce a library's line to its place, and its text if the logger writes about processes alone."""
    record: logging.LogRecord = given["_record"]
    event = _kept(given) | {"event": "library.line", "place": f"{record.module}:{record.lineno}:{record.funcName}"}
    if record.levelno >= logging.INFO and (record.name, record.module) in _SPEAK_OF_PROCESSES:
        args = given["positional_args"]
        event["message"] = _value(given["event"] % args if args else given["event"])
    return event


def _redact(_logger: Any, _method: str, given: EventDict) -> EventDict:
    """Reduce our own or a plugin's line to the event's name and the fields that may be printed."""
    if not given["_from_structlog"]:
        return given
    name = given["event"]
    event = _kept(given) | {"event": name if isinstance(name, str) and EVENT.fullmatch(name) else UNNAMED}
    fields = {field: value for field, value in given.items() if field not in event}
    if given["_record"].name == PLUGIN:
        # receiver.worker.handler_process.plugin_log has judged it, but in the handler process.
        shown = {
            field: _value(fields[field]) for field in fields if field in _OF_RUNS or printable(field, fields[field])
        }
        return event | shown
    event |= {field: _field(field, value) for field, value in fields.items() if field in FIELDS}
    dropped = len(fields.keys() - FIELDS)
    return event | ({"dropped": dropped} if dropped else {})


def _kept(given: EventDict) -> dict[str, Any]:
    return {name: given[name] for name in _KEPT if name in given}


def _add_origin(_logger: Any, _method: str, event: EventDict) -> EventDict:
    record = event["_record"]
    more = getattr(record, "more", None)
    return {
        "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        **event,
        **({"more": more} if more else {}),
    }


def _add_exception(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Add class, causes and our own frames of the exception. A field `error` of the line stays."""
    raised = event.pop("exc_info", None)
    if raised is True:
        raised = sys.exc_info()
    elif isinstance(raised, BaseException):
        raised = (type(raised), raised, raised.__traceback__)
    if not isinstance(raised, tuple) or raised[0] is None:
        return event
    kind, exc, traceback = raised
    causes: list[str] = []
    while exc is not None and len(causes) < _LIST and (exc := exc.__cause__ or exc.__context__) is not None:
        causes.append(type(exc).__qualname__)
    event.update(error=event.get("error") or kind.__qualname__, frames=_frames(traceback))
    if causes:
        event["cause"] = causes
    return event


def _render(_logger: Any, _method: str, event: EventDict) -> str:
    return json.dumps(event).replace("\x7f", "\\u007f")


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


def _field(name: str, value: object) -> Any:
    if name == "lane" and isinstance(value, str):
        return _PATIENT_LANE.sub(lambda found: found[1] + _short(found[2]), value)
    return _value(value)


def _short(code: str) -> str:
    """A short form of a code, the same within this process and meaningless outside of it."""
    return "~" + blake2s(code.encode(), key=_LANE_KEY, digest_size=4).hexdigest()


def _frames(traceback: TracebackType | None) -> list[str]:
    """Our own frames of a traceback, outermost first, as module:line:function."""
    found = []
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in ("receiver", "wsgi"):
            found.append(f"{module}:{traceback.tb_lineno}:{traceback.tb_frame.f_code.co_name}")
        traceback = traceback.tb_next
    return found[-_LIST:]


def _value(value: object) -> Any:
    """The printable form of a value: itself if plain, shortened if long, else the name of its type."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
    if isinstance(value, list | tuple | set | frozenset):
        return [_value(each) for each in list(value)[:_LIST]]
    return type(value).__name__
