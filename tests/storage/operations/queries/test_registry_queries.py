"""Queries of the registry."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from receiver.errors import NotFound
from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.operations import queries
from receiver.storage.registry.changes import RegistryChanges
from tests.storage.door import DESTINATION, SOURCE, TOKEN, Door, body, handler
from tests.storage.hand import arrive
from tests.storage.operations.queries.helpers import STRANGER, now, refuse


class TestRegistry:
    def test_no_row_tells_a_secret(self, door: Door, ask: Callable[..., Any]) -> None:
        """No list of the registry contains a digest, a sealed secret or a MAC."""
        door.registration.add_credential(
            DESTINATION, now(), "hmac", {"encoding": "hex"}, b"a signing secret of tests", label="redox"
        )
        door.enable()
        for listed in (queries.destinations, queries.credentials, queries.sources, queries.subscriptions):
            for row in ask(listed):
                assert not {"digest", "secret", "secret_key", "mac", "mac_key"} & row.keys()
                assert not any(isinstance(value, bytes) for value in row.values())

    def test_whether_a_credential_opens_anything(self, door: Door, ask: Callable[..., Any]) -> None:
        """A revoked or expired credential is not live; one that will expire is."""

        def add(label: str, suffix: str, expires_at: datetime | None = None) -> int:
            return door.registration.add_credential(
                DESTINATION, now(), "token", {}, (TOKEN + suffix).encode(), label=label, expires_at=expires_at
            )

        add("expired", "2", expires_at=now() - timedelta(seconds=1))
        add("expiring", "3", expires_at=now() + timedelta(days=1))
        door.registration.revoke_credential(add("revoked", "4"), now())
        found = ask(queries.credentials, destination=DESTINATION)
        assert {each["label"]: each["live"] for each in found} == {
            None: True,
            "expired": False,
            "expiring": True,
            "revoked": False,
        }

    def test_only_of_one_destination(self, door: Door, ask: Callable[..., Any]) -> None:
        """A destination lists its own rows; an unknown one is an error."""
        door.registration.add_destination(
            "other",
            now(),
            environment="development",
            require=["token"],
            sources_policy="any",
            on_unknown_source="reject",
            test_messages="accept",
            reply_with=None,
            token=TOKEN,
        )
        assert ask(queries.sources, destination="other") == []
        assert [each["source_id"] for each in ask(queries.sources, destination=DESTINATION)] == [SOURCE]
        assert {each["destination"] for each in ask(queries.credentials)} == {DESTINATION, "other"}
        with pytest.raises(NotFound, match="destination list"):
            ask(queries.credentials, destination="nowhere")

    def test_whether_a_worker_has_the_handler(self, door: Door, ask: Callable[..., Any]) -> None:
        """A handler is loaded if a live worker names it."""
        door.enable()
        door.enable(handler("other"))
        door.rows(
            "INSERT INTO workers (name, host, pid, handlers, seen_at) VALUES ('w', 'h', 1, '{register}', now()), "
            "('gone', 'h', 2, '{other}', now() - interval '1 hour')"
        )
        assert {each["handler"]: each["loaded"] for each in ask(queries.subscriptions)} == {
            "register": True,
            "other": False,
        }
        assert {each["name"]: each["alive"] for each in ask(queries.workers)} == {"w": True, "gone": False}


class TestRefusedSources:
    def test_unknown_sources_with_what_adds_them(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]
    ) -> None:
        """Each refused source is listed once, with the count and the arguments of `source add`."""
        refuse(door, ledger, body(source=STRANGER))
        refuse(door, ledger, body(source=STRANGER))
        refuse(door, ledger, body(Source=None))
        found = {each["source_id"]: each for each in ask(queries.refused_sources, limit=10)}
        assert found[STRANGER]["count"] == 2
        assert found[STRANGER]["add"] == f"clinic {STRANGER}"
        assert found[STRANGER]["reason"] == "source_unknown"
        assert found[None]["add"] == "clinic --none"

    def test_not_those_that_are_registered_by_now(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]
    ) -> None:
        """A refused source that was added since is not listed; a disabled one is."""
        refuse(door, ledger, body(source=STRANGER))
        refuse(door, ledger, body(Source=None))
        door.registration.add_source(DESTINATION, STRANGER, now(), name=None)
        door.registration.add_source(DESTINATION, None, now(), name=None)
        assert ask(queries.refused_sources, limit=10) == []
        door.registration.disable_source(DESTINATION, STRANGER, now())
        assert [each["source_id"] for each in ask(queries.refused_sources, limit=10)] == [STRANGER]

    @pytest.mark.parametrize(
        ("claimed", "add"), [("-n7", "clinic -- -n7"), ("x; rm -rf /", None), ("$(id)", None), ("a b", None)]
    )
    def test_nothing_to_paste_but_an_id(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any], claimed: str, add: str | None
    ) -> None:
        """A source in a message cannot become an option or a command when the operator pastes the line."""
        refuse(door, ledger, body(source=claimed))
        (found,) = ask(queries.refused_sources, limit=10)
        assert found["add"] == add
        assert (found["source_digest"] is None) == (add is not None)

    def test_those_kept_in_quarantine_too(
        self,
        open_ledger: Callable[..., MessageLedger],
        engine: Engine,
        keyring: Keyring,
        registration: RegistryChanges,
        ask: Callable[..., Any],
    ) -> None:
        """Unknown sources of quarantined messages are listed as well."""
        door = Door(engine, keyring, registration).build(on_unknown_source="quarantine")
        arrive(door, open_ledger(), body(source=STRANGER), body("2", source="x; reboot"))
        found = {each["source_id"]: each["add"] for each in ask(queries.refused_sources, limit=10)}
        assert found == {STRANGER: f"clinic {STRANGER}", "x; reboot": None}

    def test_since_and_destination(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """Only sources seen since then, at that destination, are listed."""
        refuse(door, ledger, body(source=STRANGER))
        lately = now() - timedelta(hours=1)
        assert len(ask(queries.refused_sources, destination=DESTINATION, since=lately, limit=9)) == 1
        assert ask(queries.refused_sources, since=now() + timedelta(hours=1), limit=9) == []
        with pytest.raises(NotFound):
            ask(queries.refused_sources, destination="nowhere", limit=9)
