"""Registry changes: every operation that changes destinations, credentials, sources and handlers.

Must not serve reads (see receiver.storage.registry.loader, receiver.storage.operations.queries).
"""

from __future__ import annotations

from receiver.storage.registry.destination_changes import DestinationChanges
from receiver.storage.registry.handler_changes import HandlerChanges


class RegistryChanges(DestinationChanges, HandlerChanges):
    """Operations that change the registry. Each is one transaction (see RegistryTransactions)."""
