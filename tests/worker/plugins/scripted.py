"""Handlers that do what the message says, and record it in a journal: a file with one JSON line for each action."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from receiver.handlers import Context, GiveUp, Message, RetryLater, handler, responder

PATIENT = "Zoltana Quibblewitz"
LEFT_OVER: list[Any] = []


class Book(BaseModel):
    """Where this plugin writes: PLUGIN_<NAME>_JOURNAL."""

    journal: Path


def note(phase: str, message: Message, context: Context, **more: Any) -> None:
    """Add a line to the journal."""
    line = {
        "phase": phase,
        "n": message.data.get("N"),
        "handler": context.handler,
        "attempt": context.attempt,
        "key": context.idempotency_key,
        "epoch": context.epoch,
        "pid": os.getpid(),
        "at": time.monotonic(),
        "replayed": context.replayed,
        **more,
    }
    journal = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, (json.dumps(line) + "\n").encode())
    os.close(journal)


def act(message: Message, context: Context) -> None:
    """Do what the message says."""
    note("begin", message, context)
    deed, *arguments = message.data.get("Do", "nothing").split(":")
    DEEDS[deed](message, context, *arguments)
    note("end", message, context)


def _raise(message: Message, context: Context, until: str = "1000") -> None:
    if context.attempt < int(until):
        raise ValueError(f"no bed for {PATIENT}")


def _retry_later(message: Message, context: Context, after: str, flag: str = "/nowhere") -> None:
    if not Path(flag).exists():
        raise RetryLater(float(after))


def _give_up(message: Message, context: Context) -> None:
    raise GiveUp("no_such_ward")


def _loop(message: Message, context: Context) -> None:
    while True:
        pass


def _hold_interpreter(message: Message, context: Context) -> None:
    ctypes.PyDLL(None).sleep(3600)  # unlike CDLL it keeps the lock that Python's threads share


def _sleep(message: Message, context: Context, seconds: str = "1e9") -> None:
    time.sleep(float(seconds))


def _exit(message: Message, context: Context) -> None:
    os._exit(3)


def _system_exit(message: Message, context: Context) -> None:
    sys.exit(4)


def _segfault(message: Message, context: Context) -> None:
    ctypes.string_at(0)


def _memory(message: Message, context: Context) -> None:
    while True:
        LEFT_OVER.append(bytearray(1 << 24))


def _close_fds(message: Message, context: Context) -> None:
    os.closerange(0, 4096)
    time.sleep(1e9)


def _print(message: Message, context: Context) -> None:
    print(PATIENT, flush=True)
    print(PATIENT, file=sys.stderr, flush=True)
    os.write(1, PATIENT.encode())
    os.write(2, PATIENT.encode())


def _log(message: Message, context: Context) -> None:
    context.log.info("bed.assigned", count=7, name=PATIENT)
    careless = f"no bed for {PATIENT}"
    context.log.warning(careless)


def _fork(message: Message, context: Context) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(1e9)
    note("forked", message, context, child=child)
    time.sleep(1e9)


def _fork_return(message: Message, context: Context) -> None:
    note("forked", message, context, child=os.fork())


def _wait_for(message: Message, context: Context, flag: str) -> None:
    while not Path(flag).exists():
        time.sleep(0.02)


def _insert(message: Message, context: Context) -> None:
    context.connection.execute(
        text("INSERT INTO effects (n, attempt) VALUES (:n, :attempt)"),
        {"n": message.data["N"], "attempt": context.attempt},
    )


def _insert_raise(message: Message, context: Context, until: str = "1000") -> None:
    _insert(message, context)
    _raise(message, context, until)


def _insert_wait(message: Message, context: Context, flag: str) -> None:
    _insert(message, context)
    note("inserted", message, context)
    _wait_for(message, context, flag)


def _commit(message: Message, context: Context) -> None:
    _insert(message, context)
    context.connection.commit()


def _spoil(message: Message, context: Context) -> None:
    _insert(message, context)
    with suppress(SQLAlchemyError):
        context.connection.execute(text("SELECT 1/0"))


def _sql_error(message: Message, context: Context) -> None:
    context.connection.execute(text("SELECT * FROM nothing_of_this_name"))


def _no_key(message: Message, context: Context) -> None:
    context.outbox.send({"Meta": {"DataModel": "PatientAdmin", "EventType": "Arrival"}})


def _late_violation(message: Message, context: Context) -> None:
    context.connection.execute(text("INSERT INTO twins (n) VALUES (1)"))


def _query_sleep(message: Message, context: Context) -> None:
    context.connection.execute(text("SELECT pg_sleep(1000)"))


def _settings(message: Message, context: Context) -> None:
    note("settings", message, context, journal=str(context.settings(Book).journal))


def _facts(message: Message, context: Context) -> None:
    note(
        "facts",
        message,
        context,
        kind=message.kind,
        source=message.source_id,
        log=message.log_id,
        test=message.test,
        bytes=len(message.raw),
        model=type(message.model()).__name__,
    )


DEEDS: dict[str, Callable[..., None]] = {
    "nothing": lambda *_: None,
    "raise": _raise,
    "retry_later": _retry_later,
    "give_up": _give_up,
    "loop": _loop,
    "hold_interpreter": _hold_interpreter,
    "sleep": _sleep,
    "exit": _exit,
    "system_exit": _system_exit,
    "segfault": _segfault,
    "memory": _memory,
    "close_fds": _close_fds,
    "print": _print,
    "log": _log,
    "fork": _fork,
    "fork_return": _fork_return,
    "wait_for": _wait_for,
    "insert": _insert,
    "insert_raise": _insert_raise,
    "insert_wait": _insert_wait,
    "commit": _commit,
    "spoil": _spoil,
    "sql_error": _sql_error,
    "no_key": _no_key,
    "late_violation": _late_violation,
    "query_sleep": _query_sleep,
    "settings": _settings,
    "facts": _facts,
}

scripted = handler("*", name="scripted", max_attempts=2, timeout=3)(act)


@handler("*", name="by-patient", ordering="patient", patient_key="MR", max_attempts=2, timeout=3)
def by_patient(message: Message, context: Context) -> None:
    """Ordered by patient."""
    act(message, context)


@handler("*", name="unordered", ordering="none", max_attempts=2, timeout=3)
def unordered(message: Message, context: Context) -> None:
    """Unordered."""
    act(message, context)


@handler("*", name="holding", on_failure="hold", max_attempts=1, timeout=3)
def holding(message: Message, context: Context) -> None:
    """A failure holds the lane."""
    act(message, context)


@handler("*", name="fragile", max_attempts=1, timeout=3)
def fragile(message: Message, context: Context) -> None:
    """One attempt."""
    act(message, context)


@handler("*", name="brief", max_attempts=1, timeout=1)
def brief(message: Message, context: Context) -> None:
    """One attempt, with a timeout of one second."""
    act(message, context)


@handler("*", name="patient-one", max_attempts=5, timeout=120)
def patient_one(message: Message, context: Context) -> None:
    """With a long timeout."""
    act(message, context)


@handler("*", name="within", acknowledge="after_handling", max_attempts=2, timeout=3)
def within(message: Message, context: Context) -> None:
    """Within the request."""
    act(message, context)


@responder("PatientSearch.Query", name="search", timeout=3)
def search(message: Message, context: Context) -> dict[str, Any]:
    """Do what the message says, then answer."""
    act(message, context)
    if (what := message.data.get("Answer")) is not None:
        wrong: Any = {
            "none": None,
            "text": "yes",
            "model": Book(journal=Path("/")),
            "empty": {},
            "object": {"Meta": {"Odd": object()}},
        }
        return wrong[what]  # type: ignore[no-any-return]  # what a plugin without a type checker does
    return {
        "Meta": {"DataModel": "PatientSearch", "EventType": "Response"},
        "Echo": message.data.get("N"),
        "Much": "x" * message.data.get("Size", 0),
    }
