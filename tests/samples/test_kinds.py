"""The kinds that Redox documents."""

from __future__ import annotations

from receiver.protocol.message import QUERIES
from receiver.samples.kinds import DATA_MODELS, FHIR_CODED_EVENTS, FHIR_EVENTS, KINDS, WIRE_NAMES


def test_there_are_as_many_as_redox_says() -> None:
    """Redox documents 24 Data Models with 111 event types, and 32 FHIR notifications."""
    assert len(DATA_MODELS) == 24
    assert len(set(KINDS)) == len(KINDS) == len(WIRE_NAMES) == 111
    assert len(FHIR_EVENTS) == 32
    assert not FHIR_EVENTS.keys() & FHIR_CODED_EVENTS.keys()


def test_names_are_those_of_handlers_with_spaces_removed() -> None:
    """Handlers subscribe to ClinicalSummary.PatientPush; on the wire it is "Clinical Summary"."""
    assert WIRE_NAMES["ClinicalSummary.PatientPush"] == ("Clinical Summary", "PatientPush")
    assert WIRE_NAMES["SSO.Sign-on"] == ("SSO", "Sign-on")
    assert not any(" " in name for name in WIRE_NAMES)


def test_every_query_and_its_response_is_among_them() -> None:
    """Each query of the receiver, and its response, is a kind of Redox."""
    assert QUERIES.keys() <= WIRE_NAMES.keys()
    responses = {f"{query.partition('.')[0]}.{response}" for query, response in QUERIES.items()}
    assert responses <= WIRE_NAMES.keys()
