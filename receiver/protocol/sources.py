"""Sources and test messages: whether a verified message is accepted, quarantined or refused.

Must not know how a refusal is answered or stored.
"""

from __future__ import annotations

import re
from typing import Final

from receiver.errors import UnknownSource
from receiver.protocol.message import ParsedMessage
from receiver.protocol.registry import Destination

# The shape of an id: without a digit it may be a person's name. A source of any other shape is stored as a digest only,
# because it may be a patient's data.
ID_SHAPE: Final = re.compile(r"(?=[^0-9]*[0-9])[A-Za-z0-9._:-]{1,64}")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_URN: Final = "urn:uuid:"


def admit(message: ParsedMessage, destination: Destination) -> str | None:
    """Return None if the message is dispatched, otherwise the reason for its quarantine.

    Raises UnknownSource (403): `source_missing`, `source_unknown`, `source_disabled`, `test_rejected`. A query is
    refused instead of quarantined, because it could not be answered later.
    """
    reason = _source_fault(message, destination)
    if reason is not None:
        if destination.on_unknown_source == "reject" or message.query:
            raise UnknownSource(reason)
        return reason
    if message.test and destination.test_messages != "accept":
        if destination.test_messages == "reject" or message.query:
            raise UnknownSource("test_rejected")
        return "test_message"
    return None


def _source_fault(message: ParsedMessage, destination: Destination) -> str | None:
    enabled = destination.sources.get(message.source_id)
    if enabled is False:
        return "source_disabled"
    if enabled or destination.sources_policy == "any":
        return None
    return "source_missing" if message.source_id is None else "source_unknown"


def normalize_source(identity: str) -> str:
    """Return a source's id in the form that is registered and compared: without `urn:uuid:`, a UUID in lower case.

    The case of a UUID (RFC 9562 4) and of `urn:uuid:` (RFC 8141 3.1) is not significant.
    """
    if identity[: len(_URN)].lower() == _URN:
        identity = identity[len(_URN) :]
    return identity.lower() if _UUID.fullmatch(identity) else identity
