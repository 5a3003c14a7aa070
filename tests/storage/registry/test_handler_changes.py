"""Changes to subscriptions."""

from __future__ import annotations

import pytest

from receiver.errors import Conflict
from tests.storage.door import DESTINATION, Door, handler
from tests.storage.registry.registered import add_destination, version


def test_enabling_a_handler_again_updates_it(door: Door) -> None:
    """Its row gets the current declaration, and is enabled."""
    door.enable(handler(timeout=10.0))
    door.registration.disable_handler(DESTINATION, "register", door.now)
    door.enable(handler(timeout=0.5, patterns=("Order.*",)))
    (subscription,) = door.destination.subscriptions
    assert (subscription.timeout, subscription.patterns) == (0.5, ("Order.*",))


def test_a_query_has_one_responder(door: Door) -> None:
    """A second responder is refused until the first is disabled; handlers are not."""
    door.enable(handler("search", role="responder", patterns=("PatientSearch.Query",)))
    door.enable(handler("watch", patterns=("PatientSearch.Query",)))
    other = handler("search2", role="responder", patterns=("Media.Query", "PatientSearch.Query"))
    with pytest.raises(Conflict, match=r"PatientSearch\.Query is answered by search at clinic"):
        door.enable(other)
    door.registration.disable_handler(DESTINATION, "search", door.now)
    door.enable(other)


def test_only_changed_declarations_are_updated(door: Door) -> None:
    """A worker's start changes nothing; a changed declaration of an enabled handler is stored."""
    door.enable(handler("a", timeout=17.3))
    door.enable(handler("b"))
    door.registration.disable_handler(DESTINATION, "b", door.now)
    before = version(door)
    door.registration.refresh_handlers([handler("a", timeout=17.3), handler("b", timeout=5.0), handler("c")], door.now)
    assert version(door) == before
    door.registration.refresh_handlers([handler("a", max_attempts=3)], door.now)
    assert version(door) == before + 1
    assert door.destination.subscriptions[0].max_attempts == 3


def test_a_pause_applies_to_every_destination_or_to_one(door: Door) -> None:
    """The number of bindings is returned. MACs stay valid, because they do not cover a pause."""
    add_destination(door, "ward")
    door.enable()
    door.registration.enable_handler("ward", handler(), door.now)
    assert door.registration.pause_handler("register", door.now, destination=None, reason="dead") == 2
    assert door.registration.resume_handler("register", door.now, destination="ward") == 1
    assert door.destination.subscriptions[0].paused
    assert door.value("SELECT pause_reason FROM subscriptions WHERE paused_at IS NOT NULL") == "dead"
