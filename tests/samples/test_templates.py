"""Templates that are made from Redox's schema."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from receiver.samples.scenario import make_scenario, render
from receiver.samples.templates import NOBODY, Place, fill, template


class Inner(BaseModel):
    Zyxw: str | None = None


class Unheard(BaseModel):
    """Fields that Redox might add tomorrow."""

    Abcd: str
    Efgh: float
    Ijkl: bool
    Mnop: list[str]
    Qrst: Inner
    Uvwx: str | None = None
    Empty: Inner | None = None
    DOB: str | None = None
    LotNumber: float | None = None
    Facility: bool | None = None
    VisitNumber: float | None = None
    IsActive: float | None = None


def test_unknown_fields() -> None:
    """Samples stay valid with new fields in Redox's schema: optional ones are left out, and types are right."""
    filled = fill(Unheard, Place(parent="", field="Unheard", whose=NOBODY))
    assert filled == {"Abcd": "Unspecified", "Efgh": 0, "Ijkl": False, "Mnop": ["Unspecified"], "Qrst": {}}
    assert Unheard.model_validate(filled).Qrst.Zyxw is None


def test_a_template_is_made_once() -> None:
    """The schema of a kind is read once, however many samples are made."""
    assert template("Device.New") is template("Device.New")


def test_single_claims_look_like_their_batches() -> None:
    """Redox: a single claim is the same as a batch, but for one transaction. Only the name differs."""
    of = make_scenario("Claim.Submission", seed=1)
    single, batch = render(template("Claim.Submission"), of), render(template("Claim.SubmissionBatch"), of)
    assert single["Transactions"] == batch["Transactions"]
    assert single["Meta"]["EventType"] == "Submission"


def test_a_kind_that_redox_does_not_have() -> None:
    """An unknown kind has no template."""
    with pytest.raises(KeyError):
        template("PatientAdmin.Nonsense")
