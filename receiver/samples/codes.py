"""Medical codes for sample bodies: each with its code system and its name.

Not clinically complete: a few real codes for each topic, enough for a plausible chart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from receiver.samples.scenario import Scenario


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """A code, its code system (OID and name), and its meaning."""

    code: str
    system: str
    system_name: str
    name: str


_SYSTEMS: Final = {
    "ICD-10": "2.16.840.1.113883.6.90",
    "SNOMED CT": "2.16.840.1.113883.6.96",
    "LOINC": "2.16.840.1.113883.6.1",
    "RxNorm": "2.16.840.1.113883.6.88",
    "CPT": "2.16.840.1.113883.6.12",
    "CVX": "2.16.840.1.113883.12.292",
    "MVX": "2.16.840.1.113883.12.227",
    "NDC": "2.16.840.1.113883.6.69",
    "NUCC": "2.16.840.1.113883.6.101",
    "NCI Thesaurus": "2.16.840.1.113883.3.26.1.1",
    "CDC Race and Ethnicity": "2.16.840.1.113883.6.238",
    "HL7 RoleCode": "2.16.840.1.113883.5.111",
    "HL7 DischargeDisposition": "2.16.840.1.113883.12.112",
}


def _coded(system: str, *pairs: tuple[str, str]) -> tuple[Code, ...]:
    return tuple(Code(code=code, system=_SYSTEMS[system], system_name=system, name=name) for code, name in pairs)


_TOPICS: Final[dict[str, tuple[Code, ...]]] = {
    "diagnosis": _coded(
        "ICD-10",
        ("I10", "Essential (primary) hypertension"),
        ("J45.909", "Unspecified asthma, uncomplicated"),
        ("E11.9", "Type 2 diabetes mellitus without complications"),
        ("R07.9", "Chest pain, unspecified"),
        ("M54.50", "Low back pain, unspecified"),
        ("N39.0", "Urinary tract infection, site not specified"),
    ),
    "allergen": _coded("RxNorm", ("7980", "Penicillin G"), ("2670", "Codeine"), ("1191", "Aspirin")),
    "allergy type": _coded("SNOMED CT", ("416098002", "Allergy to drug")),
    "severity": _coded("SNOMED CT", ("255604002", "Mild"), ("6736007", "Moderate")),
    "medication": _coded(
        "RxNorm",
        ("197361", "Amlodipine 5 MG Oral Tablet"),
        ("308136", "Amlodipine 2.5 MG Oral Tablet"),
        ("314076", "Lisinopril 10 MG Oral Tablet"),
    ),
    "drug package": _coded("NDC", ("00093-1048-01", "Metformin hydrochloride 500 MG tablet, 100 count")),
    "vaccine": _coded("CVX", ("140", "Influenza, seasonal, injectable, preservative free"), ("115", "Tdap")),
    "vaccine maker": _coded("MVX", ("SKB", "GlaxoSmithKline"), ("PMC", "Sanofi Pasteur")),
    "device": _coded("SNOMED CT", ("43770009", "Sphygmomanometer")),
    "route": _coded("NCI Thesaurus", ("C38288", "Oral")),
    "injection route": _coded("NCI Thesaurus", ("C28161", "Intramuscular")),
    "body site": _coded(
        "SNOMED CT", ("368208006", "Left upper arm structure"), ("368209003", "Right upper arm structure")
    ),
    "procedure": _coded(
        "CPT",
        ("80053", "Comprehensive metabolic panel"),
        ("71046", "Radiologic examination, chest, 2 views"),
        ("93000", "Electrocardiogram with interpretation and report"),
        ("85025", "Complete blood count"),
    ),
    "visit type": _coded("CPT", ("99213", "Office visit, established patient, 20 minutes")),
    "observation": _coded(
        "LOINC", ("718-7", "Hemoglobin"), ("2345-7", "Glucose"), ("2160-0", "Creatinine"), ("2823-3", "Potassium")
    ),
    "vital sign": _coded("LOINC", ("8867-4", "Heart rate"), ("9279-1", "Respiratory rate")),
    "encounter": _coded(
        "SNOMED CT", ("185349003", "Encounter for check up"), ("50849002", "Emergency department admission")
    ),
    "specialty": _coded(
        "NUCC",
        ("207R00000X", "Internal Medicine"),
        ("207RC0000X", "Cardiovascular Disease"),
        ("207Q00000X", "Family Medicine"),
    ),
    "staff role": _coded("SNOMED CT", ("224535009", "Registered nurse"), ("158965000", "Medical practitioner")),
    "status": _coded("SNOMED CT", ("55561003", "Active")),
    "race": _coded(
        "CDC Race and Ethnicity", ("2106-3", "White"), ("2054-5", "Black or African American"), ("2028-9", "Asian")
    ),
    "ethnicity": _coded("CDC Race and Ethnicity", ("2186-5", "Not Hispanic or Latino")),
    "document": _coded("LOINC", ("34133-9", "Summarization of Episode Note"), ("11506-3", "Progress note")),
    "disposition": _coded("HL7 DischargeDisposition", ("01", "Discharged to home or self care (routine discharge)")),
    "education": _coded("SNOMED CT", ("6143009", "Diabetic education")),
    "pharmacy": _coded("HL7 RoleCode", ("OUTPHARM", "Outpatient pharmacy")),
    "question": _coded("LOINC", ("41950-7", "Number of steps in 24 hours")),
    "answer": _coded("SNOMED CT", ("373066001", "Yes"), ("373067005", "No")),
}

# What is measured, its unit and its usual range, by the code of the observation.
_MEASURED: Final[dict[str, tuple[float, str, float, float]]] = {
    "718-7": (13.9, "g/dL", 12.0, 17.5),
    "2345-7": (98, "mg/dL", 70, 99),
    "2160-0": (0.9, "mg/dL", 0.6, 1.3),
    "2823-3": (4.1, "mmol/L", 3.5, 5.1),
    "8867-4": (72, "/min", 60, 100),
    "9279-1": (16, "/min", 12, 20),
    "41950-7": (6412, "steps", 0, 30000),
}

# Field → topic. The key is the field's name, or its parent's name and its own. The longer key has precedence.
_FIELDS: Final[dict[str, str]] = {
    **dict.fromkeys(
        (
            "Diagnoses",
            "Diagnosis",
            "Problems",
            "Indications",
            "Conditions",
            "ReasonForVisit",
            "Entries",
            "Submitted",
            "Codes",
            "LexicalReference",
            "DecisionSupport",
        ),
        "diagnosis",
    ),
    "Allergies": "allergen",
    "Substance": "allergen",
    "Allergies.Type": "allergy type",
    "Severity": "severity",
    "Criticality": "severity",
    "Product": "medication",
    "Drug": "medication",
    "MixtureComponents": "medication",
    "NDC": "drug package",
    "Immunizations.Product": "vaccine",
    "Vaccinations.Product": "vaccine",
    "Equipment": "device",
    "Manufacturer": "vaccine maker",
    "Route": "route",
    "Immunizations.Route": "injection route",
    "Vaccinations.Route": "injection route",
    "BodySite": "body site",
    "Site": "body site",
    "Procedures": "procedure",
    "Procedure": "procedure",
    "Services": "procedure",
    "AdjudicatedService": "procedure",
    "SubmittedService": "procedure",
    "UnsignedProcedureOrders": "procedure",
    "Chargeable": "procedure",
    "SurgicalInfo": "procedure",
    "VisitType": "visit type",
    "Observations": "observation",
    "Results": "observation",
    "Components": "observation",
    "Orders": "procedure",
    "VitalSigns.Observations": "vital sign",
    "Encounters": "encounter",
    **dict.fromkeys(("Specialties", "Specialty", "SpecialtyDepartment", "Department", "Qualifications"), "specialty"),
    **dict.fromkeys(("Role", "Roles", "Types"), "staff role"),
    "Status": "status",
    "HealthStatus": "status",
    "RaceCodes": "race",
    "EthnicGroupCodes": "ethnicity",
    "TypeCode": "document",
    "NoteSections": "document",
    "Notes": "document",
    "DischargeDisposition": "disposition",
    "DischargeStatus": "disposition",
    "Topic": "education",
    "Subject": "education",
    "Assignments": "education",
    "Education": "education",
    "Pharmacy": "pharmacy",
    "Question": "question",
    "Questions": "question",
    "ClinicalInfo": "question",
    "AppointmentInfo": "question",
    "Answer": "answer",
    "Answers": "answer",
}


def topic(parent: str, field: str) -> str | None:
    """Return the topic of the coded field `field` of `parent`, or None."""
    return _FIELDS.get(f"{parent}.{field}") or _FIELDS.get(field)


def choose(scenario: Scenario, about: str) -> Code:
    """Return the code of a topic for this scenario. It is always the same one, so that code and name agree."""
    concepts = _TOPICS[about]
    return concepts[scenario.seed % len(concepts)]


def measured(scenario: Scenario, about: str) -> tuple[float, str, float, float]:
    """Return the value, unit, and usual range (low, high) of the observation that `choose` returns, or a plain 1."""
    return _MEASURED.get(choose(scenario, about).code, (1, "unit", 1, 1))
