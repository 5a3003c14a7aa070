"""The patients' identifiers: found in both kinds of message, whatever else stands in it."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import Unreadable
from receiver.protocol.patients import MAX_IDENTIFIERS, MAX_LENGTH, identifiers
from receiver.protocol.reading import read
from receiver.samples.people import person
from receiver.samples.sample import encode, kinds, sample

SOURCE = "11111111-1111-4111-8111-111111111111"
META = {"DataModel": "PatientAdmin", "EventType": "Arrival"}


def found(**members: Any) -> list[tuple[str, str]]:
    return list(identifiers(json.dumps({"Meta": META, **members}).encode()))


def bundle(*resources: Any) -> list[tuple[str, str]]:
    entries = [{"resource": {"resourceType": "MessageHeader"}}, *({"resource": each} for each in resources)]
    return list(identifiers(json.dumps({"resourceType": "Bundle", "type": "message", "entry": entries}).encode()))


def test_a_data_model_patient_is_found_by_type_and_id() -> None:
    """In the order of the body, each pair once."""
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


def test_models_with_several_patients_are_found_whole() -> None:
    """As answers to searches and flow sheets of a ward have them."""
    assert found(
        Patient={"Identifiers": [{"ID": "1", "IDType": "MR"}]},
        Patients=[{"Identifiers": [{"ID": "2", "IDType": "MR"}]}, {"Identifiers": [{"ID": "3", "IDType": "MR"}]}],
    ) == [("MR", "1"), ("MR", "2"), ("MR", "3")]


def test_a_fhir_patient_is_found_by_the_code_of_its_type_or_its_system() -> None:
    """Every Patient of the bundle; of other resources none."""
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
    """Exact, however large; what is neither is none, and a missing type is an empty one."""
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
    """Real feeds break the schema; nothing of that is an error here."""
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
    """Nor is that."""
    assert found(entry=entry) == []


@pytest.mark.parametrize("number", [b"1e400", b"1" * 5_000, b"-1e999999"])
def test_a_number_that_python_cannot_hold_hides_nothing_else(number: bytes) -> None:
    """Not the patient it stands in, nor its other identifiers: only the identifier that it is."""
    content = (
        b'{"Meta":{"DataModel":"A","EventType":"B"},"Patient":{"X":[%b],"Identifiers":[{"ID":%b},'
        b'{"ID":"1","IDType":"MR","X":%b},{"ID":"3","IDType":%b}]},"Patients":[%b,{"Identifiers":'
        b'[{"ID":"2","IDType":"MR"}]}],"Y":%b}'
    ).replace(b"%b", number)
    assert read(content).kind == "A.B"
    assert list(identifiers(content)) == [("MR", "1"), ("", "3"), ("MR", "2")]
    content = (
        b'{"resourceType":"Bundle","type":"message","entry":[{"resource":{"resourceType":"MessageHeader",'
        b'"eventUri":"a/B","x":%b}},{"x":%b,"resource":{"resourceType":"Patient","x":%b,"identifier":[{"value":'
        b'%b},{"x":%b,"type":{"x":%b,"coding":[{"code":"MR","x":%b}]},"value":"1"}]}}]}'
    ).replace(b"%b", number)
    assert read(content).kind == "FHIR.B"
    assert list(identifiers(content)) == [("MR", "1")]


def filled(content: bytes, filler: bytes) -> bytes:
    """About half a megabyte: `content` with its `~` replaced by as many fillers, separated by commas."""
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
def test_large_lists_take_no_memory_and_hide_nothing(content: bytes, filler: bytes) -> None:
    """A list of millions is walked one element at a time: the worker that looks through it would be killed for it."""
    body = filled(content, filler)
    tracemalloc.start()
    found = list(identifiers(body))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("MR", "1")]
    assert peak < 12_000_000


def test_what_is_too_long_is_not_an_identifier() -> None:
    """A thousand values of a megabyte would otherwise be kept until the last is found."""
    assert found(Patient={"Identifiers": [{"ID": "x" * MAX_LENGTH, "IDType": "MR"}, {"ID": "1", "IDType": "MR"}]}) == [
        ("MR", "1")
    ]


def test_made_up_thousands_are_bounded() -> None:
    """More than any message names; the first ones count."""
    many = found(Patient={"Identifiers": [{"ID": str(n), "IDType": "MR"} for n in range(3 * MAX_IDENTIFIERS)]})
    assert many == [("MR", str(n)) for n in range(MAX_IDENTIFIERS)]


@pytest.mark.parametrize("kind", ["PatientAdmin.Arrival", "Results.New", "FHIR.PatientAdminCreated"])
def test_the_patient_of_a_sample_is_found(kind: str) -> None:
    """As Redox sends it, in either form."""
    content = encode(sample(kind, source_id=SOURCE, patient=person(7)))
    assert person(7).mrn in [value for _, value in identifiers(content)]


@pytest.mark.parametrize("kind", kinds())
def test_every_sample_is_looked_through(kind: str) -> None:
    """No identifier is empty, and none is padded: they go into a digest."""
    found = list(identifiers(encode(sample(kind, source_id=SOURCE))))
    assert [value for _, value in found if value.strip() != value or not value] == []


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
def test_whatever_is_read_is_looked_through(patient: Any, patients: Any, entry: Any) -> None:
    """What was accepted must not fail afterwards: it would hold up a worker for ever."""
    content = json.dumps({"Meta": META, "Patient": patient, "Patients": patients, "entry": entry}).encode()
    read(content)
    assert len(list(identifiers(content))) <= MAX_IDENTIFIERS


@given(st.binary(max_size=60))
def test_bytes_that_are_read_are_looked_through(rest: bytes) -> None:
    """Escapes, lone surrogates, bad UTF-8 in the patient: refused when it is read, or fine here."""
    content = b'{"Meta":{"DataModel":"A","EventType":"B"},"Patient":{"Identifiers":[{"ID":"' + rest + b'"}]}}'
    try:
        read(content)
    except Unreadable:
        return
    for pair in identifiers(content):
        "\0".join(pair).encode()
