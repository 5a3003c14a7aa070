"""Handlers with effects that can be counted: rows in our database, and lines at a system that is not ours.

The other system is a file: one JSON line for each call, which outlives every process and tells what happened in which
order. A handler stands still where the test has put a gate before it. May hold nothing of a patient's.
"""

from __future__ import annotations

import json
import os
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from sqlalchemy import text

from receiver.handlers import Context, GiveUp, Message, RetryLater, handler, responder

# What `book` writes to. Nothing keeps a row from being there twice but that its work is done once; and of `beds` one
# row is changed again and again, so that whoever has not come to an end with it is in the way of the next.
TABLE = """
CREATE TABLE effects (id bigint GENERATED ALWAYS AS IDENTITY, key text NOT NULL, epoch bigint NOT NULL);
CREATE TABLE beds (destination text PRIMARY KEY, booked bigint NOT NULL)"""

# Kinds that go wrong with `shaky`, each in its own way.
ALWAYS_RAISES = "Device.New"
RAISES_ONCE = "Notes.New"
EXITS_ONCE = "Order.Cancel"
GIVES_UP = "Media.Delete"
COMES_LATER = "Flowsheet.New"
# What `strict` cannot handle: its lane is held.
POISON = "Vaccination.New"


def place() -> Path:
    """Where the other system's file is, and the gates for everybody: EFFECTS."""
    return Path(os.environ["EFFECTS"])


def places() -> list[Path]:
    """Where gates are: for everybody, and for this host alone (GATES), if it has some of its own."""
    return [place(), *map(Path, filter(None, [os.environ.get("GATES")]))]


def name_of(message: Message) -> str:
    """The message's name in the sender's ledger."""
    return message.log_id or f"sha256:{sha256(message.raw).hexdigest()}"


def tell(phase: str, message: Message, context: Context) -> None:
    """Call the other system, with our idempotency key."""
    line = {
        "phase": phase,
        "key": context.idempotency_key,
        "message": name_of(message),
        "handler": context.handler,
        "destination": context.destination,
        "attempt": context.attempt,
        "epoch": context.epoch,
        "replayed": context.replayed,
        "pid": os.getpid(),
        "worker": os.getppid(),
    }
    journal = os.open(place() / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, (json.dumps(line) + "\n").encode())
    os.close(journal)


def stand_at_gate(message: Message, context: Context) -> None:
    """Wait as long as there is a gate for this message before this handler."""
    gates = [each / f"{context.handler}.{name_of(message)}" for each in places()]
    if any(gate.exists() for gate in gates):
        tell("inside", message, context)
    while any(gate.exists() for gate in gates):
        time.sleep(0.02)


def first_time(message: Message, context: Context) -> bool:
    """Whether this delivery is here for the first time, over all of its attempts and whatever they ended by."""
    try:
        (place() / f"seen.{sha256(context.idempotency_key.encode()).hexdigest()}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@handler("*", name="book", max_attempts=3, timeout=60)
def book(message: Message, context: Context) -> None:
    """A row of ours, in the order of each source, and one that is changed."""
    tell("begin", message, context)
    context.connection.execute(
        text("INSERT INTO effects (key, epoch) VALUES (:key, :epoch)"),
        {"key": context.idempotency_key, "epoch": context.epoch},
    )
    context.connection.execute(
        text("INSERT INTO beds AS b VALUES (:name, 1) ON CONFLICT (destination) DO UPDATE SET booked = b.booked + 1"),
        {"name": context.destination},
    )
    stand_at_gate(message, context)


@handler("*", name="outside", ordering="patient", patient_key="MR", max_attempts=3, timeout=60)
def outside(message: Message, context: Context) -> None:
    """A line elsewhere, in the order of each patient."""
    tell("begin", message, context)
    stand_at_gate(message, context)
    tell("done", message, context)


@handler("*", name="anyhow", ordering="none", max_attempts=3, timeout=60)
def anyhow(message: Message, context: Context) -> None:
    """A line elsewhere, in no order."""
    tell("begin", message, context)
    tell("done", message, context)


@handler("Device.*", "Notes.*", "Order.*", "Media.*", "Flowsheet.*", name="shaky", max_attempts=2, timeout=60)
def shaky(message: Message, context: Context) -> None:
    """What goes wrong, in every way there is."""
    tell("begin", message, context)
    if message.kind == ALWAYS_RAISES:
        raise LookupError("there is no such device")
    if message.kind == GIVES_UP:
        raise GiveUp("no_such_media")
    if message.kind in (RAISES_ONCE, EXITS_ONCE, COMES_LATER) and first_time(message, context):
        if message.kind == COMES_LATER:
            raise RetryLater(0.3)
        if message.kind == EXITS_ONCE:
            os._exit(3)
        raise OSError("the ward is busy")
    tell("done", message, context)


@handler("Vaccination.*", name="strict", on_failure="hold", max_attempts=1, timeout=60)
def strict(message: Message, context: Context) -> None:
    """What waits for a person where it goes wrong."""
    tell("begin", message, context)
    if message.kind == POISON:
        raise LookupError("there is no such vaccine")
    tell("done", message, context)


@handler("Inventory.*", name="within", acknowledge="after_handling", max_attempts=3, timeout=30)
def within(message: Message, context: Context) -> None:
    """A line elsewhere, within the request."""
    tell("begin", message, context)
    tell("done", message, context)


@responder("PatientSearch.Query", name="search", timeout=20)
def search(message: Message, context: Context) -> dict[str, Any]:
    """An answer."""
    tell("begin", message, context)
    return {"Meta": {"DataModel": "PatientSearch", "EventType": "Response"}, "Patient": None}
