"""Which deliveries a message makes, and the lane of each."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest

from receiver.keyring import Keyring
from receiver.protocol.message import ParsedMessage
from receiver.protocol.reading import read
from receiver.protocol.registry import Destination, Subscription
from receiver.storage.accept.fan_out import UNORDERED_LANES, NewDelivery, deliveries, lane, unordered
from receiver.storage.evidence.macs import KeyedDigests


def message(
    log: str = "log-1",
    *,
    source: str | None = "source-1",
    kind: str = "PatientAdmin.Arrival",
    identifiers: tuple[tuple[str, str], ...] = (("EPI", "9"), ("MR", "7"), ("MR", "8")),
) -> ParsedMessage:
    model, _, event = kind.partition(".")
    meta: dict[str, Any] = {"DataModel": model, "EventType": event, "Logs": [{"ID": log}]}
    if source is not None:
        meta["Source"] = {"ID": source}
    patient = {"Identifiers": [{"IDType": kind, "ID": value} for kind, value in identifiers]}
    return read(json.dumps({"Meta": meta, "Patient": patient}).encode())


def subscription(
    name: str = "register",
    *,
    role: Literal["handler", "responder"] = "handler",
    patterns: tuple[str, ...] = ("*",),
    **changes: Any,
) -> Subscription:
    return Subscription(id=1, handler=name, role=role, patterns=patterns, **changes)


def destination(*subscriptions: Subscription) -> Destination:
    return Destination(
        id=1,
        name="clinic",
        environment="production",
        enabled=True,
        require=(frozenset({"token"}),),
        subscriptions=subscriptions,
    )


@pytest.fixture
def digests(keyring: Keyring) -> KeyedDigests:
    return KeyedDigests(keyring)


def test_each_handler_that_asks_for_the_kind_gets_one(digests: KeyedDigests) -> None:
    """By pattern; a responder gets none, a paused handler does: it waits there."""
    made = deliveries(
        message(),
        destination(
            subscription("a", patterns=("PatientAdmin.*",)),
            subscription("b", patterns=("Order.*", "FHIR.*")),
            subscription("c", paused=True),
            subscription("d", role="responder"),
            subscription("e", acknowledge="after_handling"),
        ),
        digests,
    )
    assert made == [
        NewDelivery(handler="a", lane="a/clinic/source:source-1", inline=False),
        NewDelivery(handler="c", lane="c/clinic/source:source-1", inline=False),
        NewDelivery(handler="e", lane="e/clinic/source:source-1", inline=True),
    ]


def test_a_query_makes_none(digests: KeyedDigests) -> None:
    """It is its responder's."""
    assert deliveries(message(kind="PatientSearch.Query"), destination(subscription()), digests) == []


def test_a_lane_is_of_handler_destination_and_source(digests: KeyedDigests) -> None:
    """What may not overtake one another: two sources, two handlers, two destinations do not wait for each other."""
    lanes = {
        lane(subscription(name), place, message(source=source), digests)
        for name in ("a", "b")
        for place in ("clinic", "ward")
        for source in ("1", "2", None)
    }
    assert len(lanes) == 12
    assert len({lane(subscription(), "clinic", message(log), digests) for log in "123"}) == 1
    assert lane(subscription(), "clinic", message(source=None), digests) == "register/clinic/source:none"


def test_a_patients_lane_is_named_by_the_digest_of_the_first_identifier_of_that_type(digests: KeyedDigests) -> None:
    """Of that source: another hospital may give the number to somebody else. The identifier is not in the name."""
    by_patient = subscription(ordering="patient", patient_key="MR")
    named = lane(by_patient, "clinic", message(), digests)
    assert named == f"register/clinic/patient:{digests.patient('source-1', 'MR', '7').hex()[:32]}"
    assert named == lane(by_patient, "clinic", message("log-2", identifiers=(("MR", "7"),)), digests)
    assert named != lane(by_patient, "clinic", message(source="other", identifiers=(("MR", "7"),)), digests)
    assert named != lane(by_patient, "clinic", message(identifiers=(("MR", "8"),)), digests)


def test_a_message_without_that_identifier_goes_in_its_sources_lane(digests: KeyedDigests) -> None:
    """No patient, or none of that type."""
    by_patient = subscription(ordering="patient", patient_key="MR")
    for found in ((), (("EPI", "9"),)):
        assert lane(by_patient, "clinic", message(identifiers=found), digests) == "register/clinic/source:source-1"
    unkeyed = subscription(ordering="patient")
    assert lane(unkeyed, "clinic", message(), digests) == "register/clinic/source:source-1"


def test_without_order_messages_are_spread_over_a_few_lanes(digests: KeyedDigests) -> None:
    """As many run at once; a repeat of a message goes in the same."""
    free = subscription(ordering="none")
    lanes = [lane(free, "clinic", message(f"log-{n}"), digests) for n in range(400)]
    assert len(set(lanes)) == UNORDERED_LANES
    assert lanes == [lane(free, "clinic", message(f"log-{n}"), digests) for n in range(400)]


@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("register/clinic/any:7", True),
        ("register/clinic/source:any:7", False),
        ("register/clinic/patient:ab", False),
        ("register/clinic/source:none", False),
    ],
)
def test_a_lane_tells_whether_it_keeps_an_order(name: str, free: bool) -> None:
    """By its last part; a source may be called anything."""
    assert unordered(name) is free


@pytest.mark.parametrize("source", ["a/any:3", "/any:3", "any:3", "x" * 200, "a\nb", "é"])
def test_no_source_gets_into_a_lane_of_another_sort(digests: KeyedDigests, source: str) -> None:
    """An id is a claim: one that looks like a lane's end must not look like a lane without order."""
    name = lane(subscription(), "clinic", message(source=source), digests)
    assert not unordered(name)
    assert len(name) < 100
