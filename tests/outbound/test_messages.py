"""Preparing a message: what is filled in, what is refused, and what is not changed."""

from __future__ import annotations

import copy
import json
import sys
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import redox

from receiver.outbound import NetworkOnramp, Unsendable
from receiver.outbound.messages import Prepared, prepare
from tests.outbound.conftest import message, query

ONRAMP = NetworkOnramp(
    organization="2.16.840.1.113883.3.6147.458.1", user="user-7", role="112247003", role_name="Medical doctor"
)


def prepared(
    what: Any,
    *,
    asks: bool = False,
    source: str | None = None,
    required: bool = False,
    onramp: NetworkOnramp | None = None,
) -> Prepared:
    return prepare(what, query=asks, source=source, source_required=required, onramp=onramp)


def test_a_dict_becomes_compact_utf8() -> None:
    """A dict is sent as compact JSON in UTF-8, with all digits of large integers."""
    whole = {**message(), "Number": 2**80}

    assert json.loads(prepared(whole).body) == whole
    assert "Größe".encode() in prepared(whole).body


def test_the_source_is_filled_in_where_none_is_named() -> None:
    """Meta.Source.ID is added to the other members of Meta.Source. A source in the message is kept."""
    assert json.loads(prepared(message(), source="mine").body)["Meta"]["Source"] == {"ID": "mine"}
    extra = prepared(message(Source={"Name": "Our EHR"}), source="mine")
    assert json.loads(extra.body)["Meta"]["Source"] == {"Name": "Our EHR", "ID": "mine"}
    named = prepared(message(Source={"ID": "another"}), source="mine", required=True)
    assert json.loads(named.body)["Meta"]["Source"] == {"ID": "another"}
    assert "Source" not in json.loads(prepared(message()).body)["Meta"]


def test_the_callers_message_is_not_changed() -> None:
    """The source is filled into a copy."""
    whole = message(Extensions={"mine": {"string": "kept"}})
    before = copy.deepcopy(whole)
    prepared(whole, source="mine", onramp=ONRAMP)

    assert whole == before


def test_bytes_stay_as_they_are() -> None:
    """Bytes are sent unchanged, and their source is sent in the header."""
    body = json.dumps(message(), indent=3).encode()

    known = partial(Prepared, kind="PatientAdmin.Arrival", destinations=("destination-1",))

    assert prepared(body, source="mine") == known(body=body, headers={"Redox-Source-Id": "mine"})
    assert prepared(body) == known(body=body)
    named = json.dumps(message(Source={"ID": "another"})).encode()
    assert prepared(named, source="mine", required=True) == known(body=named)


@pytest.mark.parametrize(
    ("model", "event", "kind"),
    [
        ("Clinical Summary", "PatientQuery", "ClinicalSummary.PatientQuery"),
        ("SSO", "Sign-on", "SSO.Sign-on"),
        ("PatientAdmin", "Ada Byron 1815", "unknown"),
        ("x" * 100, "New", "unknown"),
    ],
)
def test_the_kind_may_be_shown(model: str, event: str, kind: str) -> None:
    """A kind is made of the words of Redox's names. Any other text is not shown."""
    assert prepared(message(event, model)).kind == kind


