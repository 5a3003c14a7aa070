"""Recording requests in the outbox."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.orm import Session

from receiver.errors import ConfigurationError, NotFound
from receiver.outbound import NetworkOnramp, Unsendable
from receiver.outbound.outbox import Caller
from tests.outbound.conftest import message, query
from tests.outbound.outbox.conftest import Desk


class Undone(Exception):
    """What the test raises."""


def test_the_callers_transaction(desk: Desk) -> None:
    """On a connection of the caller, a request is recorded with its commit, and not after a rollback."""
    outbox = desk.outbox()

    def undo() -> None:
        with desk.engine.begin() as connection:
            outbox.send(message(), connection=connection)
            raise Undone

    with pytest.raises(Undone):
        undo()
    assert desk.rows() == []
    with desk.engine.begin() as connection:
        outbox.send(message(), connection=connection)
        assert desk.rows() == []

    assert desk.states() == ["pending"]


def test_an_orm_session(desk: Desk) -> None:
    """A request is recorded in the transaction of an ORM session."""
    with Session(desk.engine) as session:
        desk.outbox().send(message(), connection=session.connection())
        session.rollback()
        desk.outbox().send(query(), connection=session.connection())
        session.commit()

    assert [row.kind for row in desk.rows()] == ["PatientSearch.Query"]


def test_without_a_connection(desk: Desk) -> None:
    """Without a connection, a request is recorded in its own transaction."""
    uuid = desk.outbox().send(message())

    assert desk.row(uuid).state == "pending"


def test_a_bound_outbox_writes_where_it_is_bound(desk: Desk) -> None:
    """A bound outbox, as a handler has it, uses its connection and its key."""
    asked: list[str] = []

    def key() -> str:
        asked.append("key")
        return "other"

    desk.add_key("other", environment="production")
    with desk.engine.begin() as connection:
        outbox = desk.outbox(Caller(name="handler:x"), key=key, connect=lambda: connection)
        assert asked == []
        uuid = outbox.send(message())
        named = outbox.send(message(), key="lab")

    assert (desk.row(uuid).api_key, desk.row(named).api_key) == ("other", "lab")
    assert asked == ["key"]


@pytest.mark.parametrize(
    ("whole", "says"),
    [
        (message(Destinations=[]), "no destination"),
        (message(Destinations=[{"ID": "a"}, {"ID": "b"}]), "one message for"),
        (message(DataModel=""), "DataModel"),
        ({**message(), "X": float("nan")}, "JSON"),
        (b"\xff", "UTF-8"),
        (message(Padding="x" * (41 * 1024 * 1024)), "at most"),
    ],
)
def test_invalid_requests_are_not_recorded(desk: Desk, whole: Any, says: str) -> None:
    """A request that can never be sent, or has no order, is an error for the caller at once."""
    with pytest.raises(Unsendable, match=says):
        desk.outbox().send(whole)
    assert desk.rows() == []


def test_the_choice_of_a_key(desk: Desk) -> None:
    """A single key need not be named. One of several must be, and an unknown key is an error."""
    desk.outbox().send(message())
    desk.add_key("old", legacy=True)
    with pytest.raises(ConfigurationError, match="lab, old"):
        desk.outbox().send(message())
    with pytest.raises(NotFound, match="outbound key list"):
        desk.outbox().send(message(), key="unheard-of")
    with pytest.raises(Unsendable, match="OAuth"):
        desk.outbox(key="old").fhir("our-ehr", "Production")
    with pytest.raises(Unsendable, match="legacy"):
        desk.outbox(key="old").send(message(), onramp=NetworkOnramp(organization="o", user="u", role="r"))


def test_a_source_is_filled_in_or_asked_for(desk: Desk) -> None:
    """The key's source is filled in. Where several keys are of one environment, a source is required."""
    uuid = desk.outbox().send(message())
    row = desk.row(uuid)
    call = desk.recorder.bodies.open_call(row.request_key, row.request, uuid, "lab")
    assert b'"Source":{"ID":"source-1"}' in (call.body or b"")
    desk.add_key("more", source=None)

    with pytest.raises(Unsendable, match="source"):
        desk.outbox(key="more").send(message())


def test_what_is_shown_of_a_request_names_nobody(desk: Desk) -> None:
    """Kind, lane and caller have no personal data: a destination that does not look like an id is shown as a digest."""
    uuid = desk.outbox().send(message(Destinations=[{"ID": "Ada Byron"}]))
    row = desk.row(uuid)

    assert row.kind == "PatientAdmin.Arrival"
    assert "Ada" not in str(row)
    assert row.lane.startswith("@outbox/lab/")
