"""Patients' identifiers are found in Data Model and FHIR messages, with any other content."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import Unreadable
from receiver.protocol.patients import MAX_IDENTIFIERS, MAX_LENGTH, PatientIdentifier, identifiers
from receiver.protocol.reading import read
from receiver.samples.people import person
from receiver.samples.sample import encode, kinds, sample

SOURCE = "11111111-1111-4111-8111-111111111111"
META = {"DataModel": "PatientAdmin", "EventType": "Arrival"}


def found(**members: Any) -> list[tuple[str, str]]:
    return [each[1:] for each in identifiers(json.dumps({"Meta": META, **members}).encode())]


def bundle(*resources: Any) -> list[tuple[str, str]]:
    return [each[1:] for each in whole(*resources)]


def whole(*resources: Any) -> list[PatientIdentifier]:
    entries = [{"resource": {"resourceType": "MessageHeader"}}, *({"resource": each} for each in resources)]
    return list(identifiers(json.dumps({"resourceType": "Bundle", "type": "message", "entry": entries}).encode()))


def test_a_data_model_patient_is_found_by_type_and_id() -> None:
    """Each pair is returned once, in the order of the body."""
    assert found(
        Patient={
            "Identifiers": [
                {"ID": "0000000001", "IDType": "MR"},
                {"ID": "e1", "IDType": "EPI"},
                {"ID": "0000000001", "IDType": "MR"},
                {"ID": "0000000001", "IDType": "EPI"},
            ]
        }
    ) == [("MR", "0000000001"), ("EPI", "e1"), ("EPI", "0000000001")]


def test_models_with_several_patients() -> None:
    """Answers to searches and flow sheets of a ward have several patients."""
    assert found(
        Patient={"Identifiers": [{"ID": "1", "IDType": "MR"}]},
        Patients=[{"Identifiers": [{"ID": "2", "IDType": "MR"}]}, {"Identifiers": [{"ID": "3", "IDType": "MR"}]}],
    ) == [("MR", "1"), ("MR", "2"), ("MR", "3")]


def test_a_fhir_patient_is_found_by_the_code_of_its_type_or_its_system() -> None:
    """Every Patient of the bundle, and no other resource."""
    assert bundle(
        {
            "resourceType": "Patient",
            "identifier": [
                {"type": {"coding": [{"code": "MR"}, {"code": "other"}]}, "system": "urn:s", "value": "1"},
                {"type": {"text": "no code"}, "system": "urn:s", "value": "2"},
                {"type": {"coding": [{}]}, "value": "3"},
                {"type": {"coding": []}, "system": "urn:t", "value": "4"},
            ],
        },
        {"resourceType": "Encounter", "identifier": [{"system": "urn:s", "value": "5"}]},
        {"resourceType": "Patient", "identifier": [{"system": "urn:s", "value": "6"}]},
    ) == [("MR", "1"), ("urn:s", "2"), ("", "3"), ("urn:t", "4"), ("urn:s", "6")]


def test_the_authority_is_the_system_of_a_fhir_identifier() -> None:
    """Where a message does not say who gave the number, its source did: that is the caller's to add."""
    assert whole(
        {
            "resourceType": "Patient",
            "identifier": [
                {"type": {"coding": [{"code": "MR"}]}, "system": "urn:s", "value": "1"},
                {"type": {"coding": [{"code": "MR"}]}, "system": "urn:t", "value": "1"},
                {"type": {"coding": [{"code": "MR"}]}, "system": "", "value": "1"},
                {"type": {"coding": [{"code": "MR"}]}, "system": 5, "value": "2"},
            ],
        }
    ) == [("urn:s", "MR", "1"), ("urn:t", "MR", "1"), (None, "MR", "1"), (None, "MR", "2")]


