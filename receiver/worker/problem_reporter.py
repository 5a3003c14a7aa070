"""Problem reporter: collects handler problems of this process and writes them to the database for `status` and `check`.

Must not delay a request or a run: `add` and `clear` only change memory. A background thread calls `flush`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Final

from sqlalchemy import Connection

from receiver.storage.queue import handler_problems
from receiver.storage.queue.handler_problems import HandlerProblem, Kind
from receiver.worker.load_failure import LoadFailure, PluginError

# Seconds until an unchanged problem is reported again. An older report is from a process that is gone.
_REPEAT_INTERVAL: Final = 15.0
# Seconds until a problem of a query is forgotten.
_FORGET_AFTER: Final = 3600.0
# A safeguard: there are few handlers, destinations and kinds.
_MOST: Final = 1000

_Key = tuple[str, str, str]


class ProblemReporter:
    """The problems of one process: a worker or a receiver. Safe in threads."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._problems: dict[_Key, tuple[HandlerProblem, float]] = {}
        self._changed = False
        self._reported_at = 0.0

    def add(self, problem: HandlerProblem) -> None:
        """Note a problem, or that it has occurred again."""
        key = problem.handler, problem.destination, problem.kind
        with self._lock:
            before = self._problems.get(key)
            if before is None and len(self._problems) >= _MOST:
                return
            count = problem.count + (before[0].count if before else 0)
            self._problems[key] = replace(problem, count=count), time.monotonic()
            self._changed = True

    def clear(self, handler: str, destination: str, *kinds: Kind) -> None:
        """Remove problems: the handler has run there."""
        with self._lock:
            for kind in kinds:
                self._changed |= self._problems.pop((handler, destination, kind), None) is not None

    def replace_all(self, kind: Kind, problems: Iterable[HandlerProblem]) -> None:
        """Replace all problems of one kind."""
        with self._lock:
            self._problems = {key: each for key, each in self._problems.items() if key[2] != kind}
            now = time.monotonic()
            self._problems |= {(each.handler, each.destination, each.kind): (each, now) for each in problems}
            self._changed = True

    def flush(self, connection: Callable[[], AbstractContextManager[Connection]]) -> None:
        """Report changed problems, and unchanged ones periodically. Raises SQLAlchemyError; the next flush retries."""
        now = time.monotonic()
        with self._lock:
            lasting = ("plugin_not_loaded", "handler_not_started")
            old = [
                key
                for key, (each, at) in self._problems.items()
                if each.kind not in lasting and now - at > _FORGET_AFTER
            ]
            for key in old:
                del self._problems[key]
            due = self._problems and now - self._reported_at >= _REPEAT_INTERVAL
            if not (self._changed or old or due):
                return
            reports = [replace(each, ago=now - at) for each, at in self._problems.values()]
            self._changed = False
        try:
            with connection() as opened:
                handler_problems.report(opened, self._process, self._host, reports)
        except BaseException:
            self._changed = True
            raise
        self._reported_at = now

    def withdraw(self, connection: Callable[[], AbstractContextManager[Connection]]) -> None:
        """Remove the problems of this process, which ends in order. Raises SQLAlchemyError."""
        with connection() as opened:
            handler_problems.report(opened, self._process, self._host, [])


def problem_of_failure(failure: LoadFailure, kind: Kind, handler: str, destination: str = "") -> HandlerProblem:
    """Make the HandlerProblem for a plugin that could not be loaded."""
    return HandlerProblem(
        kind=kind,
        handler=handler,
        destination=destination,
        error_class=failure.error_class,
        place=failure.place,
        detail=failure.summary,
    )


def summary(exc: Exception) -> str:
    """Return the text of a configuration error that may be logged."""
    return exc.failure.summary if isinstance(exc, PluginError) else str(exc)
