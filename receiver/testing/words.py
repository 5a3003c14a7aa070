"""What stands in a field, by its name: the words, numbers and times of a hospital.

May not know the shape of any message. A field without an entry here is left out of the samples, so nothing that a
person would look at is gibberish, and a field that Redox adds tomorrow breaks nothing.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from receiver.testing.case import Case, Node
from receiver.testing.people import Person


@dataclass(frozen=True, kw_only=True, slots=True)
class Whose:
    """Whose name, address or number a field is. A "place" is a department, a company, an organisation."""

    who: Literal["patient", "relative", "staff", "place", "nobody"]
    member: int = 0  # which of the staff

    def person(self, case: Case) -> Person:
        if self.who == "staff":
            return case.staff[self.member]
        return case.relative if self.who == "relative" else case.patient


FACILITY: Final = "Rivermark General Hospital"
FACILITY_CODE: Final = "RGH"

_PDF: Final = b64encode(b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n").decode()


def _time(hours: float = 0) -> Callable[[Case], str]:
    return lambda case: case.time(hours)


def _day(days: float = 0) -> Callable[[Case], str]:
    return lambda case: case.day(days)


def _number(what: str, digits: int = 8) -> Callable[[Case], str]:
    return lambda case: str(case.number(what, digits))


def _uuid(what: str) -> Callable[[Case], str]:
    return lambda case: case.uuid(what)


# By the field's name, or with its parent's, or with its grandparent's too: the longer key wins.
WORDS: Final[dict[str, Node]] = {
    # The visit and where it takes place.
    "VisitNumber": _number("visit"), "VisitNumbers": _number("visit"), "OldVisitNumber": _number("old visit"),
    "AccountNumber": _number("account"), "PatientClass": "Inpatient", "PatientClasses": "Inpatient",
    "VisitDateTime": _time(2), "OldDateTime": _time(-22), "ScheduledDateTime": _time(2), "CancelDateTime": _time(),
    "VisitStartDateTime": _time(-24), "DischargeDateTime": _time(), "Visit.Reason": "Follow-up of treatment",
    "Visits.Reason": "Follow-up of treatment", "Reasons": "Follow-up of treatment", "Visit.Status": "Scheduled",
    "Visits.Status": "Scheduled", "VisitStatuses": "Scheduled", "CancelReason": "Patient asked for another day",
    "NoShowReason": "Patient did not come", "Instructions": "Please bring your list of medicines.", "Duration": 30,
    "VisitPreference.Duration": "30", "DurationUnit": "minutes", "Day": "Monday", "Time": "Morning",
    "VisitType.Description": "Office visit", "Location.Type": "Inpatient", "PreviousLocation.Type": "Inpatient",
    "DischargeLocation.Type": "Home", "Locations.Type": "Outpatient", "Facility": FACILITY, "Facilities": FACILITY,
    "Department": "3 North Medicine", "Departments": "3 North Medicine", "Room": "304", "Bed": "B", "Balance": 120.5,
    "Locations.Name": "3 North Medicine", "AvailableSlots.StartDateTime": _time(24),
    "AvailableSlots.EndDateTime": _time(24 * 8), "Booked.StartDateTime": _time(24),
    "Booked.EndDateTime": _time(24 * 8), "AvailableSlots.DateTime": _time(48), "AvailableSlots.Reason": "Follow-up",
    "Slots.DateTime": _time(48), "Slots.Reason": "Follow-up", "Slots.ID": _number("slot", 6),
    "AvailableSlots.ID": _number("slot", 6),
    # The patient.
    "Demographics.Race": "White", "Demographics.Religion": "None", "Demographics.MaritalStatus": "Married",
    "Demographics.Language": "en", "Demographics.Ethnicity": "Not Hispanic or Latino", "Citizenship": "US",
    "Languages": "en", "RelationToPatient": "Spouse", "Insured.Relationship": "Self", "RelationToSubscriber": "Self",
    "Contacts.Roles": "Emergency contact", "Guarantor.Type": "Personal", "Guarantor.Number": _number("guarantor", 6),
    "Consent.Status": "Granted", "Consent.Notification": "Email", "Use": "Home", "Telecom.System": "phone",
    "Telecom.Value": "+16085550100",
    # Insurance.
    "Plan.ID": "31572", "Plan.IDType": "Payor ID", "Plan.Name": "HMO Deductible Plan", "Plan.Type": "HMO",
    "Company.ID": "60054", "Company.IDType": "Payor ID", "Company.Name": "Placebo Mutual",
    "GroupNumber": "847025-024", "GroupName": "Rivermark Mills", "PolicyNumber": _number("policy"),
    "MemberNumber": _number("member", 9), "AgreementType": "Standard", "CoverageType": "Patient",
    "EffectiveDate": _day(-200), "ExpirationDate": _day(165), "Insurances.Priority": "Primary",
    "Insurance.Priority": "Primary", "Employer.Name": "Rivermark Mills",
    # Diagnoses, problems, allergies.
    "Diagnoses.Type": "Admitting", "Allergies.Comment": "Reported by the patient",
    "Problems.Comment": "Under control", "Allergies.Status": "Current", "OnsetDateTime": _time(-24 * 400),
    "StartDate": _day(-40), "DocumentedDateTime": _time(-1), "Comments": "Please call with the result.",
    "Comments.Text": "No change since the last visit.",
    # Orders and results.
    "Order.ID": _number("order"), "Orders.ID": _number("order"), "OrderID": _number("order"),
    "OrderIDs": _number("order"), "ApplicationOrderID": _number("application order"), "Order.Status": "New",
    "Orders.Status": "Resulted", "Orders.Name": "Basic metabolic panel", "Order.Priority": "Routine",
    "Orders.Priority": "Routine", "TransactionDateTime": _time(), "CollectionDateTime": _time(-3),
    "CompletionDateTime": _time(-1), "ResultsStatus": "Final", "ResponseFlag": "Associated Segments",
    "ResultStatuses": "Final", "Expiration": _time(24 * 30), "Results.Status": "Final", "AbnormalFlag": "Normal",
    "Results.Notes": "Specimen of good quality.", "Notes": "Reviewed, no further action.", "ValueType": "Numeric",
    "Observations.Status": "Final", "Interpretation": "Normal", "Observations.DateTime": _time(-1),
    "Producer.Name": "Rivermark Laboratory", "Producer.ID": "52D0000000", "Producer.IDType": "CLIA",
    "OrderingFacility.Name": FACILITY, "Specimen.Source": "Blood", "Specimen.BodySite": "Left arm",
    "Specimen.ID": _number("specimen"), "Specimen.Identifiers": _number("specimen"), "RelatedGroupID": "1",
    "RelatedGroupIDs": "1", "Abbreviation": "STEPS", "Score.Description": "Exact match", "Score.Value": 1,
    # Medicines and vaccines.
    "Dose.Quantity": "1", "Dose.Units": "tablet", "Immunizations.Dose.Quantity": "0.5",
    "Immunizations.Dose.Units": "mL", "Vaccinations.Dose.Quantity": "0.5", "Vaccinations.Dose.Units": "mL",
    "Period": "24", "Frequency.Unit": "h", "Strength.Quantity": "5", "Strength.Units": "mg", "Dispense.Amount": 30,
    "Dispense.Units": "tablet", "FreeTextSig": "Take one tablet by mouth daily.", "TotalRefills": 3,
    "NumberOfRefillsRemaining": 2, "LastRefillDate": _day(-20), "LotNumber": "L26A117",
    "Administrations.Status": "Complete", "Medications.Status": "Active", "Product.Manufacturer": "Placebo Pharma",
    "Immunizations.DateTime": _time(-24 * 90), "Immunizations.Status": "Complete", "Vaccinations.DateTime": _time(),
    "Vaccinations.Action": "Add", "Order.EHRID": _number("order"), "Mode": "Outpatient", "CodeType": "RxNorm",
    "UnsignedMedicationOrders.Priority": "Routine", "UnsignedMedicationOrders.Route": "Oral",
    "MixtureType": "Medication", "UnsignedMedicationOrders.Identifiers.ID": _number("order"),
    "UnsignedMedicationOrders.Identifiers.IDType": "Placer",
    "UnsignedProcedureOrders.Identifiers.ID": _number("order"),
    "UnsignedProcedureOrders.Identifiers.IDType": 1,  # a number in the published schema
    "ScheduledDate": _day(3), "PrescriptionID": _number("prescription"), "Drug.NDC": "00093-1048-01",
    # Procedures, surgery, supplies.
    "Procedures.Status": "Completed", "Procedures.DateTime": _time(-24), "Procedures.Quantity": 1,
    "Procedures.Units": "day", "PerformedDateTime": _time(-24), "SurgicalCase.Number": _number("surgical case", 6),
    "SurgicalCase.Status": "Scheduled", "SurgicalInfo.Value": "General anesthesia", "AppointmentInfo.Value": "No",
    "AppointmentInfo.Description": "Interpreter needed", "ProcedureInfo.Value": "Left side",
    "ProcedureInfo.Description": "Laterality", "Items.Identifiers.ID": "10705031150300",
    "Items.Identifiers.IDType": "GTIN", "Items.Description": "Suture, absorbable, 3-0", "Items.Status": "Active",
    "Items.Type": "Supply", "Items.Quantity": 4, "Items.Units": "Box", "Items.Price": 41.2, "UsedQuantity": 3,
    "WastedQuantity": 1, "Location.Bin": "A12", "SerialNumber": _number("serial"), "CatalogNumber": "SU-3030",
    "Vendor.Name": "Placebo Supply", "Vendor.ID": "7714", "Location.ID": "OR-2",
    # Notes, media, documents.
    "DocumentID": _number("document"), "DocumentIDs": _number("document"),
    "OriginalDocumentID": _number("old document"), "DocumentType": "Progress Note", "DocumentTypes": "Progress Note",
    "Note.ContentType": "Plain Text", "Notes.ContentType": "Plain Text", "ContentType": "Plain Text",
    "FileName": "progress-note.pdf", "Media.FileType": "PDF", "Note.FileType": "TXT",
    "Note.FileName": "progress-note.txt", "DocumentGetResponse.FileType": "text/xml",
    "Note.FileContents": "Patient is well. Continue treatment.", "Notes.FileContents": "Patient is well.",
    "Media.FileContents": _PDF, "DocumentDescription": "Progress note", "Media.Authenticated": "True",
    "Availability": "Available", "Note.Status": "Final", "ServiceDateTime": _time(-1), "CreationDateTime": _time(-1),
    "DocumentationDateTime": _time(-1), "Document.ID": _uuid("document"), "Documents.ID": _uuid("document"),
    "Document.Title": "Continuity of Care Document", "Documents.Title": "Continuity of Care Document",
    "Document.Type": "CCDA", "Document.DateTime": _time(), "Documents.DateTime": _time(), "Document.Locale": "US",
    "Documents.Locale": "US", "Documents.FileType": "text/xml", "EntryStatus": "Approved", "EntryType": "Stable",
    "Document.VersionNumber": "1", "Document.SetID": _uuid("document set"), "Components.Name": "Assessment",
    "Components.ID": "1", "Components.Value": "Stable.", "NoteSections.Title": "Assessment",
    "NoteSections.Text": "Stable.", "DirectAddressTo": "intake@direct.example.com", "Locale": "en-US",
    "DirectAddressFrom": "records@direct.example.com", "Data": "<ClinicalDocument/>",
    # Referrals and authorisations.
    "Referral.ID": _number("referral"), "Referral.IDType": "External", "Referrals.ID": _number("referral"),
    "Referrals.IDType": "External", "AlternateID": _number("alternate"), "Referral.Status": "New",
    "Referrals.Status": "New", "Referral.Type": "Consultation", "Referral.Priority": "Routine",
    "Referral.Category": "Outpatient", "Referral.Reason": "Specialty services required", "Specialty.ID": "CARD",
    "ProviderSpecialty": "Cardiology", "DepartmentSpecialty": "Cardiology", "Referral.DateTime": _time(),
    "Referral.Notes": "Please see within two weeks.", "Authorization.Number": _number("authorization"),
    "AuthorizationNumber": _number("authorization"), "Authorization.Decision": "Approved",
    "Services.Decision": "Approved", "Authorization.Category": "Initial", "Authorization.Type": "Outpatient",
    "RequestedTreatmentCount": "2", "AuthorizedTreatmentCount": "2", "ExpirationDateTime": _time(24 * 90),
    "ProcessDateTime": _time(), "Authorization.DateTime": _time(), "IssueDate": _day(), "ServiceDate": _day(7),
    "Services.Type": "Medical", "Providers.Type": "Referred To", "StatusReason": "Complete",
    "Providers.Role": "Rendering",
    # Claims and money.
    "Transactions.ID": _number("transaction"), "Transactions.IDType": "Internal", "Transactions.Type": "Charge",
    "PaymentDateTime": _time(), "PaymentMethod": "ACH", "CreditOrDebit": "Credit", "TotalPaymentAmount": "184.20",
    "TrackingNumber": _number("tracking"), "Payments.DateTime": _time(), "SubmissionNumber": _number("claim"),
    "ControlNumber": _number("claim control"), "Claims.Status": "Processed as Primary", "ChargedAmount": "230.00",
    "PaymentAmount": "184.20", "PatientResponsibilityAmount": "20.00", "AllowedAmount": "204.20",
    "TotalAmount": "230.00", "ReceivedDate": _day(-3), "ChargedUnits": "1", "PaymentUnits": "1",
    "Adjustments.Amount": "25.80", "Adjustments.Reason": "45", "Adjustments.Type": "CO", "Adjustments.Quantity": "1",
    "Services.Amount": "230.00", "Chargeable.Amount": 230.0, "Chargeable.Quantity": "1",
    "DateTimeOfService": _time(-24), "ResponsibilityLevel": "Primary", "Receiver.Name": "Placebo Mutual",
    "Submitter.Name": FACILITY, "BillingProvider.Name": FACILITY, "OrganizationName": "Rivermark Mills",
    "DiagnosisRelatedGroup": "312", "RevenueCode": "0450",
    # Devices, education, research, search, sign-on.
    "Device.ID": _uuid("device"), "Education.Status": "In Progress", "Assignments.Status": "In Progress",
    "InstanceID": _number("instance"), "CreatedDateTime": _time(-24), "ActionDateTime": _time(),
    "ActionStatus": "Taught", "Learner": "Patient", "Readiness": "Eager", "Response": "Verbalized",
    "Study.Title": "Effect of a made-up tablet on made-up people", "Study.Type": "Interventional", "Phase": "2",
    "Study.Status": "Active", "Study.Description": "A study that exists in samples only.",
    "Design.Purpose": "Treatment", "Eligibility.Gender": "All", "MinimumAge": 18, "MaximumAge": 80,
    "SubjectStatus": "Enrolled", "Sponsor.Name": "Placebo Foundation", "RadiusSearch.Radius": "10",
    "RadiusSearch.ZipCode": "53799", "NameSearch.Value": "Rivermark", "NameSearch.SearchType": "Contains",
    "Limit": "10", "Index": "0", "Paging.Index": 0, "Paging.Count": 1, "IssuedAt": _time(),
    "SignOn.Expiration": _time(1), "SignOn.Subject": "rgh-clinician", "UserId": "rgh-clinician",
    "TimeZone": "America/Chicago", "SessionID": _uuid("session"), "SessionBaseURL": "https://ehr.example.com/session",
    "Session": _uuid("session"), "Directory": "Rivermark Directory", "Organization.Name": FACILITY,
    "Action": "Update", "Organizations.Name": FACILITY, "Organizations.Aliases": "RGH",
    "Organization.Type": "Hospital", "Endpoints.Address": "https://ehr.example.com/fhir",
    "Endpoints.Name": "FHIR endpoint", "LastUpdated": _time(), "Entries.Category": "Diagnosis",
    "Submitted.Category": "Diagnosis", "EntryID": "1", "Entries.Status": "Success", "Matches.Status": "Found",
    "MatchPriority": "1", "Variants.Title": "Preferred term", "Transaction.ID": _uuid("lookup"),
    "VendorID": "placebo-terms", "Advisories.Description": "Consider a lower dose.", "ShowAlert": True,
    "Link": "https://guide.example.com/dose", "AdditionalUnsignedOrders.Title": "Renal function panel",
    "AdditionalUnsignedOrders.ID": "RFP", "AdditionalUnsignedOrders.IDType": "Internal",
    "RemovableUnsignedOrders.ID": "CMP", "RemovableUnsignedOrders.IDType": "Internal",
    "RemovableUnsignedOrders.Title": "Comprehensive metabolic panel", "CanceledEvent": "Arrival",
    "BatchID": _uuid("batch"), "CurrentBatch": "1", "TotalBatches": "1", "ContainsLatex": False, "IsActive": True,
    "Active": True,
    # What is left of times.
    "Encounters.DateTime": _time(-3), "Encounter.DateTime": _time(-3), "DateTime": _time(),
    "StartDateTime": _time(-2), "EndDateTime": _time(-1),
}

_PERSON: Final[dict[str, Callable[[Person], str]]] = {
    "FirstName": lambda p: p.given, "MiddleName": lambda p: p.middle, "LastName": lambda p: p.family,
    "DOB": lambda p: p.born.isoformat(), "Sex": lambda p: p.sex,
    "SSN": lambda p: p.ssn, "StreetAddress": lambda p: p.street, "City": lambda p: p.city, "County": lambda p: p.county,
    "State": lambda p: p.state, "ZIP": lambda p: p.zip, "Country": lambda _: "US", "Home": lambda p: p.home_phone,
    "Mobile": lambda p: p.mobile_phone, "Office": lambda p: p.home_phone, "Business": lambda p: p.home_phone,
    "Work": lambda p: p.home_phone, "PhoneNumber": lambda p: p.home_phone, "EmailAddresses": lambda p: p.email,
    "EmailAddress": lambda p: p.email, "Address": lambda p: p.email,
}
_STAFF: Final[dict[str, Callable[[Person], str]]] = {
    "ID": lambda p: p.npi, "IDType": lambda _: "NPI", "NPI": lambda p: p.npi, "Credentials": lambda _: "MD",
    "Name": lambda p: f"{p.given} {p.family}"}
_PLACE: Final[dict[str, Node]] = {
    "StreetAddress": "1 Stethoscope Street", "City": "Rivermark", "County": "Marklin", "State": "WI", "ZIP": "53799",
    "Country": "US", "Use": "Work", "PhoneNumber": "+16085550100", "Office": "+16085550100", "Business": "+16085550100",
    "Fax": "+16085550101", "EmailAddress": "billing@example.com", "ID": "4720", "IDType": "Internal"}


def exact(grandparent: str, parent: str, field: str) -> Node:
    """What stands in this very field; None when only its name may tell."""
    return WORDS.get(f"{grandparent}.{parent}.{field}", WORDS.get(f"{parent}.{field}"))


def general(field: str, whose: Whose) -> Node:
    """What stands in any field of that name that is about `whose`; None when nothing here fits."""
    if whose.who == "place" and field in _PLACE:
        return _PLACE[field]
    if whose.who not in ("place", "nobody"):
        about = _PERSON.get(field) or (_STAFF.get(field) if whose.who == "staff" else None)
        if about is not None:
            return lambda case: about(whose.person(case))
    return WORDS.get(field)


def patient_identifiers() -> list[Node]:
    """`Patient.Identifiers`: the medical record number, the EHR's id and one of a network, as Redox's examples have."""
    return [
        {"ID": lambda case: case.patient.mrn, "IDType": "MR"},
        {"ID": lambda case: case.patient.ehr_id, "IDType": "EHRID"},
        {"ID": lambda case: case.patient.nist_id, "IDType": "NIST"},
    ]


def previous_identifiers() -> list[Node]:
    """`Patient.PreviousIdentifiers` of a merge: the record number that is no more."""
    return [{"ID": _number("merged record", 10), "IDType": "MR"}]
