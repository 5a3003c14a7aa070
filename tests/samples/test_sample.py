"""Samples of every kind: valid, plausible and reproducible."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from importlib import import_module
from typing import Any
from uuid import UUID

import pytest

from receiver.protocol.reading import read
from receiver.samples.kinds import WIRE_NAMES
from receiver.samples.people import person
from receiver.samples.sample import encode, kinds, sample
from receiver.samples.scenario import make_scenario
from tests.simulator import SOURCE

Bodies = dict[str, dict[str, Any]]

# The `redox` package has no class for these.
WITHOUT_CLASS = {
    "Claim.Payment",
    "Claim.Submission",
    "Enrichment.NaturalLanguageProcessingQuery",
    "Enrichment.NaturalLanguageProcessingQueryResponse",
}


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, (*path, name))
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value, path)
    else:
        yield path, node


def data_models(bodies: Bodies) -> Bodies:
    return {kind: body for kind, body in bodies.items() if kind in WIRE_NAMES}


def test_every_event_type_is_valid_by_redoxs_schema(bodies: Bodies) -> None:
    """107 kinds validate against the typed classes, which reject unknown fields, without coercion."""
    for kind in WIRE_NAMES.keys() - WITHOUT_CLASS:
        model, _, event = kind.partition(".")
        cls = getattr(import_module(f"redox.{model.lower()}"), event.replace("Sign-on", "SignOn"))
        # The numeric ids are older than the published schema; Redox still sends them.
        meta = {name: value for name, value in bodies[kind]["Meta"].items() if name not in ("Message", "Transmission")}
        cls.model_validate({**bodies[kind], "Meta": meta}, strict=True)


def test_only_the_known_kinds_lack_a_class(bodies: Bodies) -> None:
    """The `redox` package has no class for four event types. A release that adds one fails this test."""
    for kind in WITHOUT_CLASS:
        model, _, event = kind.partition(".")
        assert not hasattr(import_module(f"redox.{model.lower()}"), event)
        assert len(bodies[kind]) > 1


def test_every_body_is_read_as_its_kind(bodies: Bodies) -> None:
    """The receiver parses each body with its kind, source and ids."""
    for kind in kinds():
        message = read(encode(bodies[kind]))
        assert (message.kind, message.source_id) == (kind, SOURCE)
        if kind in WIRE_NAMES:
            assert message.test
            assert message.message_id
            assert message.event_time == make_scenario(kind, seed=5).at
            assert (message.log_id is None) == (kind == "SSO.Sign-on")


def test_meta() -> None:
    """Source, test flag, ids and time are the caller's."""
    at = datetime(2026, 2, 3, 4, 5, tzinfo=UTC)
    body = sample("PatientAdmin.Arrival", source_id=SOURCE, test=False, at=at, log_id="log-1", attempt_id="attempt-1")
    meta = body["Meta"]
    assert meta["Source"]["ID"] == SOURCE
    assert meta["Test"] is False
    assert meta["Logs"] == [{"ID": "log-1", "AttemptID": "attempt-1"}]
    assert meta["EventDateTime"] == "2026-02-03T04:05:00.000Z"


def test_ids_are_uuids_and_differ_by_kind_and_seed() -> None:
    """Ids are UUIDs and differ by kind and seed, so two messages are never duplicates."""
    logs = [
        sample(kind, seed=seed, source_id=SOURCE)["Meta"]["Logs"][0]
        for kind in ("Device.New", "Flowsheet.New")
        for seed in range(50)
    ]
    ids = {str(UUID(log[name])) for log in logs for name in ("ID", "AttemptID")}
    assert len(ids) == 200


