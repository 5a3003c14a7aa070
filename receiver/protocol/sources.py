"""Whether a verified message may in: its source, and its being a test.

Must not know how a refusal is answered or kept.
"""

from __future__ import annotations

import re
from typing import Final

from receiver.errors import UnknownSource
from receiver.protocol.message import ParsedMessage
from receiver.protocol.registry import Destination

# What an id looks like: without a digit it may be a name. Anything else that is claimed as a source is kept as a
# digest only: it may be anybody's data.
ID_SHAPE: Final = re.compile(r"(?=[^0-9]*[0-9])[A-Za-z0-9._:-]{1,64}")


def admit(message: ParsedMessage, destination: Destination) -> str | None:
    """None when the message is to be dispatched, else the reason for its quarantine.

    Raises UnknownSource (403): `source_missing`, `source_unknown`, `source_disabled`, `test_rejected`. A query is never
    quarantined, for nobody could answer it later: what would be, is refused.
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
