"""Handlers that let slip whom they speak of, wherever a plugin can: what they say must end with them.

Whose name that is stands in the message alone.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

from sqlalchemy import text

from receiver.handlers import Context, GiveUp, Message, handler, responder

# Takes no row, and says so with the row in its error.
TABLE = "CREATE TABLE leaky (name text NOT NULL CHECK (length(name) > 100), born date)"


def whom(message: Message) -> str:
    """Whom it is about."""
    who = message.data["Patient"]["Demographics"]
    return f"{who['FirstName']} {who['LastName']}"


@handler("PatientAdmin.Arrival", name="raising", max_attempts=1)
def raising(message: Message, context: Context) -> None:
    """An error that quotes, caused by another that quotes."""
    try:
        raise KeyError(whom(message))
    except KeyError as exc:
        raise ValueError(f"no bed for {whom(message)}") from exc


@handler("PatientAdmin.Arrival", name="giving-up", max_attempts=1)
def giving_up(message: Message, context: Context) -> None:
    """A code that is none."""
    raise GiveUp(f"no bed for {whom(message)}")


@handler("PatientAdmin.Arrival", name="exiting", max_attempts=1)
def exiting(message: Message, context: Context) -> None:
    """An exit that quotes."""
    sys.exit(f"no bed for {whom(message)}")


@handler("PatientAdmin.Arrival", name="storing", max_attempts=1)
def storing(message: Message, context: Context) -> None:
    """A row that PostgreSQL refuses, and quotes."""
    context.connection.execute(text("INSERT INTO leaky (name) VALUES (:name)"), {"name": whom(message)})


@handler("PatientAdmin.Arrival", name="asking", max_attempts=1)
def asking(message: Message, context: Context) -> None:
    """A value that PostgreSQL cannot read, and quotes in its first line."""
    context.connection.execute(text("SELECT CAST(:name AS date)"), {"name": whom(message)})


@handler("PatientAdmin.Arrival", name="talking", max_attempts=1)
def talking(message: Message, context: Context) -> None:
    """Every way to say something, and success."""
    name = whom(message)
    context.log.info("bed.assigned", name=name, reason=7)
    context.log.warning(f"no bed for {name}")  # noqa: G004 - just that
    context.log.error("bed.none", exc_info=ValueError(name))
    logging.getLogger(__name__).error("no bed for %s", name)
    warnings.warn(f"no bed for {name}", stacklevel=1)
    print(name, flush=True)
    print(name, file=sys.stderr, flush=True)
    for descriptor in (1, 2):
        os.write(descriptor, name.encode())


@handler("PatientAdmin.Transfer", name="within", acknowledge="after_handling", max_attempts=1, timeout=20)
def within(message: Message, context: Context) -> None:
    """An error that quotes, while Redox waits."""
    raise ValueError(f"no bed for {whom(message)}")


@responder("PatientSearch.Query", name="failing", timeout=20)
def failing(message: Message, context: Context) -> dict[str, Any]:
    """An error that quotes, while somebody waits for an answer."""
    raise LookupError(f"nobody is called {whom(message)}")


@responder("PatientAdmin.VisitQuery", name="misanswering", timeout=20)
def misanswering(message: Message, context: Context) -> dict[str, Any]:
    """What is no answer."""
    return [str(message.data)]  # type: ignore[return-value]  # what a plugin without a type checker does


@responder("PatientSearch.LocationQuery", name="answering", timeout=20)
def answering(message: Message, context: Context) -> dict[str, Any]:
    """What is one, and discloses whatever was asked."""
    return {"Meta": {"DataModel": "PatientSearch", "EventType": "LocationQueryResponse"}, "Patients": [message.data]}