def test_a_seed_always_gives_the_same_bytes(bodies: Bodies) -> None:
    """A seed gives the same bytes in every process, independent of clock, hash seed and global random state."""
    before = random.getstate()
    again = {kind: encode(sample(kind, seed=5, source_id=SOURCE)) for kind in kinds()}
    assert random.getstate() == before
    assert again == {kind: encode(body) for kind, body in bodies.items()}
    code = (
        "from receiver.samples.sample import encode, sample; import sys; "
        f"sys.stdout.buffer.write(encode(sample('Device.New', seed=5, source_id='{SOURCE}')))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert made.stdout == again["Device.New"]


def test_only_the_package_asked_for_is_imported() -> None:
    """A sample imports only the package of its Data Model, because importing all takes seconds."""
    code = (
        "import sys; from receiver.samples.sample import sample; "
        "assert not any(name.startswith('redox') for name in sys.modules); sample('Device.New', source_id='x'); "
        "print(sorted(name for name in sys.modules if name.startswith('redox.') and name.count('.') == 1))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert made.stdout.strip() == "['redox.abstract_base', 'redox.device']"


def test_bodies_are_small(bodies: Bodies) -> None:
    """Bodies have a few kilobytes; a clinical summary somewhat more."""
    for kind, body in bodies.items():
        assert len(encode(body)) < (12_000 if kind.startswith("ClinicalSummary") else 8_000), kind


def test_the_patient_is_the_one_passed_in() -> None:
    """A given patient is in the message, with three identifiers, and no other person in its place."""
    who = person(77, family="Zzcanary")
    body = sample("PatientAdmin.Arrival", source_id=SOURCE, patient=who)
    assert body["Patient"]["Identifiers"] == [
        {"ID": who.mrn, "IDType": "MR"},
        {"ID": who.ehr_id, "IDType": "EHRID"},
        {"ID": who.nist_id, "IDType": "NIST"},
    ]
    demographics = body["Patient"]["Demographics"]
    assert (demographics["FirstName"], demographics["LastName"]) == (who.given, "Zzcanary")
    assert (demographics["DOB"], demographics["Sex"]) == (who.born.isoformat(), who.sex)
    assert person(0).mrn not in encode(body).decode()


def test_values_are_consistent(bodies: Bodies) -> None:
    """Names, towns and dates are those of the scenario's people, and no value is gibberish."""
    of = make_scenario("", seed=5)
    people = (of.patient, of.relative, *of.staff)
    expected = {
        "FirstName": {p.given for p in people},
        "MiddleName": {p.middle for p in people},
        "LastName": {p.family for p in people},
        "SSN": {p.ssn for p in people},
        "NPI": {p.npi for p in people},
        "DOB": {p.born.isoformat() for p in people},
        "Sex": {"Female", "Male"},
        "City": {*(p.city for p in people), "Rivermark"},
        "Country": {"US"},
    }
    seen = dict.fromkeys(expected, 0)
    for kind, body in data_models(bodies).items():
        for path, value in leaves(body):
            if path[-1] in expected:
                seen[path[-1]] += 1
                assert value in expected[path[-1]], (kind, path)
    assert all(seen.values())
    providers = [
        (node["FirstName"], node["LastName"], node["ID"])
        for body in data_models(bodies).values()
        for node in _dicts(body)
        if {"FirstName", "LastName", "ID"} <= node.keys()
    ]
    assert set(providers) <= {(p.given, p.family, p.npi) for p in of.staff}


def test_texts_are_plausible(bodies: Bodies) -> None:
    """Times are ISO 8601 in UTC, dates are dates, and no field has a placeholder."""
    for kind, body in data_models(bodies).items():
        for path, value in leaves(body):
            assert value not in ("Unspecified", "", None), (kind, path)
            if path[-1].endswith("DateTime"):
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.000Z", value), (kind, path)
                assert datetime.fromisoformat(value).tzinfo is not None
            elif path[-1].endswith("Date"):
                assert date.fromisoformat(value).isoformat() == value
            elif path[-1] in ("City", "Name", "Description", "Department"):
                assert re.search(r"[A-Za-z]{2}", value), (kind, path, value)


def test_codes_and_names_belong_together(bodies: Bodies) -> None:
    """A diagnosis' code and name are of one entry of the code system."""
    diagnosis = bodies["PatientAdmin.Arrival"]["Patient"]["Diagnoses"][0]
    assert (diagnosis["Code"], diagnosis["Codeset"]) == ("N39.0", "ICD-10")
    assert diagnosis["Name"] == "Urinary tract infection, site not specified"
    result = bodies["Results.New"]["Orders"][0]["Results"][0]
    assert (result["Code"], result["Value"], result["Units"]) == ("2345-7", "98", "mg/dL")


def test_encoding_is_compact_utf8_with_meta_first(bodies: Bodies) -> None:
    """A body is one line of UTF-8 with Meta first."""
    body = sample("PatientAdmin.Arrival", source_id=SOURCE, patient=person(0, family="Ünlü"))
    wire = encode(body)
    assert wire.startswith(b'{"Meta":{"DataModel":"PatientAdmin","EventType":"Arrival"')
    assert "Ünlü".encode() in wire
    assert json.loads(wire) == body


def test_an_unknown_kind_is_refused() -> None:
    """A kind that Redox does not have is an error."""
    for kind in ("PatientAdmin.Nonsense", "Nonsense", "FHIR.Nonsense"):
        with pytest.raises(KeyError):
            sample(kind, source_id=SOURCE)


def _dicts(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _dicts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _dicts(value)