@pytest.mark.parametrize(
    ("identifier", "pairs"),
    [
        ({"ID": 7, "IDType": "MR"}, [("MR", "7")]),
        ({"ID": 10**29, "IDType": "MR"}, [("MR", "1" + "0" * 29)]),
        ({"ID": "7"}, [("", "7")]),
        ({"ID": "7", "IDType": None}, [("", "7")]),
        ({"ID": "7", "IDType": 5}, [("", "7")]),
        ({"ID": "", "IDType": "MR"}, []),
        ({"ID": None, "IDType": "MR"}, []),
        ({"IDType": "MR"}, []),
        ({"ID": True, "IDType": "MR"}, []),
        ({"ID": 1.5, "IDType": "MR"}, []),
        ({"ID": ["7"], "IDType": "MR"}, []),
        ("7", []),
        (None, []),
        ([], []),
    ],
)
def test_an_identifier_is_text_or_a_whole_number(identifier: Any, pairs: list[tuple[str, str]]) -> None:
    """Numbers of any size are exact; other values are skipped; a missing type is empty."""
    assert found(Patient={"Identifiers": [identifier]}) == pairs


@pytest.mark.parametrize(
    "patient",
    [
        None,
        5,
        "x",
        [],
        [{"Identifiers": [{"ID": "1"}]}],
        {},
        {"Identifiers": None},
        {"Identifiers": {"ID": "1"}},
        {"Identifiers": "x"},
    ],
)
def test_a_patient_of_another_shape_has_none(patient: Any) -> None:
    """Real feeds break the schema, which is not an error."""
    assert found(Patient=patient) == found(Patients=patient if not isinstance(patient, list) else 5) == []


@pytest.mark.parametrize(
    "entry",
    [
        None,
        5,
        {},
        [None],
        [[]],
        [{"resource": None}],
        [{"resource": "Patient"}],
        [{"resource": {"resourceType": "Patient"}}],
        [{"resource": {"resourceType": "Patient", "identifier": {"value": "1"}}}],
        [{"resource": {"resourceType": "Patient", "identifier": [5, {"type": 5}]}}],
    ],
)
def test_a_bundle_of_another_shape_has_none(entry: Any) -> None:
    """Neither are bundles of another shape."""
    assert found(entry=entry) == []


@pytest.mark.parametrize("number", [b"1e400", b"1" * 5_000, b"-1e999999"])
def test_a_number_that_python_cannot_represent(number: bytes) -> None:
    """It hides only its own identifier, not the patient or its other identifiers."""
    content = (
        b'{"Meta":{"DataModel":"A","EventType":"B"},"Patient":{"X":[%b],"Identifiers":[{"ID":%b},'
        b'{"ID":"1","IDType":"MR","X":%b},{"ID":"3","IDType":%b}]},"Patients":[%b,{"Identifiers":'
        b'[{"ID":"2","IDType":"MR"}]}],"Y":%b}'
    ).replace(b"%b", number)
    assert read(content).kind == "A.B"
    assert [each[1:] for each in identifiers(content)] == [("MR", "1"), ("", "3"), ("MR", "2")]
    content = (
        b'{"resourceType":"Bundle","type":"message","entry":[{"resource":{"resourceType":"MessageHeader",'
        b'"eventUri":"a/B","x":%b}},{"x":%b,"resource":{"resourceType":"Patient","x":%b,"identifier":[{"value":'
        b'%b},{"x":%b,"type":{"x":%b,"coding":[{"code":"MR","x":%b}]},"value":"1"}]}}]}'
    ).replace(b"%b", number)
    assert read(content).kind == "FHIR.B"
    assert list(identifiers(content)) == [(None, "MR", "1")]


