"""Patterns of message kinds."""

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
    """A pattern is a kind, a model's `*`, or `*`; spaces are removed."""
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
def test_invalid_patterns(pattern: str) -> None:
    """An invalid pattern would never match: it is refused, with the valid forms."""
    with pytest.raises(ValueError) as refused:
        normalize_pattern(pattern)
    assert "use Model.Event, Model.*, FHIR.* or *" in str(refused.value)
    assert repr(pattern) in str(refused.value)


@pytest.mark.parametrize("kind", WIRE_NAMES)
def test_every_kind_has_three_patterns(kind: str) -> None:
    """The kind, its model's `*`, and `*` match; another model's name does not."""
    model = kind.partition(".")[0]
    assert [each for each in (kind, f"{model}.*", "*") if matches([each], kind)] == [kind, f"{model}.*", "*"]
    others = {f"{other.replace(' ', '')}.*" for other, _ in KINDS} - {f"{model}.*"}
    assert not matches(others, kind)
    assert not matches([], kind)


def test_names_are_matched_whole() -> None:
    """A model's `*` does not match a model with the same beginning, nor a kind one with the same end."""
    assert not matches(["Patient.*", "Admin.*", "PatientAdmin.Arr", "PatientAdmin.ArrivalTwo"], "PatientAdmin.Arrival")
    assert not matches(["FHIR.*"], "FHIRTwo.New")
