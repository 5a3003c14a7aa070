"""Which kinds a handler asks for."""

from __future__ import annotations

import pytest

from receiver.protocol.patterns import matches, normalize_pattern
from receiver.samples.kinds import KINDS, WIRE_NAMES


@pytest.mark.parametrize(
    ("pattern", "normal"),
    [
        ("*", "*"),
        ("PatientAdmin.Arrival", "PatientAdmin.Arrival"),
        ("Clinical Summary.PatientPush", "ClinicalSummary.PatientPush"),
        ("Clinical Summary.*", "ClinicalSummary.*"),
        ("FHIR.*", "FHIR.*"),
        ("SSO.Sign-on", "SSO.Sign-on"),
        ("FHIR.PatientAdmin-event-patient-registered", "FHIR.PatientAdmin-event-patient-registered"),
    ],
)
def test_patterns(pattern: str, normal: str) -> None:
    """A pattern is a kind, a model's `*`, or `*`, with spaces removed."""
    assert normalize_pattern(pattern) == normal


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "PatientAdmin",
        "PatientAdmin.",
        ".Arrival",
        "*.Arrival",
        "*.*",
        "PatientAdmin.Arr*",
        "A.B.C",
        "**",
        "A.B\n",
        "é.B",
    ],
)
def test_no_patterns(pattern: str) -> None:
    """Anything else is refused when it is written down, with what to write instead: it would never match."""
    with pytest.raises(ValueError) as refused:
        normalize_pattern(pattern)
    assert "use Model.Event, Model.*, FHIR.* or *" in str(refused.value)
    assert repr(pattern) in str(refused.value)


@pytest.mark.parametrize("kind", WIRE_NAMES)
def test_every_kind_is_asked_for_in_three_ways(kind: str) -> None:
    """Itself, its model, everything; and by no other model's name."""
    model = kind.partition(".")[0]
    assert [each for each in (kind, f"{model}.*", "*") if matches([each], kind)] == [kind, f"{model}.*", "*"]
    others = {f"{other.replace(' ', '')}.*" for other, _ in KINDS} - {f"{model}.*"}
    assert not matches(others, kind)
    assert not matches([], kind)


def test_names_are_matched_whole() -> None:
    """A model's `*` does not reach a model whose name begins alike, nor a kind one that ends alike."""
    assert not matches(["Patient.*", "Admin.*", "PatientAdmin.Arr", "PatientAdmin.ArrivalTwo"], "PatientAdmin.Arrival")
    assert not matches(["FHIR.*"], "FHIRTwo.New")
