"""Handlers that leak a patient's name in every way a plugin can. The receiver must keep it from its output.

The name is only in the message.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

from sqlalchemy import text

from receiver.handlers import Context, GiveUp, Message, handler, responder

# Refuses every row, with an error that quotes the row.
TABLE = "CREATE TABLE leaky (name text NOT NULL CHECK (length(name) > 100), born date)"


def name_of(message: Message) -> str:
    """Return the patient's name."""
    who = message.data["Patient"]["Demographics"]
    return f"{who['FirstName']} {who['LastName']}"


@handler("PatientAdmin.Arrival", name="raising", max_attempts=1)
def raising(message: Message, context: Context) -> None:
    """Raise an error that quotes the name, caused by another that does."""
    try:
        raise KeyError(name_of(message))
    except KeyError as exc:
        raise ValueError(f"no bed for {name_of(message)}") from exc


@handler("PatientAdmin.Arrival", name="giving-up", max_attempts=1)
def giving_up(message: Message, context: Context) -> None:
    """Give up with a sentence instead of a code."""
    raise GiveUp(f"no bed for {name_of(message)}")


@handler("PatientAdmin.Arrival", name="exiting", max_attempts=1)
def exiting(message: Message, context: Context) -> None:
    """Exit with a message that quotes the name."""
    sys.exit(f"no bed for {name_of(message)}")


@handler("PatientAdmin.Arrival", name="storing", max_attempts=1)
def storing(message: Message, context: Context) -> None:
    """Insert a row that PostgreSQL refuses with an error that quotes it."""
    context.connection.execute(text("INSERT INTO leaky (name) VALUES (:name)"), {"name": name_of(message)})


@handler("PatientAdmin.Arrival", name="asking", max_attempts=1)
def asking(message: Message, context: Context) -> None:
    """Cast a value that PostgreSQL cannot read; its error quotes it in the first line."""
    context.connection.execute(text("SELECT CAST(:name AS date)"), {"name": name_of(message)})


@handler("PatientAdmin.Arrival", name="talking", max_attempts=1)
def talking(message: Message, context: Context) -> None:
    """Write the name to every output, and succeed."""
    name = name_of(message)
    context.log.info("bed.assigned", name=name, reason=7)
    context.log.warning(f"no bed for {name}")  # noqa: G004 - intended
    context.log.error("bed.none", exc_info=ValueError(name))
    logging.getLogger(__name__).error("no bed for %s", name)
    warnings.warn(f"no bed for {name}", stacklevel=1)
    print(name, flush=True)
    print(name, file=sys.stderr, flush=True)
    for descriptor in (1, 2):
        os.write(descriptor, name.encode())


@handler("PatientAdmin.Transfer", name="within", acknowledge="after_handling", max_attempts=1, timeout=20)
def within(message: Message, context: Context) -> None:
    """Raise an error that quotes the name, within the request."""
    raise ValueError(f"no bed for {name_of(message)}")


@responder("PatientSearch.Query", name="failing", timeout=20)
def failing(message: Message, context: Context) -> dict[str, Any]:
    """Raise an error that quotes the name, as a responder."""
    raise LookupError(f"no patient is called {name_of(message)}")


@responder("PatientAdmin.VisitQuery", name="misanswering", timeout=20)
def misanswering(message: Message, context: Context) -> dict[str, Any]:
    """Return something that is not a valid answer."""
    return [str(message.data)]  # type: ignore[return-value]  # a plugin may do this


@responder("PatientSearch.LocationQuery", name="answering", timeout=20)
def answering(message: Message, context: Context) -> dict[str, Any]:
    """Return a valid answer that discloses the data of the query."""
    return {"Meta": {"DataModel": "PatientSearch", "EventType": "LocationQueryResponse"}, "Patients": [message.data]}
