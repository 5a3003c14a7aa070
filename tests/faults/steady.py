"""Handlers for a steady load: work in our database, a message through the outbox, and some failures.

They keep nothing in memory, so whatever grows while they run is not theirs.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from receiver.handlers import Context, GiveUp, Message, handler, responder

# The table of `book`.
TABLE = "CREATE TABLE booked (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text NOT NULL)"
RAISES_ONCE = "Notes.New"
GIVES_UP = "Media.Delete"


@handler("*", name="book", max_attempts=3, timeout=60)
def book(message: Message, context: Context) -> None:
    """Insert a row, in the order of each source."""
    context.connection.execute(text("INSERT INTO booked (key) VALUES (:key)"), {"key": context.idempotency_key})


@handler("PatientAdmin.*", name="chart", ordering="patient", patient_key="MR", max_attempts=3, timeout=60)
def chart(message: Message, context: Context) -> None:
    """Read the message, in the order of each patient."""
    assert message.data["Patient"]


@handler("PatientAdmin.Arrival", name="greet", ordering="none", max_attempts=3, timeout=60)
def greet(message: Message, context: Context) -> None:
    """Send a message to Redox through the outbox."""
    context.outbox.send({"Meta": {"DataModel": "Notes", "EventType": "New", "Destinations": [{"ID": "ward"}]}})


@handler("Notes.*", "Media.*", name="stumble", ordering="none", max_attempts=3, timeout=60)
def stumble(message: Message, context: Context) -> None:
    """Fail once, or give up."""
    if message.kind == GIVES_UP:
        raise GiveUp("no_such_media")
    if message.kind == RAISES_ONCE and context.attempt == 1:
        raise OSError("the ward is busy")


@responder("PatientSearch.Query", name="search", timeout=20)
def search(message: Message, context: Context) -> dict[str, Any]:
    """Answer a query."""
    return {"Meta": {"DataModel": "PatientSearch", "EventType": "Response"}, "Patient": None}
