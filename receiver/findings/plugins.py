"""Findings about handlers and responders that cannot be loaded, do not start, or fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from sqlalchemy import Connection

from receiver.findings.finding import Finding, command
from receiver.findings.formatting import count
from receiver.findings.view import View
from receiver.storage.queue import handler_problems

Problem = Mapping[str, Any]


def problems(view: View) -> Iterator[Finding]:
    """Find problems of handlers."""
    return read(view.connection)


def read(connection: Connection) -> Iterator[Finding]:
    """Return the same for `handlers list`, which needs no other findings. Raises SQLAlchemyError."""
    for each in handler_problems.problems(connection):
        text, fix = _TEXTS[each["problem"]](each)
        where = each["destination"] or None
        yield Finding(
            code=each["problem"], destination=where, text=f"{where}: {text}" if where else text, fix=fix, details=each
        )


def _not_loaded(each: Problem) -> tuple[str, str]:
    text = f"{each['handler']} could not be loaded on {_hosts(each)}: {each['detail']}. It is treated as not installed."
    return text, command("handlers", "check")


def _not_started(each: Problem) -> tuple[str, str]:
    text = (
        f"{each['handler']} is loaded on {_hosts(each)}, but its processes do not start: {each['detail']}. Its "
        "deliveries wait."
    )
    return text, command("handlers", "check")


def _failing(each: Problem) -> tuple[str, str]:
    how = "asks to be retried later" if each["deferred"] else f"has failed {count(each['count'], 'time', 'times')}"
    deliveries = count(each["deliveries"], "pending delivery", "pending deliveries")
    text = f"{each['handler']} {how} on {deliveries} ({_error(each)})."
    return text, command("deliveries", "show", str(each["delivery"]))


def _failed(each: Problem) -> tuple[str, str]:
    text = f"{_answered(each, 500)}: responder {each['handler']} failed ({_error(each)})."
    return text, command("handlers", "list")


def _late(each: Problem) -> tuple[str, str]:
    text = f"{_answered(each, 504)}: responder {each['handler']} took longer than its timeout{_at(each)}."
    return text, command("handlers", "list")


def _missing(each: Problem) -> tuple[str, str]:
    kind = each["message_kind"] or "a query"
    if each["handler"]:
        text = f"{_answered(each, 501)}: responder {each['handler']} does not run on {_hosts(each)}: {each['detail']}."
        return text, command("handlers", "check")
    text = f"{_answered(each, 501)}: no responder is enabled for {kind}."
    return text, command("handlers", "enable", "…", "--destination", each["destination"])


def _answered(each: Problem, status: int) -> str:
    return f"{count(each['count'], 'query was', 'queries were')} answered {status} in the last hour"


def _hosts(each: Problem) -> str:
    return ", ".join(each["hosts"])


def _error(each: Problem) -> str:
    return f"{each['error_class']}{_at(each)}{': ' + each['detail'] if each['detail'] else ''}"


def _at(each: Problem) -> str:
    return f" at {each['place']}" if each["place"] else ""


_TEXTS: Final[Mapping[str, Callable[[Problem], tuple[str, str]]]] = {
    "plugin_not_loaded": _not_loaded,
    "handler_not_started": _not_started,
    "handler_failing": _failing,
    "responder_failed": _failed,
    "responder_late": _late,
    "responder_missing": _missing,
}
