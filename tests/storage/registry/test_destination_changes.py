"""Changes to destinations and their sources."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError

from receiver.errors import ConfigurationError, Conflict
from receiver.storage.evidence.verify import verify
from receiver.storage.registry.credentials import new_token
from tests.storage.door import DESTINATION, SOURCE, Door
from tests.storage.registry.registered import add_destination, audited, version


def test_adding_a_destination_makes_it_and_its_token(door: Door) -> None:
    """The token is stored only as a digest."""
    token = new_token()
    number = add_destination(door, "ward", token=token)
    assert audited(door)[-1] == ("destination.add", f"destinations:{number}")
    assert door.value("SELECT count(*) FROM credentials WHERE destination_id = :id AND kind = 'token'", id=number) == 1
    assert token not in str(door.rows("SELECT * FROM credentials")) + str(door.rows("SELECT * FROM audit_events"))


@pytest.mark.parametrize("token", ["", "x" * 23, "ä" * 30, "x" * 30 + "\n", " " + "x" * 30, "x" * 30 + "\0"])
def test_an_invalid_token_is_refused(door: Door, token: str) -> None:
    """A token under 24 characters, beyond ASCII, or not valid in a header changes nothing."""
    before = version(door), audited(door)
    with pytest.raises(ConfigurationError, match="at least 24 printable ASCII"):
        add_destination(door, "ward", token=token)
    with pytest.raises(ConfigurationError, match="at least 24 printable ASCII"):
        door.registration.add_credential(DESTINATION, door.now, "token", {}, token.encode())
    assert (version(door), audited(door)) == before
    assert door.value("SELECT count(*) FROM destinations") == 1


@pytest.mark.parametrize("name", ["", "Clinic", "clinic/ward", "-clinic", "clinic-", "c" * 65, "clinic\n", "clïnic"])
def test_an_invalid_name_is_refused(door: Door, name: str) -> None:
    """The name is part of the URL and of lane names."""
    with pytest.raises(ConfigurationError, match="not a valid destination name"):
        add_destination(door, name)


def test_a_taken_name(door: Door) -> None:
    """The error names the command that shows the destination; the audit chain has no gap."""
    with pytest.raises(Conflict, match="destination show clinic"):
        add_destination(door, DESTINATION)
    add_destination(door, "ward")
    with door.engine.connect() as connection:
        assert verify(connection, door.keyring).first_bad is None


def test_a_value_that_the_table_refuses_is_not_a_conflict(door: Door) -> None:
    """Only a taken name is a Conflict."""
    with pytest.raises(DBAPIError, match="CheckViolation 23514"):
        add_destination(door, "ward", environment="moon")


@pytest.mark.parametrize("require", [[], ["telepathy"], ["token+telepathy"], [""]])
def test_an_invalid_requirement_is_refused(door: Door, require: list[str]) -> None:
    """When a destination is added, and when it is changed."""
    with pytest.raises(ConfigurationError, match="--require"):
        add_destination(door, "ward", require=require)
    with pytest.raises(ConfigurationError, match="--require"):
        door.registration.set_destination(DESTINATION, door.now, {"require": require})


def test_a_source_is_normalized(door: Door) -> None:
    """With `urn:uuid:` or in capitals it is the same source, which is enabled again."""
    for written in (f"urn:uuid:{SOURCE}", SOURCE.upper()):
        door.registration.disable_source(DESTINATION, written, door.now)
        assert door.destination.sources == {SOURCE: False}
        door.registration.add_source(DESTINATION, written, door.now, name=None)
        assert door.destination.sources == {SOURCE: True}


def test_messages_that_name_no_source(door: Door) -> None:
    """They are the source None; an empty id is refused."""
    door.registration.add_source(DESTINATION, None, door.now, name=None)
    door.registration.add_source(DESTINATION, None, door.now, name="nobody")
    assert door.destination.sources == {SOURCE: True, None: True}
    assert door.value("SELECT name FROM sources WHERE source_id IS NULL") == "nobody"
    for empty in ("", "urn:uuid:"):
        with pytest.raises(ConfigurationError, match="--none"):
            door.registration.add_source(DESTINATION, empty, door.now, name=None)
