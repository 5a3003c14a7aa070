"""A door to write through, and a ledger that writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import Engine

from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.registry.changes import RegistryChanges
from tests.storage.door import Door

QUOTA = 100 * 1024 * 1024


@pytest.fixture
def door(engine: Engine, keyring: Keyring, registration: RegistryChanges) -> Door:
    """The destination `clinic`, registered in the fresh database."""
    return Door(engine, keyring, registration).build()


@pytest.fixture
def open_ledger(engine: Engine, keyring: Keyring) -> Iterator[Callable[..., MessageLedger]]:
    """Start a ledger as a receiver process does; it is stopped at the end."""
    with ExitStack() as stack:

        def begin(**options: Any) -> MessageLedger:
            ledger = MessageLedger(engine, keyring, **{"quarantine_quota": QUOTA} | options)
            ledger.start()
            stack.callback(ledger.stop)
            return ledger

        yield begin


@pytest.fixture
def ledger(open_ledger: Callable[..., MessageLedger]) -> MessageLedger:
    """One ledger."""
    return open_ledger()
