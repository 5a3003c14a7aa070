"""Handlers whose effects can be counted: rows in our database, and calls to an external system.

The external system is a file with one JSON line for each call, in order. It survives every process. A test can block a
handler for a message with a gate: a file. Must not hold patients' data.
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

# The tables of `book`. `effects` has no unique constraint, so work that runs twice leaves two rows. `beds` has one row
# for each destination, so an unfinished transaction blocks the next one.
TABLE = """
CREATE TABLE effects (id bigint GENERATED ALWAYS AS IDENTITY, key text NOT NULL, epoch bigint NOT NULL);
CREATE TABLE beds (destination text PRIMARY KEY, booked bigint NOT NULL)"""

# Kinds that fail with `shaky`, each in its own way.
ALWAYS_RAISES = "Device.New"
RAISES_ONCE = "Notes.New"
EXITS_ONCE = "Order.Cancel"
GIVES_UP = "Media.Delete"
COMES_LATER = "Flowsheet.New"
# The kind that `strict` cannot handle: its lane is held.
POISON = "Vaccination.New"


def directory() -> Path:
    """Return the directory of the external system's file and of the gates for all hosts: EFFECTS."""
    return Path(os.environ["EFFECTS"])


def gate_directories() -> list[Path]:
    """Return the directories of gates: for all hosts, and for this host (GATES) if it has one."""
    return [directory(), *map(Path, filter(None, [os.environ.get("GATES")]))]


def name_of(message: Message) -> str:
    """Return the id of the message in the sender's attempt log."""
    return message.log_id or f"sha256:{sha256(message.raw).hexdigest()}"


def call(phase: str, message: Message, context: Context) -> None:
    """Call the external system, with our idempotency key."""
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
    journal = os.open(directory() / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, (json.dumps(line) + "\n").encode())
    os.close(journal)


def wait_at_gate(message: Message, context: Context) -> None:
    """Wait while there is a gate for this handler and message."""
    gates = [each / f"{context.handler}.{name_of(message)}" for each in gate_directories()]
    if any(gate.exists() for gate in gates):
        call("inside", message, context)
    while any(gate.exists() for gate in gates):
        time.sleep(0.02)


def first_time(message: Message, context: Context) -> bool:
    """Return whether this is the first call for this delivery, over all of its attempts and processes."""
    try:
        (directory() / f"seen.{sha256(context.idempotency_key.encode()).hexdigest()}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@handler("*", name="book", max_attempts=3, timeout=60)
def book(message: Message, context: Context) -> None:
    """Insert a row and update another, in the order of each source."""
    call("begin", message, context)
    context.connection.execute(
        text("INSERT INTO effects (key, epoch) VALUES (:key, :epoch)"),
        {"key": context.idempotency_key, "epoch": context.epoch},
    )
    context.connection.execute(
        text("INSERT INTO beds AS b VALUES (:name, 1) ON CONFLICT (destination) DO UPDATE SET booked = b.booked + 1"),
        {"name": context.destination},
    )
    wait_at_gate(message, context)


@handler("*", name="outside", ordering="patient", patient_key="MR", max_attempts=3, timeout=60)
def outside(message: Message, context: Context) -> None:
    """Call the external system, in the order of each patient."""
    call("begin", message, context)
    wait_at_gate(message, context)
    call("done", message, context)


@handler("*", name="anyhow", ordering="none", max_attempts=3, timeout=60)
def anyhow(message: Message, context: Context) -> None:
    """Call the external system, in no order."""
    call("begin", message, context)
    call("done", message, context)


@handler("Device.*", "Notes.*", "Order.*", "Media.*", "Flowsheet.*", name="shaky", max_attempts=2, timeout=60)
def shaky(message: Message, context: Context) -> None:
    """Fail, in every way there is."""
    call("begin", message, context)
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
    call("done", message, context)


@handler("Vaccination.*", name="strict", on_failure="hold", max_attempts=1, timeout=60)
def strict(message: Message, context: Context) -> None:
    """Hold the lane on a failure, until an operator acts."""
    call("begin", message, context)
    if message.kind == POISON:
        raise LookupError("there is no such vaccine")
    call("done", message, context)


@handler("Inventory.*", name="within", acknowledge="after_handling", max_attempts=3, timeout=30)
def within(message: Message, context: Context) -> None:
    """Call the external system, within the request."""
    call("begin", message, context)
    call("done", message, context)


@responder("PatientSearch.Query", name="search", timeout=20)
def search(message: Message, context: Context) -> dict[str, Any]:
    """Answer a query."""
    call("begin", message, context)
    return {"Meta": {"DataModel": "PatientSearch", "EventType": "Response"}, "Patient": None}
