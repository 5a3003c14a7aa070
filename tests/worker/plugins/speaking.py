"""Handlers that call Redox as the message says."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from receiver.handlers import Context, GiveUp, Message, handler, responder


def note(number: int, to: str) -> dict[str, Any]:
    """Return a message to Redox that says which message it answers."""
    return {"Meta": {"DataModel": "Notes", "EventType": "New", "Destinations": [{"ID": to}]}, "N": number}


@handler("PatientAdmin.*", name="reply")
def reply(message: Message, context: Context) -> None:
    """Answer by a message in the outbox, then succeed, fail once, or give up."""
    number, do = message.data["N"], message.data["Do"]
    context.connection.execute(text("SELECT 1"))
    context.outbox.send(note(number, message.data.get("To", "destination-1")))
    if do == "fail-once" and context.attempt == 1:
        raise RuntimeError
    if do == "give-up":
        raise GiveUp("asked_to")


@handler("Order.*", name="ask")
def ask(message: Message, context: Context) -> None:
    """Call Redox directly, and answer with its answer."""
    number = message.data["N"]
    found = context.redox.query(
        {"Meta": {"DataModel": "PatientSearch", "EventType": "Query", "Destinations": [{"ID": "search"}]}, "N": number}
    )
    context.outbox.send({**note(number, "destination-1"), "Found": found.data["Patient"]})


@responder("PatientSearch.Query", name="relay")
def relay(message: Message, context: Context) -> dict[str, Any]:
    """Answer a query with the answer of Redox."""
    found = context.redox.query(
        {"Meta": {"DataModel": "PatientSearch", "EventType": "Query", "Destinations": [{"ID": "search"}]}}
    )
    context.outbox.send(note(message.data["N"], "destination-1"))
    return {"Meta": {"DataModel": "PatientSearch", "EventType": "Response"}, "Patient": found.data["Patient"]}
