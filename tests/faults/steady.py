"""Handlers of an ordinary day: work in our database, an answer by the outbox, and now and then something goes wrong.

They keep nothing: what grows while they run is not theirs.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from receiver.handlers import Context, GiveUp, Message, handler, responder

# What `book` writes to.
TABLE = "CREATE TABLE booked (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text NOT NULL)"
RAISES_ONCE = "Notes.New"
GIVES_UP = "Media.Delete"


@handler("*", name="book", max_attempts=3, timeout=60)
def book(message: Message, context: Context) -> None:
    """A row of ours, in the order of each source."""
    context.connection.execute(text("INSERT INTO booked (key) VALUES (:key)"), {"key": context.idempotency_key})


@handler("PatientAdmin.*", name="chart", ordering="patient", patient_key="MR", max_attempts=3, timeout=60)
def chart(message: Message, context: Context) -> None:
    """Read it, in the order of each patient."""
    assert message.data["Patient"]


@handler("PatientAdmin.Arrival", name="greet", ordering="none", max_attempts=3, timeout=60)
def greet(message: Message, context: Context) -> None:
    """Answer by a message to Redox."""
    context.outbox.send({"Meta": {"DataModel": "Notes", "EventType": "New", "Destinations": [{"ID": "ward"}]}})


@handler("Notes.*", "Media.*", name="stumble", ordering="none", max_attempts=3, timeout=60)
def stumble(message: Message, context: Context) -> None:
    """Fail and be tried again, or give up."""
    if message.kind == GIVES_UP:
        raise GiveUp("no_such_media")
    if message.kind == RAISES_ONCE and context.attempt == 1:
        raise OSError("the ward is busy")


@responder("PatientSearch.Query", name="search", timeout=20)
def search(message: Message, context: Context) -> dict[str, Any]:
    """An answer."""
    return {"Meta": {"DataModel": "PatientSearch", "EventType": "Response"}, "Patient": None}