def test_models_of_the_redox_package_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typed model and a composable model become the message that they stand for, without nulls."""
    # As it is, the package of the composable ones imports every model of every kind, for half a minute.
    bare = ModuleType("redox.generic")
    bare.__path__ = [f"{redox.__path__[0]}/generic"]
    monkeypatch.setitem(sys.modules, bare.__name__, bare)
    whole = message("Arrival")
    whole["Patient"] = {"Identifiers": [{"ID": "1", "IDType": "MR"}], "Demographics": {"FirstName": "Test"}}
    whole["Visit"] = {"VisitNumber": "17"}

    for module in ("redox.patientadmin.arrival", "redox.generic.PatientAdmin"):
        model = import_module(module).Arrival.model_validate(whole)
        body = json.loads(prepared(model, source="mine").body)
        assert body == {**whole, "Meta": {**whole["Meta"], "Source": {"ID": "mine"}}}


@pytest.mark.parametrize(
    ("whole", "says"),
    [
        ({}, "no Meta"),
        ({"Meta": []}, "no Meta"),
        (b"[]", "not a valid JSON object"),
        (b"{", "not a valid JSON object"),
        (b"", "not a valid JSON object"),
        (b'{"Meta": {"DataModel": "\xff"}}', "not a valid JSON object"),
        ({"Meta": {"EventType": "Arrival"}}, "Meta.DataModel"),
        ({"Meta": {"DataModel": "PatientAdmin"}}, "Meta.EventType"),
        (message(""), "Meta.EventType"),
        (message(DataModel=7), "Meta.DataModel"),
        (message(Destinations=[]), "no destination"),
        (message(Destinations=None), "no destination"),
        (message(Destinations="d"), "no destination"),
        (message(Destinations=[{}]), "no ID"),
        (message(Destinations=[{"ID": ""}]), "no ID"),
        (message(Destinations=["d"]), "no ID"),
        (query(Destinations=[{"ID": "a"}, {"ID": "b"}]), "exactly one"),
        (message("PatientQuery", "Clinical Summary", Destinations=[{"ID": "a"}, {"ID": "b"}]), "exactly one"),
        ({**message(), "When": datetime(2026, 1, 1, tzinfo=UTC)}, "TypeError"),
        ({**message(), "X": float("nan")}, "ValueError"),
        ({**message(), "X": "\ud800"}, "UnicodeEncodeError"),
        ("text", "a str cannot be sent"),
        (None, "a NoneType cannot"),
    ],
    ids=str,
)
def test_invalid_messages(whole: Any, says: str) -> None:
    """A message that Redox could not route or read is refused before it is sent. The error quotes none of it."""
    with pytest.raises(Unsendable, match=says) as caught:
        prepared(whole)

    assert "Canary" not in str(caught.value)
    assert not caught.value.retryable


def test_a_notification_may_go_to_many() -> None:
    """Only a query must have exactly one destination, and so must anything that is passed to `query`."""
    many = message(Destinations=[{"ID": "a"}, {"ID": "b"}])

    assert json.loads(prepared(many).body) == many
    with pytest.raises(Unsendable, match="exactly one"):
        prepared(many, asks=True)


def test_endless_nesting() -> None:
    """A message that is nested too deeply, or contains itself, is refused."""
    with pytest.raises(Unsendable, match="not a valid JSON object"):
        prepared(b'{"Meta":' * 200_000)
    whole = message()
    whole["Again"] = whole
    with pytest.raises(Unsendable, match="ValueError"):
        prepared(whole)


@pytest.mark.parametrize(
    "whole",
    [message(), message(Source={}), message(Source={"ID": ""}), message(Source="x"), json.dumps(message()).encode()],
    ids=str,
)
def test_several_keys_require_a_source(whole: Any) -> None:
    """Where several API keys exist, a message without a source is refused."""
    with pytest.raises(Unsendable, match="has no source"):
        prepared(whole, required=True)


def test_the_onramp_fills_the_extensions() -> None:
    """The four extensions are added to the extensions of the message."""
    whole = message(Extensions={"mine": {"string": "kept"}})
    extensions = json.loads(prepared(whole, onramp=ONRAMP).body)["Meta"]["Extensions"]

    at = "https://api.redoxengine.com/extensions/"
    assert extensions == {
        "mine": {"string": "kept"},
        "sender-organization-id": {"url": at + "sender-organization-id", "string": "2.16.840.1.113883.3.6147.458.1"},
        "user-id": {"url": at + "user-id", "string": "user-7"},
        "user-role": {"url": at + "user-role", "coding": {"code": "112247003", "display": "Medical doctor"}},
        "purpose-of-use": {"url": at + "purpose-of-use", "coding": {"code": "TREATMENT"}},
    }


def test_the_onramp_can_not_be_put_into_bytes() -> None:
    """Bytes are never changed, so extensions for them are refused."""
    with pytest.raises(Unsendable, match="cannot be added to bytes"):
        prepared(json.dumps(message()).encode(), onramp=ONRAMP)


def test_nothing_of_a_message_is_in_a_repr() -> None:
    """The repr of a prepared message has no content."""
    assert "Canary" not in repr(prepared(message()))
    assert "user-7" not in repr(ONRAMP)