def filled(content: bytes, filler: bytes) -> bytes:
    """Return about half a megabyte: `content` with its `~` replaced by fillers, separated by commas."""
    return content.replace(b"~", filler + (b"," + filler) * (500_000 // (len(filler) + 1)))


@pytest.mark.parametrize(
    "filler",
    [
        b"{}",
        b"[]",
        b"0",
        b'""',
        b'{"resource":{"resourceType":"Patient"}}',
        b'{"a":[{"b":[[],{}]},1e999,"\\"]"]}',
        b"[" * 60 + b"]" * 60,
    ],
)
@pytest.mark.parametrize(
    "content",
    [
        b'{"Patient":{"Identifiers":[~,{"ID":"1","IDType":"MR"},~]}}',
        b'{"Patients":[~,{"Identifiers":[{"ID":"1","IDType":"MR"}]},~]}',
        b'{"Patient":{"x":[~],"Identifiers":[{"ID":"1","x":[~],"IDType":"MR"}]}}',
        (
            b'{"entry":[~ , {"resource":{"resourceType":"Patient","identifier":[{"type":{"coding":[{"code":"MR"},~]},'
            b'"value":"1"}]}}\n,~]}'
        ),
        b'{"entry":[{"resource":{"resourceType":"Patient","identifier":[~,{"system":"MR","value":"1"}]}}]}',
        (
            b'{"entry":[{"x":[~]},{"resource":{"x":[~],"identifier":[{"system":"MR","value":"1"}],'
            b'"resourceType":"Patient"}}]}'
        ),
    ],
    ids=["Identifiers", "Patients", "an identifier", "entry", "identifier", "a resource"],
)
def test_large_lists_take_little_memory(content: bytes, filler: bytes) -> None:
    """A list of millions is read one element at a time, and its identifiers are found."""
    body = filled(content, filler)
    tracemalloc.start()
    found = [each[1:] for each in identifiers(body)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("MR", "1")]
    assert peak < 12_000_000


def test_a_value_that_is_too_long() -> None:
    """It is skipped: a thousand values of a megabyte would otherwise be kept in memory."""
    assert found(Patient={"Identifiers": [{"ID": "x" * MAX_LENGTH, "IDType": "MR"}, {"ID": "1", "IDType": "MR"}]}) == [
        ("MR", "1")
    ]


def test_the_number_is_limited() -> None:
    """The first MAX_IDENTIFIERS count."""
    many = found(Patient={"Identifiers": [{"ID": str(n), "IDType": "MR"} for n in range(3 * MAX_IDENTIFIERS)]})
    assert many == [("MR", str(n)) for n in range(MAX_IDENTIFIERS)]


@pytest.mark.parametrize("kind", ["PatientAdmin.Arrival", "Results.New", "FHIR.PatientAdminCreated"])
def test_the_patient_of_a_sample_is_found(kind: str) -> None:
    """In the sample of each kind."""
    content = encode(sample(kind, source_id=SOURCE, patient=person(7)))
    assert person(7).mrn in [each.value for each in identifiers(content)]


@pytest.mark.parametrize("kind", kinds())
def test_every_sample_is_searched(kind: str) -> None:
    """Identifiers are digested, so none is empty or padded."""
    found = list(identifiers(encode(sample(kind, source_id=SOURCE))))
    assert [each for each in found if each.value.strip() != each.value or not each.value] == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "Identifiers",
                    "ID",
                    "IDType",
                    "identifier",
                    "resource",
                    "resourceType",
                    "type",
                    "coding",
                    "code",
                    "system",
                    "value",
                    "x",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(JSON, JSON, JSON)
def test_any_accepted_message_is_searched(patient: Any, patients: Any, entry: Any) -> None:
    """The search raises no error for an accepted message: the worker would fail on it forever."""
    content = json.dumps({"Meta": META, "Patient": patient, "Patients": patients, "entry": entry}).encode()
    read(content)
    assert len(list(identifiers(content))) <= MAX_IDENTIFIERS


@given(st.binary(max_size=60))
def test_any_accepted_bytes_are_searched(rest: bytes) -> None:
    """Escapes, lone surrogates, invalid UTF-8 in the patient: refused by the parser, or searched without an error."""
    content = b'{"Meta":{"DataModel":"A","EventType":"B"},"Patient":{"Identifiers":[{"ID":"' + rest + b'"}]}}'
    try:
        read(content)
    except Unreadable:
        return
    for each in identifiers(content):
        "\0".join(each[1:]).encode()
