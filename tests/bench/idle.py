"""Handlers that only note that they ran: 24 bytes in a file, so that the order is known from outside.

A note is the message's number (its Logs[].ID), the process, and the system's monotonic clock in nanoseconds.
"""

from __future__ import annotations

import os
import struct
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from receiver.handlers import Context, Message, handler

NOTE = struct.Struct("=qqq")
VARIABLE = "BENCH_NOTES"


class Note(NamedTuple):
    """One run of a handler."""

    number: int
    process: int
    at: int


@cache
def _file() -> int:
    return os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _note(message: Message, context: Context) -> None:
    os.write(_file(), NOTE.pack(int(message.log_id or 0), os.getpid(), time.monotonic_ns()))


def notes(path: Path) -> list[Note]:
    """Return the notes in the order of the clock."""
    written = path.read_bytes() if path.exists() else b""
    return sorted(
        (Note(*each) for each in NOTE.iter_unpack(written[: len(written) // NOTE.size * NOTE.size])),
        key=lambda note: note.at,
    )


@handler("*", name="by-source")
def by_source(message: Message, context: Context) -> None:
    """Ordered by source."""
    _note(message, context)


@handler("*", name="by-patient", ordering="patient", patient_key="MR")
def by_patient(message: Message, context: Context) -> None:
    """Ordered by patient."""
    _note(message, context)


@handler("*", name="in-none", ordering="none")
def in_none(message: Message, context: Context) -> None:
    """Unordered."""
    _note(message, context)
