"""The message that a plugin gets: exact numbers, and typed classes for the kinds that have one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from receiver.errors import NotFound
from receiver.handlers import Message
from receiver.samples.kinds import WIRE_NAMES
from receiver.samples.sample import sample


def message(raw: bytes, kind: str = "PatientAdmin.Arrival") -> Message:
    """Return a message of this kind."""
    return Message(
        uuid="u",
        kind=kind,
        source_id=None,
        log_id=None,
        message_id=None,
        transmission_id=None,
        facility=None,
        event_time=None,
        received_at=datetime.now(UTC),
        test=False,
        raw=raw,
    )


def test_data_is_parsed_once() -> None:
    """`data` is the parsed body, and always the same object."""
    one = message(b'{"Meta": {"Test": true}, "N": [1, 2.5, null, "\\u00e9"]}')

    assert one.data == {"Meta": {"Test": True}, "N": [1, 2.5, None, "é"]}
    assert one.data is one.data


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("123456789012345678901234567890", 123456789012345678901234567890),
        ("-" + "9" * 40, -int("9" * 40)),
        ("1e400", Decimal("1e400")),
        ("-1e400", Decimal("-1e400")),
        ("9" * 5000, Decimal("9" * 5000)),
        ("0.1", 0.1),
    ],
)
def test_numbers_are_exact(number: str, expected: Any) -> None:
    """An integer of any length is exact, and a number that no float can hold is a Decimal; other values are
    unchanged.
    """
    data = message(b'{"N": %s, "M": 12, "F": 1.5}' % number.encode()).data

    assert data == {"N": expected, "M": 12, "F": 1.5}
    assert type(data["N"]) is type(expected)


def test_nothing_of_the_body_in_a_repr() -> None:
    """The repr of a message contains nothing of its body."""
    assert "Quibblewitz" not in repr(message(b'{"Name": "Quibblewitz"}'))


@pytest.mark.parametrize("kind", ["PatientAdmin.Arrival", "SSO.Sign-on", "ClinicalSummary.PatientPush"])
def test_model(kind: str) -> None:
    """`model()` returns an instance of the `redox` package's class for the kind, without unknown fields."""
    body = sample(kind, source_id="7ce6f387-c33c-417d-8682-81e83628cbd9") | {"SomethingNew": {"A": 1}}
    made = message(json.dumps(body).encode(), kind).model()

    assert made.Meta.EventType == WIRE_NAMES[kind][1]
    assert not hasattr(made, "SomethingNew")


@pytest.mark.parametrize(
    "kind",
    [
        "Claim.Payment",
        "Claim.Submission",
        "Enrichment.NaturalLanguageProcessingQuery",
        "Enrichment.NaturalLanguageProcessingQueryResponse",
        "Unheard.Of",
        "generic.PatientAdmin",
        "PatientAdmin.factory",
        "abstract_base.RedoxAbstractModel",
        "factory.loads",
        "PatientAdmin.__init__",
        "PatientAdmin.annotations",
        "PatientAdmin.ARRIVAL",
    ],
)
def test_no_class_for_it(kind: str) -> None:
    """For a kind without a class, also one made up to have another module imported, `model()` raises a clear error."""
    with pytest.raises(NotFound, match=f"{kind}: the `redox` package has no class for it: use message.data"):
        message(b"{}", kind).model()


def test_no_class_for_fhir() -> None:
    """For FHIR the error names the library that has classes."""
    with pytest.raises(NotFound, match=r"FHIR\.X: the `redox` package has no class for FHIR: .* fhir\.resources"):
        message(b"{}", "FHIR.X").model()


def test_a_body_that_does_not_obey() -> None:
    """A body that does not match the published schema is pydantic's error; `data` is available."""
    one = message(b'{"Meta": {"DataModel": "PatientAdmin", "EventType": "Arrival"}, "Patient": 7}')
    with pytest.raises(ValidationError):
        one.model()
    assert one.data["Patient"] == 7
