"""Synthetic people: invented names, and numbers that were never issued.

Must not depend on messages: other modules write people into messages. Social security numbers begin with 9 (never
issued), telephone numbers are 555-0100 to 555-0199 (reserved for fiction), mail addresses are at example.com, and NPIs
begin with 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import Final, Literal
from uuid import UUID

_GIVEN: Final = {
    "Female": (
        "Avelina",
        "Brisa",
        "Calla",
        "Delphine",
        "Elowen",
        "Fenna",
        "Ginevra",
        "Hespera",
        "Isaura",
        "Junia",
        "Kerensa",
        "Lunetta",
        "Marisol",
        "Nerida",
        "Odalys",
        "Philippa",
        "Rosamund",
        "Saskia",
        "Tamsin",
        "Ursula",
    ),
    "Male": (
        "Alaric",
        "Bertram",
        "Corwin",
        "Desmond",
        "Emrys",
        "Florian",
        "Gideon",
        "Hartley",
        "Ignatius",
        "Jasper",
        "Kasimir",
        "Leopold",
        "Mortimer",
        "Nestor",
        "Orlando",
        "Percival",
        "Quillon",
        "Rufus",
        "Silvan",
        "Tobias",
    ),
}
_FAMILY: Final = (
    "Samplewood",
    "Testerman",
    "Mockridge",
    "Placeholme",
    "Fixturelli",
    "Dummond",
    "Stubbsworth",
    "Fakenham",
    "Examplar",
    "Trialsby",
    "Quillfeather",
    "Brackenmoor",
    "Larkspurling",
    "Thistlewicke",
    "Pendragonby",
    "Umbergate",
    "Vexley",
    "Wintergreene",
    "Yarrowby",
    "Zephyrson",
)
_TOWNS: Final = (
    # City, county, state, and a ZIP code in that state's range that is not in use.
    ("Rivermark", "Marklin", "WI", "53799"),
    ("Port Sample", "Vantry", "OR", "97399"),
    ("Mockingvale", "Harrow", "OH", "43999"),
    ("Testerton", "Bellweather", "NY", "14999"),
    ("Fixture Falls", "Cascade Ridge", "CO", "80199"),
)
_STREETS: Final = ("Placebo Lane", "Stethoscope Street", "Willow Bend Road", "Old Infirmary Way", "Lantern Hill Drive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """A fictional person. `sex` is spelled as in the Data Model. Telephone numbers are in E.164 format."""

    given: str
    middle: str
    family: str
    sex: Literal["Female", "Male"]
    born: date
    street: str
    city: str
    county: str
    state: str
    zip: str
    home_phone: str
    mobile_phone: str
    email: str
    ssn: str
    mrn: str
    ehr_id: str
    nist_id: str
    npi: str


def person(seed: int, *, family: str | None = None) -> Person:
    """Return the person for `seed`, always the same. `family`: use this family name, as a marker that a test can search
    for.
    """
    random = Random(seed)  # noqa: S311 (made-up people, not secrets)
    sex: Literal["Female", "Male"] = random.choice(("Female", "Male"))
    given, middle = random.sample(_GIVEN[sex], 2)
    drawn = random.choice(_FAMILY)  # always drawn, so that a marker changes nothing else
    family = family or drawn
    city, county, state, zip_code = random.choice(_TOWNS)
    return Person(
        given=given,
        middle=middle,
        family=family,
        sex=sex,
        born=date(1934, 1, 1) + timedelta(days=random.randrange(70 * 365)),
        street=f"{random.randrange(1, 999)} {random.choice(_STREETS)}",
        city=city,
        county=county,
        state=state,
        zip=zip_code,
        home_phone=f"+1608555{random.randrange(100, 200):04}",
        mobile_phone=f"+1414555{random.randrange(100, 200):04}",
        email=f"{given}.{family}@example.com".lower().replace(" ", "-"),
        ssn=f"9{random.randrange(10**8):08}",
        mrn=f"{random.randrange(10**10):010}",
        ehr_id=str(UUID(int=random.getrandbits(128), version=4)),
        nist_id=f"{random.getrandbits(60):015x}",
        npi=f"9{random.randrange(10**9):09}",
    )
