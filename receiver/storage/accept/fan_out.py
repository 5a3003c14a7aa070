"""Fan-out: the deliveries that a message creates, and the lane of each.

A lane is a sequence of deliveries that run in order: handler, destination, and the value that the handler orders by.
Must not write: the ledger and replay do.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from receiver.protocol.message import ParsedMessage
from receiver.protocol.patients import PatientIdentifier, identifiers
from receiver.protocol.patterns import matches
from receiver.protocol.registry import Destination, Subscription
from receiver.protocol.sources import ID_SHAPE
from receiver.protocol.values import Value
from receiver.storage.evidence.macs import KeyedDigests

# Deliveries of an unordered handler are spread over this many lanes, in which none waits for an earlier one. This many
# of them run at once.
UNORDERED_LANES: Final = 16


class NewDelivery(Value, frozen=True, kw_only=True):
    """A delivery to create. An `inline` one runs in the request, before it is answered."""

    handler: str
    lane: str
    inline: bool


def deliveries(message: ParsedMessage, destination: Destination, digests: KeyedDigests) -> list[NewDelivery]:
    """Return one delivery for each enabled handler that subscribes to the message's kind; none for a query."""
    if message.query:
        return []
    return [
        NewDelivery(
            handler=each.handler,
            lane=lane(each, destination.name, message, digests),
            inline=each.acknowledge == "after_handling",
        )
        for each in destination.subscriptions
        if each.role == "handler" and _asks(each.patterns, message.kind)
    ]


def lane(subscription: Subscription, destination: str, message: ParsedMessage, digests: KeyedDigests) -> str:
    """Return `handler/destination/…`. The handler comes first, because workers select lanes by handler."""
    start = f"{subscription.handler}/{destination}"
    if subscription.ordering == "none":
        return f"{start}/any:{message.key[0] % UNORDERED_LANES}"
    if subscription.ordering == "patient" and subscription.patient_key is not None:
        found = _patient(identifiers(message.raw), subscription.patient_key, message.source_id, digests)
        if found is not None:
            return f"{start}/patient:{found}"
    return f"{start}/source:{_source_name(message.source_id, digests)}"


# There are few kinds and patterns.
_asks: Final = lru_cache(4096)(matches)


def unordered(lane: str) -> bool:
    """Return whether the lane is unordered: no delivery waits for an earlier one."""
    return lane.rpartition("/")[2].startswith("any:")


def _patient(
    found: Iterable[PatientIdentifier], patient_key: str, source_id: str | None, digests: KeyedDigests
) -> str | None:
    for each in found:
        if each.type == patient_key:
            return digests.patient(each.authority or source_id, each.type, each.value).hex()[:32]
    return None


def _source_name(source_id: str | None, digests: KeyedDigests) -> str:
    """Return the source in a form that fits a lane's name: a value not shaped like an id is replaced by its digest."""
    if source_id is None:
        return "none"
    return source_id if ID_SHAPE.fullmatch(source_id) else digests.source(source_id).hex()[:32]
