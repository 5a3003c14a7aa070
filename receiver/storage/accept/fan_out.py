"""Which deliveries a message makes, and the lane of each.

A lane is a sequence of deliveries that must not overtake one another: handler, destination, and what the handler orders
by. May not write: the ledger and the replay do.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from typing import Final

from receiver.protocol.message import ParsedMessage
from receiver.protocol.patients import identifiers
from receiver.protocol.patterns import matches
from receiver.protocol.registry import Destination, Subscription
from receiver.protocol.sources import ID_SHAPE
from receiver.protocol.values import Value
from receiver.storage.evidence.macs import PatientDigests

# Deliveries of a handler without order are spread over this many lanes, in which nothing waits for what is before it:
# as many of them run at once.
UNORDERED_LANES: Final = 16


class NewDelivery(Value, frozen=True, kw_only=True):
    """A delivery to be made: `inline` ones are run in the request, before it is answered."""

    handler: str
    lane: str
    inline: bool


def deliveries(message: ParsedMessage, destination: Destination, digests: PatientDigests) -> list[NewDelivery]:
    """One for each handler that is enabled for the destination and asks for the message's kind; none for a query."""
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


def lane(subscription: Subscription, destination: str, message: ParsedMessage, digests: PatientDigests) -> str:
    """`handler/destination/…`: the handler's name comes first, for workers take lanes of the handlers they have."""
    start = f"{subscription.handler}/{destination}"
    if subscription.ordering == "none":
        return f"{start}/any:{message.key[0] % UNORDERED_LANES}"
    if subscription.ordering == "patient" and subscription.patient_key is not None:
        found = _patient(identifiers(message.raw), subscription.patient_key, digests)
        if found is not None:
            return f"{start}/patient:{found}"
    return f"{start}/source:{_short(message.source_id)}"


# Kinds and patterns are few.
_asks: Final = lru_cache(4096)(matches)


def unordered(lane: str) -> bool:
    """Whether nothing in this lane waits for what is before it."""
    return lane.rpartition("/")[2].startswith("any:")


def _patient(found: Iterable[tuple[str, str]], patient_key: str, digests: PatientDigests) -> str | None:
    for id_type, value in found:
        if id_type == patient_key:
            return digests.digest(id_type, value).hex()[:32]
    return None


@lru_cache(1024)
def _short(source_id: str | None) -> str:
    """The source as a lane's name can hold it: what is not shaped like an id is named by its digest."""
    if source_id is None:
        return "none"
    return source_id if ID_SHAPE.fullmatch(source_id) else sha256(source_id.encode()).hexdigest()[:32]
